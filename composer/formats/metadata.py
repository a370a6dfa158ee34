"""METADATA, a distribution's core metadata: what it requires, and edits of that which touch nothing else.

A file is headers, an empty line, and a body (the description). The headers are split here, and not by
`email.parser`, because an edit must keep every other byte, and because that parser takes a lone carriage return for a
line end, which lets one field smuggle in another. Source: core metadata specifications 2.4, RFC 822 folding.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidName, NormalizedName, canonicalize_name
from packaging.version import InvalidVersion, Version

from composer.errors import RecipeError, WheelError

__all__ = [
    "AppliedEdit",
    "DropRequirement",
    "Edit",
    "ReplaceRequirement",
    "edit_requires",
    "headers",
    "name_and_version",
    "requires_dist",
]

_REQUIRES = "requires-dist"
_MAX_HEADER_LINES = 20_000  # a licence folded into a header has hundreds
_NAME = re.compile(rb"([!-9;-~]+):")
_CONTROL = re.compile(rb"[\x00-\x08\x0b\r\x0e-\x1f\x7f]")  # tab and form feed occur in real licence texts


@dataclass(frozen=True, slots=True, kw_only=True)
class DropRequirement:
    """Remove every Requires-Dist of the project `name`, for a `reason` that goes into the manifest."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaceRequirement:
    """Put `to`, a PEP 508 requirement, in place of every Requires-Dist of the project `name`.

    Where `to` has no environment marker, a replaced line keeps its own: what only an extra asked for stays so.
    """

    name: str
    to: str
    reason: str


Edit: TypeAlias = DropRequirement | ReplaceRequirement


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedEdit:
    """An edit and the requirements that it found, as they were written; none means that it did nothing."""

    edit: Edit
    matched: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Field:
    """One header: lower-case name, unfolded value, and its bytes with their line ends."""

    name: str
    value: str
    raw: bytes


def headers(data: bytes, where: str = "METADATA") -> tuple[tuple[str, str], ...]:
    """Every header as (lower-case name, unfolded value), in the order of the file; also reads a WHEEL file.

    Raises `WheelError` for bytes that are not UTF-8, a line that is no header, and control characters.
    """
    fields, _ = _split(data, where)
    return tuple((field.name, field.value) for field in fields)


def name_and_version(metadata: bytes) -> tuple[NormalizedName, Version]:
    """The normalised name and the version; raises `WheelError` unless each is there exactly once and valid."""
    fields = headers(metadata)
    try:
        return canonicalize_name(_single(fields, "name"), validate=True), Version(_single(fields, "version"))
    except (InvalidName, InvalidVersion) as fault:
        raise WheelError("the name or version is not valid", where="METADATA", why=str(fault)) from fault


def requires_dist(metadata: bytes) -> tuple[Requirement, ...]:
    """Every Requires-Dist in the order of the file; raises `WheelError` for one that PEP 508 does not allow."""
    return tuple(_requirement(value) for name, value in headers(metadata) if name == _REQUIRES)


def edit_requires(metadata: bytes, edits: Sequence[Edit]) -> tuple[bytes, tuple[AppliedEdit, ...]]:
    """Apply `edits` to the Requires-Dist headers and keep every other byte; a second application changes nothing.

    The result has one `AppliedEdit` for each edit, in their order. Raises `WheelError` for metadata that is malformed
    and `RecipeError` for an edit that is, or for two edits that meet in one project.
    """
    by_name = _index(edits)
    fields, body = _split(metadata, "METADATA")
    matched: dict[NormalizedName, list[str]] = {name: [] for name in by_name}
    kept: list[bytes] = []
    for field in fields:
        name = canonicalize_name(_requirement(field.value).name) if field.name == _REQUIRES else None
        if name is None or name not in by_name:
            kept.append(field.raw)
            continue
        matched[name].append(field.value)
        kept.append(_apply(by_name[name], field))
    applied = (AppliedEdit(edit=edit, matched=tuple(matched[name])) for name, edit in by_name.items())
    return b"".join(kept) + body, tuple(applied)


def _index(edits: Iterable[Edit]) -> dict[NormalizedName, Edit]:
    """The edits by normalised name, once it is sure that their order does not matter."""
    by_name: dict[NormalizedName, Edit] = {}
    for edit in edits:
        name = _edit_name(edit.name)
        if name in by_name:
            raise RecipeError(f"two edits of the requirement {name!r}", fix="Keep one of them.")
        by_name[name] = edit
    for name, edit in by_name.items():
        target = canonicalize_name(_edit_target(edit).name) if isinstance(edit, ReplaceRequirement) else name
        if target != name and target in by_name:
            raise RecipeError(f"the requirement {name!r} is replaced by {target!r}, which another edit changes")
    return by_name


def _edit_name(name: str) -> NormalizedName:
    try:
        return canonicalize_name(name, validate=True)
    except InvalidName as fault:
        raise RecipeError(f"{name!r} is not the name of a project") from fault


def _edit_target(edit: ReplaceRequirement) -> Requirement:
    # The text is written as it is, so it has to be one line: packaging takes a newline for white space.
    if not edit.to.isprintable():
        raise RecipeError(f"{edit.to!r} has a line break or a control character")
    try:
        return Requirement(edit.to)
    except InvalidRequirement as fault:
        raise RecipeError(f"{edit.to!r} is not a requirement", why=str(fault)) from fault


def _apply(edit: Edit, field: _Field) -> bytes:
    """The bytes that replace `field`."""
    if isinstance(edit, DropRequirement):
        return b""
    old, new = _requirement(field.value), _edit_target(edit)
    text = edit.to.strip()
    if new.marker is None and old.marker is not None:
        # A direct reference needs white space before the semicolon (PEP 508).
        text = f"{text} ; {old.marker}"
    if Requirement(text) == old:
        return field.raw
    head, _, _ = field.raw.partition(b":")
    return head + b": " + text.encode() + (b"\r\n" if field.raw.endswith(b"\r\n") else b"\n")


def _requirement(value: str) -> Requirement:
    try:
        return Requirement(value)
    except InvalidRequirement as fault:
        raise WheelError(f"Requires-Dist {value!r:.200} is malformed", where="METADATA", why=str(fault)) from fault


def _single(fields: Iterable[tuple[str, str]], name: str) -> str:
    values = [value for found, value in fields if found == name]
    if len(values) != 1:
        raise WheelError(f"{len(values)} headers {name.title()!r} instead of one", where="METADATA")
    return values[0]


def _split(data: bytes, where: str) -> tuple[list[_Field], bytes]:
    """The headers, and everything from the empty line on."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as fault:
        raise WheelError("not UTF-8", where=where, why=str(fault)) from fault
    groups: list[list[bytes]] = []
    size = 0
    for number, line in enumerate(_lines(data)):
        if line in (b"\n", b"\r\n"):
            break
        if number == _MAX_HEADER_LINES:
            raise WheelError(f"more than {number} lines of headers", where=where)
        size += len(line)
        if line[:1] in (b" ", b"\t") and groups:
            groups[-1].append(line)
        else:
            groups.append([line])
    return [_field(group, where) for group in groups], data[size:]


def _lines(data: bytes) -> Iterable[bytes]:
    """Physical lines with their line ends; only LF ends one."""
    start = 0
    while start < len(data):
        end = data.find(b"\n", start) + 1 or len(data)
        yield data[start:end]
        start = end


def _field(lines: Sequence[bytes], where: str) -> _Field:
    name = _NAME.match(lines[0])
    if name is None:
        raise WheelError(f"{lines[0]!r:.200} is not a header", where=where)
    bare = [line.removesuffix(b"\n").removesuffix(b"\r") for line in lines]
    if any(_CONTROL.search(line) for line in bare):
        raise WheelError(f"a control character in {name[0].decode()!r}", where=where)
    bare[0] = bare[0][name.end() :]
    value = " ".join(line.decode().strip() for line in bare)
    return _Field(name=name[1].decode().lower(), value=value.strip(), raw=b"".join(lines))
