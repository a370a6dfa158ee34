"""A strict reader of ZIP archives, without a copy of what is stored in them.

The standard library's reader is lenient by design: it accepts prefixes, trailing bytes, overlapping members and local
headers that contradict the directory, and two readers then see two different archives. This one accepts an archive
only when there is one way to read it: members lie back to back from the first byte to the central directory, which is
followed by the end record and nothing else. Source: APPNOTE.TXT 6.3.10 (PKWARE), sections 4.3 to 4.5.
"""

from __future__ import annotations

import re
import struct
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from isal import isal_zlib

from composer.errors import WheelError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["CHUNK", "Member", "read", "read_members", "stream", "view_of"]

CHUNK = 1 << 18
"""Bytes of output per step: large enough to amortise a call, small enough to stay in a core's L2 cache for hashing."""

_FEED = 1 << 16  # compressed bytes per step; what one step leaves over is copied, so it is kept small

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_FIELD = struct.Struct("<2H")

_MAX16, _MAX32 = 0xFFFF, 0xFFFFFFFF
_STORED, _DEFLATED = 0, 8
_ENCRYPTED, _DESCRIPTOR, _UTF8 = 0x1, 0x8, 0x800
_KNOWN_FLAGS = 0x6 | _DESCRIPTOR | _UTF8  # bits 1 and 2 tell how hard the deflater tried
_ZIP64_FIELD, _UNICODE_PATH_FIELD = 0x0001, 0x7075
_INFLATE_ERROR = cast("type[Exception]", isal_zlib.error)  # typed as an instance upstream
_DESCRIPTOR_MAGIC = b"PK\x07\x08"

_MAX_ENTRIES = 100_000
_MAX_PATH, _MAX_COMPONENT = 4096, 255  # Linux: PATH_MAX and NAME_MAX, bytes
_MAX_RATIO, _RATIO_MATTERS = 1000, 64 << 20  # deflate reaches 1032:1; small files may


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One entry of an archive; a folder's path ends with a slash.

    `mode` is 0o755 if any execute bit was set and 0o644 otherwise, `method` is 0 (stored) or 8 (deflated), sizes and
    `data_offset`, the position of the payload in the archive, are in bytes.
    """

    path: str
    mode: int
    method: int
    crc32: int
    size: int
    compressed_size: int
    data_offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """One row of the central directory."""

    raw_name: bytes
    path: str
    flags: int
    method: int
    crc32: int
    compressed_size: int
    size: int
    attributes: int
    offset: int
    disk: int
    fields: Mapping[int, bytes]  # the extra ones


@dataclass(frozen=True, slots=True, kw_only=True)
class _Archive:
    """The bytes of an archive and the name under which its faults are reported."""

    view: memoryview
    where: str

    def fault(self, what: str) -> WheelError:
        return WheelError(what, where=self.where)

    def unpack(self, layout: struct.Struct, offset: int, magic: bytes, what: str) -> tuple[int, ...]:
        """The integers of the structure at `offset` that starts with `magic`."""
        if offset < 0 or offset + layout.size > len(self.view):
            raise self.fault(f"truncated: no room for the {what} at byte {offset}")
        found, *values = layout.unpack_from(self.view, offset)
        if found != magic:
            raise self.fault(f"no {what} at byte {offset}")
        return tuple(values)

    def take(self, offset: int, size: int, what: str) -> bytes:
        if offset + size > len(self.view):
            raise self.fault(f"truncated: no room for the {what} at byte {offset}")
        return bytes(self.view[offset : offset + size])


def view_of(buffer: Buffer) -> memoryview:
    """A flat, read-only view of any buffer: bytes, an mmap, another view."""
    return memoryview(buffer).cast("B").toreadonly()


def read_members(buffer: Buffer, where: str) -> tuple[tuple[Member, ...], tuple[str, ...]]:
    """Every entry of an archive in the order of its directory, and the faults of single entries.

    An archive whose structure cannot be followed raises `WheelError`; a fault that leaves the rest readable (an unsafe
    path, a link, an encrypted member) is returned, so that a caller can report it together with others. No payload is
    inflated.
    """
    with view_of(buffer) as view:
        archive = _Archive(view=view, where=where)
        start, size, count = _directory(archive)
        entries = _entries(archive, start, size, count)
        faults = tuple(fault for entry in entries for rule in _ENTRY_RULES if (fault := rule(entry)))
        offsets = _payload_offsets(archive, entries, start)
    members = tuple(_member(entry, offset) for entry, offset in zip(entries, offsets, strict=True))
    return members, faults


def _member(entry: _Entry, data_offset: int) -> Member:
    return Member(
        path=entry.path,
        mode=0o755 if entry.attributes >> 16 & 0o111 else 0o644,
        method=entry.method,
        crc32=entry.crc32,
        size=entry.size,
        compressed_size=entry.compressed_size,
        data_offset=data_offset,
    )


# The central directory


def _directory(archive: _Archive) -> tuple[int, int, int]:
    """Start, size (bytes) and number of rows of the central directory."""
    end = len(archive.view) - _END.size
    *disks, count, size, start, comment = archive.unpack(
        _END, end, b"PK\x05\x06", "end record (the file is truncated, or bytes follow its end)"
    )
    values = (*disks, count, size, start)
    located = end - _END64_LOCATOR.size
    if located >= 0 and bytes(archive.view[located : located + 4]) == b"PK\x06\x07":
        end, values = _end64(archive, located, values)
    this_disk, first_disk, here, count, size, start = values
    if this_disk or first_disk or here != count or comment:
        raise archive.fault("the end record tells of several disks or of a comment")
    if start + size != end:
        raise archive.fault("the directory does not end where the end record begins: bytes were added or lost")
    if count > _MAX_ENTRIES:
        raise archive.fault(f"{count} entries, more than {_MAX_ENTRIES}")
    return start, size, count


def _end64(archive: _Archive, located: int, short: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Position and values of the ZIP64 end record, which must not contradict the `short` one (APPNOTE 4.3.14)."""
    disk, position, disks = archive.unpack(_END64_LOCATOR, located, b"PK\x06\x07", "ZIP64 locator")
    length, _, _, *values = archive.unpack(_END64, position, b"PK\x06\x06", "ZIP64 end record")
    if disk or disks > 1 or length != _END64.size - 12 or position + _END64.size != located:
        raise archive.fault("the ZIP64 end record is not where and what its locator tells")
    limits = (_MAX16, _MAX16, _MAX16, _MAX16, _MAX32, _MAX32)
    if any(old not in (new, limit) for old, new, limit in zip(short, values, limits, strict=True)):
        raise archive.fault("the ZIP64 end record contradicts the end record")
    return position, tuple(values)


def _entries(archive: _Archive, start: int, size: int, count: int) -> tuple[_Entry, ...]:
    entries = []
    position = start
    for _ in range(count):
        entry, position = _entry(archive, position)
        entries.append(entry)
    if position != start + size:
        raise archive.fault(f"the directory holds more or less than its {count} rows")
    return tuple(entries)


def _entry(archive: _Archive, position: int) -> tuple[_Entry, int]:
    """The directory row at `position`, and the position after it."""
    values = archive.unpack(_CENTRAL, position, b"PK\x01\x02", "directory row")
    _, _, flags, method, _, _, crc32, packed, size, name_size, extra_size, comment_size, disk, _, attributes, offset = (
        values
    )
    position += _CENTRAL.size
    raw_name = archive.take(position, name_size, "name of a member")
    fields = _extra_fields(archive, archive.take(position + name_size, extra_size, "extra fields of a member"))
    size, packed, offset = _widen(archive, fields, (size, packed, offset))
    entry = _Entry(
        raw_name=raw_name,
        path=raw_name.decode("utf-8", "backslashreplace"),
        flags=flags,
        method=method,
        crc32=crc32,
        compressed_size=packed,
        size=size,
        attributes=attributes,
        offset=offset,
        disk=disk,
        fields=fields,
    )
    return entry, position + name_size + extra_size + comment_size


def _extra_fields(archive: _Archive, extra: bytes) -> dict[int, bytes]:
    fields: dict[int, bytes] = {}
    position = 0
    while position < len(extra):
        if position + _FIELD.size > len(extra):
            raise archive.fault("malformed extra fields")
        tag, size = _FIELD.unpack_from(extra, position)
        position += _FIELD.size
        if position + size > len(extra) or tag in fields:
            raise archive.fault("malformed extra fields")
        fields[tag] = extra[position : position + size]
        position += size
    return fields


def _widen(archive: _Archive, fields: Mapping[int, bytes], values: tuple[int, ...]) -> tuple[int, ...]:
    """32-bit `values` with each saturated one replaced by its 64-bit value from the ZIP64 field (APPNOTE 4.5.3)."""
    wide = fields.get(_ZIP64_FIELD, b"")
    saturated = sum(value == _MAX32 for value in values)
    if len(wide) < 8 * saturated:
        raise archive.fault("a member's ZIP64 field is missing or too short")
    spare = iter(struct.unpack_from(f"<{saturated}Q", wide))
    return tuple(next(spare) if value == _MAX32 else value for value in values)


# Local headers


def _payload_offsets(archive: _Archive, entries: tuple[_Entry, ...], end: int) -> list[int]:
    """Where each entry's payload begins, once it is proven that the members fill the bytes before the directory."""
    order = sorted(range(len(entries)), key=lambda index: entries[index].offset)
    starts = [entries[index].offset for index in order]
    if [*starts, end][0] != 0:
        raise archive.fault("bytes before the first member")
    offsets = [0] * len(entries)
    for index, follower in zip(order, [*starts[1:], end], strict=True):
        offsets[index] = _payload_offset(archive, entries[index], follower)
    return offsets


def _payload_offset(archive: _Archive, entry: _Entry, follower: int) -> int:
    """Where the payload of `entry` begins; what follows it must end at `follower`, the next member or the directory."""
    _, flags, method, _, _, crc32, packed, size, name_size, extra_size = archive.unpack(
        _LOCAL, entry.offset, b"PK\x03\x04", "member"
    )
    begin = entry.offset + _LOCAL.size
    name = archive.take(begin, name_size, "name of a member")
    fields = _extra_fields(archive, archive.take(begin + name_size, extra_size, "extra fields of a member"))
    size, packed = _widen(archive, fields, (size, packed))
    expected = (entry.crc32, entry.compressed_size, entry.size)
    # With a descriptor the writer did not know these yet and may have left zeros.
    agreed = all(
        here == there or (flags & _DESCRIPTOR and here == 0)
        for here, there in zip((crc32, packed, size), expected, strict=True)
    )
    if not agreed or (name, flags, method) != (entry.raw_name, entry.flags, entry.method):
        raise archive.fault(f"the local header of {entry.path!r} contradicts the directory")
    begin += name_size + extra_size
    finish = begin + entry.compressed_size
    if finish > follower or bytes(archive.view[finish:follower][:25]) not in _tails(entry):
        raise archive.fault(f"{entry.path!r} overlaps what follows it, or bytes lie between them")
    return begin


def _tails(entry: _Entry) -> tuple[bytes, ...]:
    """What may follow a payload: nothing, or a data descriptor in one of its four forms (APPNOTE 4.3.9)."""
    if not entry.flags & _DESCRIPTOR:
        return (b"",)
    values = (entry.crc32, entry.compressed_size, entry.size)
    layouts = ("<LQQ",) if max(values) > _MAX32 else ("<LLL", "<LQQ")
    bare = tuple(struct.pack(layout, *values) for layout in layouts)
    return (*bare, *(_DESCRIPTOR_MAGIC + form for form in bare))


# Rules for one entry: each returns what is wrong, or None


def _rule_disk(entry: _Entry) -> str | None:
    return f"{entry.path!r} lies on another disk" if entry.disk else None


def _rule_flags(entry: _Entry) -> str | None:
    if entry.flags & _ENCRYPTED:
        return f"{entry.path!r} is encrypted"
    unknown = entry.flags & ~_KNOWN_FLAGS
    return f"{entry.path!r} sets the flags {unknown:#06x}" if unknown else None


def _rule_method(entry: _Entry) -> str | None:
    if entry.method not in (_STORED, _DEFLATED):
        return f"{entry.path!r} is compressed by method {entry.method}, neither stored nor deflated"
    if entry.method == _STORED and entry.size != entry.compressed_size:
        return f"{entry.path!r} is stored, but its two sizes differ"
    return None


def _rule_kind(entry: _Entry) -> str | None:
    """Regular files and folders only (the upper half of the attributes is `st_mode`, or zero)."""
    mode = entry.attributes >> 16
    folder = entry.path.endswith("/")
    if mode & 0o170000 not in (0, 0o040000 if folder else 0o100000):
        return f"{entry.path!r} is a link, a device or another special file (mode {mode:#o})"
    if mode & 0o7000:
        return f"{entry.path!r} has a setuid, setgid or sticky bit (mode {mode:#o})"
    return f"{entry.path!r} is a folder with content" if folder and entry.size else None


def _rule_ratio(entry: _Entry) -> str | None:
    if entry.size > _RATIO_MATTERS and entry.size > _MAX_RATIO * entry.compressed_size:
        return f"{entry.path!r} inflates {entry.compressed_size} bytes to {entry.size}, more than {_MAX_RATIO} times"
    return None


def _rule_encoding(entry: _Entry) -> str | None:
    """A name is ASCII, or UTF-8 and says so; a second name in an extra field would make two readers disagree."""
    try:
        entry.raw_name.decode("utf-8" if entry.flags & _UTF8 else "ascii")
    except UnicodeDecodeError:
        return f"name {entry.raw_name!r} is neither ASCII nor marked UTF-8"
    return f"{entry.path!r} has a second name" if _UNICODE_PATH_FIELD in entry.fields else None


def _rule_characters(entry: _Entry) -> str | None:
    """No control or format character (newline, escape, NUL, bidirectional override), no line or paragraph separator."""
    if any(unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp") for character in entry.path):
        return f"path {entry.path!r} has a control character"
    return f"path {entry.path!r} has a backslash" if "\\" in entry.path else None


def _rule_relative(entry: _Entry) -> str | None:
    if entry.path.startswith("/") or re.match(r"[A-Za-z]:", entry.path):
        return f"path {entry.path!r} is absolute"
    steps = entry.path.removesuffix("/").split("/")
    if not {"", ".", ".."}.isdisjoint(steps):
        return f"path {entry.path!r} has an empty, '.' or '..' component"
    return None


def _rule_length(entry: _Entry) -> str | None:
    longest = max(map(len, entry.raw_name.split(b"/")))
    if len(entry.raw_name) > _MAX_PATH or longest > _MAX_COMPONENT:
        return f"path {entry.path[:80]!r}... is longer than {_MAX_PATH} bytes, or a component than {_MAX_COMPONENT}"
    return None


_ENTRY_RULES: tuple[Callable[[_Entry], str | None], ...] = (
    _rule_disk,
    _rule_flags,
    _rule_method,
    _rule_kind,
    _rule_ratio,
    _rule_encoding,
    _rule_characters,
    _rule_relative,
    _rule_length,
)


# Payloads


def stream(
    buffer: Buffer, member: Member, chunk: int = CHUNK, *, where: str | None = None
) -> Iterator[bytes | memoryview]:
    """The content of `member` in pieces of at most `chunk` bytes, never more than its declared size.

    Stored content is not copied: the pieces are views of `buffer`. Raises `WheelError`, at the latest after the last
    piece, when the payload does not inflate, or to another size or CRC-32 than declared, or is followed by more input.
    `where` names the member in the error (default: its path).
    """
    where = where or member.path
    with view_of(buffer) as view:
        finish = member.data_offset + member.compressed_size
        if finish > len(view):
            raise WheelError("truncated", where=where)
        payload = view[member.data_offset : finish]
        pieces = _slices(payload, chunk) if member.method == _STORED else _inflate(payload, member.size, chunk, where)
        crc32 = 0
        for piece in pieces:
            crc32 = isal_zlib.crc32(piece, crc32)
            yield piece
        if crc32 != member.crc32:
            raise WheelError("content does not have the declared CRC-32", where=where)


def read(buffer: Buffer, member: Member, *, where: str | None = None) -> bytes:
    """The whole content of a small `member`; raises as `stream` does."""
    return b"".join(stream(buffer, member, where=where))


def _slices(payload: memoryview, step: int) -> Iterator[memoryview]:
    return (payload[position : position + step] for position in range(0, len(payload), step))


def _inflate(payload: memoryview, size: int, chunk: int, where: str) -> Iterator[bytes]:
    """Inflate a raw deflate stream that must fill `payload` and give `size` bytes, both exactly."""
    inflater = isal_zlib.decompressobj(wbits=-15)
    feed = _slices(payload, _FEED)
    left = size
    rest: bytes | memoryview = b""
    while not inflater.eof:
        fresh = rest or next(feed, b"")
        # Asking for one byte past the end tells a longer content from one that is complete.
        try:
            piece = inflater.decompress(fresh, min(chunk, left) or 1)
        except _INFLATE_ERROR as fault:
            raise WheelError("content is not a deflate stream", where=where, why=str(fault)) from fault
        rest = inflater.unconsumed_tail
        if len(piece) > left:
            raise WheelError(f"content is longer than the declared {size} bytes", where=where)
        if not piece and not fresh:
            raise WheelError("content ends in the middle of its deflate stream", where=where)
        left -= len(piece)
        if piece:
            yield piece
    if left or rest or inflater.unused_data or next(feed, None) is not None:
        raise WheelError(f"content is shorter than the declared {size} bytes, or followed by more input", where=where)
