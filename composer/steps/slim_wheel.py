"""Slim a wheel by itself: a new wheel with a local version label, for whoever ships images and not bundles."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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
from composer.formats.wheel import Wheel, read_wheel, verified_stream
from composer.formats.wheel_writer import WheelWriter
from composer.formats.zip import CHUNK, Member, read, stream
from composer.model.layer import PruneChange
from composer.model.plan import SlimEdit
from composer.steps.relabel import labelled
from composer.steps.slim import slim_object
from composer.steps.survey import loose_cubin, mapped

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: Beside METADATA: what was changed, and the digests of the original.
LEDGER = "compose-slim.json"
_SCHEMA = 1
_LICENCE_LIMIT = 4 << 20


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
        target = folder / labelled(path.name, _version(wheel, request))
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


def _version(wheel: Wheel, request: Request) -> Version:
    old = wheel.name.version
    return Version(f"{old}{'.' if old.local else '+'}{request.label}")


class _Job:
    """One wheel being rewritten."""

    def __init__(self, view: Buffer, wheel: Wheel, request: Request, work: Path,
                 listener: Listener) -> None:  # fmt: skip
        self._view = view
        self._wheel = wheel
        self._request = request
        self._work = work
        self._listener = listener
        self._edit = SlimEdit(files=("**",), sms=request.sms, licence="", gpu=True, keep_ptx=request.keep_ptx,
                              debug=request.debug)  # fmt: skip
        self._files: list[SlimmedFile] = []
        self._left_alone: dict[str, str] = {}
        self._left_out: dict[str, list[int]] = {}
        self._done, self._total = 0, sum(member.size for member in wheel.members.values())

    def write(self, out: IO[bytes], *, sha256: str, redistributable: bool) -> Ledger:
        with WheelWriter(self._view, self._wheel, _version(self._wheel, self._request), out) as writer:
            for member in writer.members():
                self._write_member(writer, member)
            ledger = Ledger(wheel=self._wheel.filename, sha256=sha256, sms=self._request.sms, files=self._files,
                            keep_ptx=self._request.keep_ptx, redistributable=redistributable,
                            left_out=self._pruned(), left_alone=self._left_alone)  # fmt: skip
            writer.finish(LEDGER, msgspec.json.format(msgspec.json.encode(ledger)))
        return ledger

    def _write_member(self, writer: WheelWriter, member: Member) -> None:
        if cubin := loose_cubin(self._view, member, self._where(member)):
            self._write_cubin(writer, member, cubin)
        elif is_elf(bytes(next(stream(self._view, member, 64, where=self._where(member)), b""))):
            self._write_object(writer, member)
        else:
            writer.copy(member)
        self._done += member.size
        self._listener(Event(step="slim", subject=self._wheel.filename, done=self._done, total=self._total))

    def _write_cubin(self, writer: WheelWriter, member: Member, cubin: Cubin) -> None:
        """As it is, or not at all."""
        if reason := self._edit.why_left_out(member.path, cubin):
            self._left_out.setdefault(reason, []).append(member.size)
        else:
            writer.copy(member)

    def _pruned(self) -> list[PruneChange]:
        (pattern,) = self._edit.files
        return [
            PruneChange(pattern=pattern, reason=reason, files=len(sizes), size=sum(sizes))
            for reason, sizes in self._left_out.items()
        ]

    def _write_object(self, writer: WheelWriter, member: Member) -> None:
        original, smaller = self._work / "object", self._work / "smaller"
        with host_errors(original), original.open("wb") as copy:
            copy.writelines(verified_stream(self._view, self._wheel, member))
        outcome = slim_object(original, smaller, self._where(member), self._edit)
        source = smaller if outcome.changed else original
        with host_errors(source), source.open("rb") as pieces:
            path, row = writer.put(member, iter(lambda: pieces.read(CHUNK), b""))
        if outcome.changed:
            with host_errors(original), original.open("rb") as handle:
                before = hashlib.file_digest(handle, "sha256").hexdigest()
            assert row.sha256 is not None
            assert row.size is not None
            self._files.append(SlimmedFile(path=path, detail=outcome.detail, size=row.size, sha256=row.sha256.hex(),
                                           original_size=member.size, original_sha256=before))  # fmt: skip
        elif outcome.detail:
            self._left_alone[path] = outcome.detail

    def _where(self, member: Member) -> str:
        return f"{self._wheel.filename}: {member.path}"
