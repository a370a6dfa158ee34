"""A strict reader of wheels: one way to read each, every file proven against RECORD, nothing unpacked.

Stricter than installers on purpose: real wheels pass (measured on the closure of a whole serving stack), and what does
not is refused before a byte of it reaches a bundle. Sources: the binary distribution format (PEP 427), core metadata,
entry points; numbers and limits are those of `composer.formats.zip`.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING

from packaging.tags import InvalidTag, Tag, parse_tag
from packaging.utils import (
    BuildTag,
    InvalidWheelFilename,
    NormalizedName,
    canonicalize_name,
    parse_wheel_filename,
)
from packaging.version import InvalidVersion, Version

from composer.errors import WheelError
from composer.formats.entry_points import EntryPoint, parse_entry_points
from composer.formats.metadata import headers, name_and_version, requires_dist
from composer.formats.record import RecordRow, parse_record
from composer.formats.zip import CHUNK, Member, read, read_members, stream

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "EntryPoint",
    "Member",
    "RecordRow",
    "Wheel",
    "WheelName",
    "entry_points",
    "install_path",
    "parse_wheel_name",
    "read",
    "read_wheel",
    "stream",
    "verified_stream",
]

_SCHEMES = ("purelib", "platlib", "scripts", "data", "headers")
_SIGNATURES = ("RECORD", "RECORD.jws", "RECORD.p7s")  # cannot hold their own digests
_TEXTS = {"RECORD": 32 << 20, "METADATA": 4 << 20, "WHEEL": 1 << 20, "entry_points.txt": 1 << 20}  # most bytes of each
_MAX_FAULTS = 20
_SPECIFICATION = "https://packaging.python.org/en/latest/specifications/binary-distribution-format/"


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelName:
    """What the file name of a wheel says."""

    name: NormalizedName
    version: Version
    build: BuildTag
    tags: frozenset[Tag]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """A wheel whose structure holds; the contents of its members are proven as `verified_stream` reads them.

    `members` are the files (no folders) in the order of the archive, `record` the rows of RECORD, `dist_info` the name
    of that folder, `pth_files` the members that Python would read as `.pth` at every start, `warnings` what deserves a
    look but breaks nothing.
    """

    filename: str
    name: WheelName
    dist_info: str
    members: Mapping[str, Member]
    record: Mapping[str, RecordRow]
    metadata: bytes
    entry_points_txt: bytes
    pth_files: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def tags(self) -> frozenset[Tag]:
        """The platforms it runs on, by its file name, which is what a resolver chose it by."""
        return self.name.tags


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """A wheel whose archive can be read, before the rules below have judged it."""

    name: WheelName
    entries: Sequence[Member]  # folders too
    files: Mapping[str, Member]
    dist_info: str | None
    texts: Mapping[str, bytes]  # those of _TEXTS that are there and can be read
    record: Mapping[str, RecordRow] | None

    def landing(self, path: str) -> str:
        return _landing(path, self.dist_info or "", self.name.name, "3")


def parse_wheel_name(filename: str) -> WheelName:
    """Name, version, build tag and platform tags from the file name of a wheel; raises `WheelError`."""
    try:
        name, version, build, tags = parse_wheel_filename(filename)
    except (InvalidWheelFilename, InvalidVersion, InvalidTag) as fault:
        raise WheelError(
            "not the file name of a wheel", where=repr(filename), why=str(fault), reference=_SPECIFICATION
        ) from fault
    return WheelName(name=name, version=version, build=build, tags=tags)


def read_wheel(buffer: Buffer, filename: str) -> Wheel:
    """Prove the structure of a wheel and read its metadata; no payload outside `.dist-info` is inflated.

    Raises one `WheelError` that lists the faults: those of the ZIP structure if it cannot be followed, else all others.
    """
    name = parse_wheel_name(filename)
    entries, found = read_members(buffer, filename)
    faults = list(found)
    draft = _draft(buffer, name, entries, faults)
    faults += [fault for rule in _RULES for fault in rule(draft)]
    _refuse(filename, faults)
    # The rules refuse a wheel without these two.
    assert draft.dist_info is not None
    assert draft.record is not None
    return Wheel(
        filename=filename,
        name=name,
        dist_info=draft.dist_info,
        members=MappingProxyType(draft.files),
        record=MappingProxyType(draft.record),
        metadata=draft.texts["METADATA"],
        entry_points_txt=draft.texts.get("entry_points.txt", b""),
        pth_files=tuple(path for path in draft.files if _is_pth(draft.landing(path))),
        warnings=tuple(_warnings(draft)),
    )


def entry_points(wheel: Wheel) -> tuple[EntryPoint, ...]:
    """The entry points of a wheel, none if it has no such file."""
    return parse_entry_points(wheel.entry_points_txt)


def verified_stream(buffer: Buffer, wheel: Wheel, member: Member, chunk: int = CHUNK) -> Iterator[bytes | memoryview]:
    """`stream`, and after the last piece a `WheelError` if the content has not the digest that RECORD gives.

    RECORD and its signatures have no digest there and are streamed as they are.
    """
    where = f"{wheel.filename}: {member.path}"
    row = wheel.record.get(member.path)
    algorithm, expected = (row.digest if row is not None else None) or ("sha256", None)
    digest = hashlib.new(algorithm)
    for piece in stream(buffer, member, chunk, where=where):
        digest.update(piece)
        yield piece
    if expected != digest.digest() and member.path not in _exempt(wheel.dist_info):
        raise WheelError("content does not have the digest in RECORD", where=where)


def install_path(wheel: Wheel, member_path: str, python: str = "3.12") -> str:
    """Where a member lands relative to the prefix of a POSIX installation of `python` (major.minor).

    `posix_prefix` of sysconfig: pure and platform libraries share site-packages, headers go to a folder of the
    distribution's normalised name.
    """
    return _landing(member_path, wheel.dist_info, wheel.name.name, python)


def _landing(path: str, dist_info: str, name: str, python: str) -> str:
    site_packages = f"lib/python{python}/site-packages"
    data, _, rest = path.partition("/")
    if data != _data_folder(dist_info):
        return f"{site_packages}/{path}"
    scheme, _, rest = rest.partition("/")
    folders = {"data": "", "scripts": "bin/", "headers": f"include/python{python}/{name}/"}
    return folders.get(scheme, f"{site_packages}/") + rest


def _data_folder(dist_info: str) -> str:
    return dist_info.removesuffix(".dist-info") + ".data"


def _is_pth(landing: str) -> bool:
    return landing.startswith("lib/") and landing.endswith(".pth") and landing.count("/") == 3


def _exempt(dist_info: str) -> tuple[str, ...]:
    return tuple(f"{dist_info}/{name}" for name in _SIGNATURES)


def _refuse(filename: str, faults: Sequence[str]) -> None:
    """Raise one error for all faults, which lists the first ones of very many."""
    hidden = len(faults) - _MAX_FAULTS
    listed = [*faults[:_MAX_FAULTS], *([f"{hidden} more faults"] if hidden > 0 else [])]
    WheelError.collect([WheelError(fault, where=filename, reference=_SPECIFICATION) for fault in listed])


# What the rules judge


def _draft(buffer: Buffer, name: WheelName, entries: Sequence[Member], faults: list[str]) -> _Draft:
    files = {member.path: member for member in entries if not member.path.endswith("/")}
    dist_info = _find_dist_info(files, name)
    texts = {}
    for text in _TEXTS:
        member = files.get(f"{dist_info}/{text}")
        try:
            if member is not None:
                texts[text] = _read_text(buffer, member, _TEXTS[text])
        except WheelError as fault:
            faults.append(str(fault))
    record = None
    try:
        record = parse_record(texts["RECORD"]) if "RECORD" in texts else None
    except WheelError as fault:
        faults.append(str(fault))
    return _Draft(name=name, entries=entries, files=files, dist_info=dist_info, texts=texts, record=record)


def _find_dist_info(files: Mapping[str, Member], name: WheelName) -> str | None:
    """The `.dist-info` folder that belongs to the file name, else any, so that other rules can go on."""
    tops = dict.fromkeys(path.partition("/")[0] for path in files if "/" in path)
    folders = [top for top in tops if top.endswith(".dist-info")]
    ours = [folder for folder in folders if _belongs(folder, name)]
    return next(iter(ours or folders), None)


def _belongs(dist_info: str, name: WheelName) -> bool:
    project, _, version = dist_info.removesuffix(".dist-info").rpartition("-")
    try:
        return canonicalize_name(project) == name.name and Version(version) == name.version
    except InvalidVersion:
        return False


def _read_text(buffer: Buffer, member: Member, limit: int) -> bytes:
    if member.size > limit:
        raise WheelError(f"{member.size} bytes, more than {limit}", where=member.path)
    return read(buffer, member)


# Rules for a wheel: each yields what is wrong


def _rule_dist_info(draft: _Draft) -> Iterator[str]:
    """One `.dist-info`, wherever its files come from, named as the wheel is."""
    landed = (draft.landing(path).split("/") for path in draft.files)
    folders = {steps[3] for steps in landed if len(steps) > 4 and steps[0] == "lib" and steps[3].endswith(".dist-info")}
    if len(folders) != 1:
        yield f"{len(folders)} .dist-info folders instead of one: {sorted(folders)!r:.200}"
    for folder in sorted(folders):
        if not _belongs(folder, draft.name):
            yield f"{folder!r} does not belong to the file name"


def _rule_required(draft: _Draft) -> Iterator[str]:
    for text in ("METADATA", "WHEEL", "RECORD"):
        if f"{draft.dist_info}/{text}" not in draft.files:
            yield f"no {text}"


def _rule_data(draft: _Draft) -> Iterator[str]:
    """Installers take any top folder named `.data` for ours, so there is none but ours, with known schemes only."""
    for path in draft.files:
        top, *steps = path.split("/")
        if top.endswith(".data") and (
            top != _data_folder(draft.dist_info or "") or len(steps) < 2 or steps[0] not in _SCHEMES
        ):
            yield f"{path!r} is in no known scheme of the wheel's .data folder"


def _rule_collisions(draft: _Draft) -> Iterator[str]:
    """No two members in one place, also where case or Unicode form does not count, and no file that is a folder."""
    for path, count in Counter(member.path for member in draft.entries).items():
        if count > 1:
            yield f"{path!r} is there {count} times"
    landed = [draft.landing(path) for path in draft.files]
    seen: dict[str, str] = {}
    for path in landed:
        folded = unicodedata.normalize("NFC", unicodedata.normalize("NFD", path).casefold())
        if seen.setdefault(folded, path) != path:
            yield f"{path!r} and {seen[folded]!r} differ only by case or Unicode form"
    for path, count in Counter(landed).items():
        if count > 1:
            yield f"{count} members would be installed as {path!r}"
    yield from _files_as_folders(landed, draft)


def _files_as_folders(landed: Sequence[str], draft: _Draft) -> Iterator[str]:
    """Files among the parents of other members: sorted by component, a folder's content follows it directly."""
    files = set(landed)
    folders = {draft.landing(entry.path.rstrip("/")) for entry in draft.entries if entry.path.endswith("/")}
    ordered = sorted(files | folders, key=lambda path: path.replace("/", "\0"))
    for path, follower in pairwise(ordered):
        if path in files and follower.startswith(f"{path}/"):
            yield f"{path!r} is a file and a folder"
    for path in sorted(files & folders):
        yield f"{path!r} is a file and a folder"


def _rule_record(draft: _Draft) -> Iterator[str]:
    """A row with a digest for every file, and a file for every row."""
    if draft.record is None:
        return
    exempt = _exempt(draft.dist_info or "")
    for path, member in draft.files.items():
        row = draft.record.get(path, RecordRow())
        if path not in exempt and row.digest is None:
            yield f"{path!r} has no digest in RECORD"
        if path not in exempt and row.size not in (None, member.size):
            yield f"{path!r} has {member.size} bytes, and {row.size} in RECORD"
    for path in draft.record:
        if path not in draft.files:
            yield f"RECORD lists {path!r:.200}, which is not there"


def _rule_digests(draft: _Draft) -> Iterator[str]:
    """What this module reads itself is proven here."""
    for text, content in draft.texts.items():
        row = (draft.record or {}).get(f"{draft.dist_info}/{text}")
        if row is None or row.digest is None or text == "RECORD":
            continue
        algorithm, expected = row.digest
        if hashlib.new(algorithm, content).digest() != expected:
            yield f"{text} does not have the digest in RECORD"


def _rule_metadata(draft: _Draft) -> Iterator[str]:
    if "METADATA" not in draft.texts:
        return
    try:
        name, version = name_and_version(draft.texts["METADATA"])
        requires_dist(draft.texts["METADATA"])
    except WheelError as fault:
        yield str(fault)
        return
    if (name, version) != (draft.name.name, draft.name.version):
        yield f"METADATA is of {name} {version}, the file name of {draft.name.name} {draft.name.version}"


def _rule_wheel(draft: _Draft) -> Iterator[str]:
    """Wheel-Version 1.x (a higher minor version may be read with a warning, a higher major one may not)."""
    if "WHEEL" not in draft.texts:
        return
    try:
        fields = headers(draft.texts["WHEEL"], "WHEEL")
    except WheelError as fault:
        yield str(fault)
        return
    versions = [value for name, value in fields if name == "wheel-version"]
    if len(versions) != 1 or versions[0].partition(".")[0] != "1":
        yield f"Wheel-Version {', '.join(versions)!r:.80} instead of 1.x"


def _rule_entry_points(draft: _Draft) -> Iterator[str]:
    try:
        parse_entry_points(draft.texts.get("entry_points.txt", b""))
    except WheelError as fault:
        yield str(fault)


_RULES: tuple[Callable[[_Draft], Iterator[str]], ...] = (
    _rule_dist_info,
    _rule_required,
    _rule_data,
    _rule_collisions,
    _rule_record,
    _rule_digests,
    _rule_metadata,
    _rule_wheel,
    _rule_entry_points,
)


def _warnings(draft: _Draft) -> Iterator[str]:
    """Tags in WHEEL that the file name does not have: seen in real wheels that were retagged by renaming."""
    tags: set[Tag] = set()
    for name, value in headers(draft.texts["WHEEL"], "WHEEL"):
        if name == "tag":
            try:
                tags |= parse_tag(value)
            except (InvalidTag, ValueError):
                yield f"WHEEL has the malformed tag {value!r:.80}"
    if tags != draft.name.tags:
        yield f"WHEEL is tagged {_join(tags)}, the file name {_join(draft.name.tags)}"


def _join(tags: set[Tag] | frozenset[Tag]) -> str:
    return " ".join(sorted(map(str, tags))) or "nothing"
