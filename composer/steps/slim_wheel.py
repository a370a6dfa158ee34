"""Slim a wheel by itself: a new wheel with a local version label, for whoever ships images and not bundles."""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import msgspec
from packaging.version import Version

from composer._fs import atomic_file, host_errors
from composer.errors import RecipeError, WheelError
from composer.events import Event, Listener
from composer.formats.cubin import Cubin
from composer.formats.elf import is_elf
from composer.formats.licence import is_licence, why_unmodifiable
from composer.formats.record import RecordRow, render_record
from composer.formats.wheel import Wheel, read_wheel, verified_stream
from composer.formats.zip import CHUNK, Member, read, stream
from composer.model.layer import PruneChange
from composer.model.plan import SlimEdit
from composer.steps.slim import slim_object
from composer.steps.survey import loose_cubin, mapped

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: Beside METADATA: what was changed, and the digests of the original.
LEDGER = "compose-slim.json"
_SCHEMA = 1
_LICENCE_LIMIT = 4 << 20
_DROPPED = ("RECORD", "RECORD.jws", "RECORD.p7s")
# The oldest time that a ZIP archive can hold: the same wheel gives the same bytes.
_TIME = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """How to slim wheels. sms: none for all, which cuts debug symbols only. accept: modify against the licence."""

    sms: tuple[int, ...]
    keep_ptx: bool = False
    debug: bool = True
    accept: bool = False

    @property
    def label(self) -> str:
        """What is appended to the version (PEP 440, local version label)."""
        return ".".join(f"sm{sm}" for sm in self.sms) or "slim"


class SlimmedFile(msgspec.Struct, frozen=True, kw_only=True):
    """One object of the new wheel that is not upstream's. detail: what was done; sizes in bytes."""

    path: str
    detail: str
    size: int
    sha256: str
    original_size: int
    original_sha256: str


class Ledger(msgspec.Struct, frozen=True, kw_only=True):
    """What a slimmed wheel says about itself, in `LEDGER`. left_out: loose cubins. left_alone: path to the reason."""

    schema: int = _SCHEMA
    wheel: str
    sha256: str
    sms: Sequence[int]
    keep_ptx: bool
    redistributable: bool
    files: Sequence[SlimmedFile]
    left_out: Sequence[PruneChange] = ()
    left_alone: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class SlimmedWheel:
    """A new wheel, and the one it was made from; sizes in bytes."""

    path: Path
    size: int
    original_size: int
    ledger: Ledger


def slim_wheel(path: Path, folder: Path, request: Request, scratch: Path, listener: Listener) -> SlimmedWheel:
    """Write the slimmed wheel into `folder`; the original stays as it is. Objects are edited in the folder `scratch`.

    RecipeError when its licence forbids it or it is slimmed already, WheelError for an unsound wheel, ElfError when a
    slimmed object does not stand up to its proof.
    """
    with mapped(path) as view:
        wheel = read_wheel(view, path.name)
        _refuse_slimmed(view, wheel)
        free = _check_licence(view, wheel, request)
        target = folder / _filename(path.name, wheel, request)
        with atomic_file(target) as out:
            job = _Job(view, wheel, request, scratch, listener)
            ledger = job.write(out, sha256=hashlib.sha256(view).hexdigest(), redistributable=free)
            size = out.seek(0, 2)
    listener(Event(step="slim", subject=path.name, finished=True))
    return SlimmedWheel(path=target, size=size, original_size=path.stat().st_size, ledger=ledger)


def _refuse_slimmed(view: Buffer, wheel: Wheel) -> None:
    member = wheel.members.get(f"{wheel.dist_info}/{LEDGER}")
    if member is None:
        return
    try:
        known = msgspec.json.decode(read(view, member), type=Ledger)
    except msgspec.DecodeError as fault:
        raise WheelError(f"{LEDGER} is damaged", where=wheel.filename, why=str(fault)) from fault
    sms = ", ".join(map(str, known.sms)) or "all"
    raise RecipeError(f"is slimmed already, for SM {sms}", where=wheel.filename,
                      fix=f"Start from the original: {known.wheel}, sha256 {known.sha256}.")  # fmt: skip


def _check_licence(view: Buffer, wheel: Wheel, request: Request) -> bool:
    """Whether the new wheel may be passed on. RecipeError when it may not and the user has not accepted that."""
    texts = {
        path: read(view, member, where=f"{wheel.filename}: {path}") for path, member in wheel.members.items()
        if is_licence(path) and member.size <= _LICENCE_LIMIT
    }  # fmt: skip
    reason = why_unmodifiable(wheel.metadata, texts)
    if reason and not request.accept:
        raise RecipeError("its licence does not let it be modified", where=wheel.filename, why=reason,
                          fix="Add --accept-license-modification for a wheel that stays in your house.")  # fmt: skip
    return reason is None


def _filename(filename: str, wheel: Wheel, request: Request) -> str:
    name, old, *rest = filename.split("-")
    assert Version(old) == wheel.name.version
    return "-".join([name, str(_version(wheel, request)), *rest])


def _version(wheel: Wheel, request: Request) -> Version:
    old = wheel.name.version
    return Version(f"{old}{'.' if old.local else '+'}{request.label}")


def _project(wheel: Wheel) -> str:
    """As its folders spell it: the name of the wheel has no hyphen, theirs may."""
    return wheel.dist_info.removesuffix(".dist-info").rpartition("-")[0]


class _Job:
    """One wheel being rewritten."""

    def __init__(self, view: Buffer, wheel: Wheel, request: Request, work: Path,
                 listener: Listener) -> None:  # fmt: skip
        self._view = view
        self._wheel = wheel
        self._request = request
        self._work = work
        self._listener = listener
        self._new_info = f"{_project(wheel)}-{_version(wheel, request)}.dist-info"
        self._edit = SlimEdit(files=("**",), sms=request.sms, licence="", gpu=True, keep_ptx=request.keep_ptx,
                              debug=request.debug)  # fmt: skip
        self._rows: dict[str, RecordRow] = {}
        self._files: list[SlimmedFile] = []
        self._left_alone: dict[str, str] = {}
        self._left_out: dict[str, list[int]] = {}
        self._done, self._total = 0, sum(member.size for member in wheel.members.values())

    def write(self, out: IO[bytes], *, sha256: str, redistributable: bool) -> Ledger:
        members, info = self._wheel.members, f"{self._wheel.dist_info}/"
        kept = members.keys() - {info + name for name in _DROPPED}
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(kept, key=lambda path: (path.startswith(info), path)):
                self._write_member(archive, members[path])
            ledger = Ledger(wheel=self._wheel.filename, sha256=sha256, sms=self._request.sms, files=self._files,
                            keep_ptx=self._request.keep_ptx, redistributable=redistributable,
                            left_out=self._pruned(), left_alone=self._left_alone)  # fmt: skip
            self._put(archive, f"{self._new_info}/{LEDGER}", 0o644, [msgspec.json.format(msgspec.json.encode(ledger))])
            record = f"{self._new_info}/RECORD"
            self._put(archive, record, 0o644, [render_record({**self._rows, record: RecordRow()})])
        return ledger

    def _write_member(self, archive: zipfile.ZipFile, member: Member) -> None:
        path = self._renamed(member.path)
        if member.path == f"{self._wheel.dist_info}/METADATA":
            self._put(archive, path, member.mode, [self._metadata()])
        elif cubin := loose_cubin(self._view, member, self._where(member)):
            self._write_cubin(archive, path, member, cubin)
        elif is_elf(bytes(next(stream(self._view, member, 64, where=self._where(member)), b""))):
            self._write_object(archive, path, member)
        else:
            self._put(archive, path, member.mode, verified_stream(self._view, self._wheel, member))
        self._done += member.size
        self._listener(Event(step="slim", subject=self._wheel.filename, done=self._done, total=self._total))

    def _write_cubin(self, archive: zipfile.ZipFile, path: str, member: Member, cubin: Cubin) -> None:
        """As it is, or not at all."""
        if reason := self._edit.why_left_out(path, cubin):
            self._left_out.setdefault(reason, []).append(member.size)
        else:
            self._put(archive, path, member.mode, verified_stream(self._view, self._wheel, member))

    def _pruned(self) -> list[PruneChange]:
        (pattern,) = self._edit.files
        return [
            PruneChange(pattern=pattern, reason=reason, files=len(sizes), size=sum(sizes))
            for reason, sizes in self._left_out.items()
        ]

    def _write_object(self, archive: zipfile.ZipFile, path: str, member: Member) -> None:
        original, smaller = self._work / "object", self._work / "smaller"
        with host_errors(original), original.open("wb") as copy:
            copy.writelines(verified_stream(self._view, self._wheel, member))
        outcome = slim_object(original, smaller, self._where(member), self._edit)
        source = smaller if outcome.changed else original
        with host_errors(source), source.open("rb") as pieces:
            self._put(archive, path, member.mode, iter(lambda: pieces.read(CHUNK), b""))
        row = self._rows[path]
        if outcome.changed:
            with host_errors(original), original.open("rb") as handle:
                before = hashlib.file_digest(handle, "sha256").hexdigest()
            assert row.sha256 is not None
            assert row.size is not None
            self._files.append(SlimmedFile(path=path, detail=outcome.detail, size=row.size, sha256=row.sha256.hex(),
                                           original_size=member.size, original_sha256=before))  # fmt: skip
        elif outcome.detail:
            self._left_alone[path] = outcome.detail

    def _put(self, archive: zipfile.ZipFile, path: str, mode: int, pieces: Iterable[bytes | memoryview]) -> None:
        info = zipfile.ZipInfo(path, _TIME)
        info.compress_type = zipfile.ZIP_DEFLATED
        info.external_attr = (0o100000 | mode) << 16
        digest, size = hashlib.sha256(), 0
        with archive.open(info, "w", force_zip64=True) as out:
            for piece in pieces:
                digest.update(piece)
                out.write(piece)
                size += len(piece)
        self._rows[path] = RecordRow(sha256=digest.digest(), size=size)

    def _renamed(self, path: str) -> str:
        """The folders of a wheel that carry its version."""
        old, new = self._wheel.dist_info.removesuffix(".dist-info"), self._new_info.removesuffix(".dist-info")
        for ending in (".dist-info/", ".data/"):
            if path.startswith(old + ending):
                return new + path.removeprefix(old)
        return path

    def _where(self, member: Member) -> str:
        return f"{self._wheel.filename}: {member.path}"

    def _metadata(self) -> bytes:
        line = f"Version: {_version(self._wheel, self._request)}".encode()
        return re.sub(rb"^version:[^\r\n]*", line, self._wheel.metadata, count=1, flags=re.IGNORECASE | re.MULTILINE)
