"""What an object says of libraries that it opens by name: the ELF note of systemd's "dlopen() Metadata for ELF Files".

A loader does not read it, so a note that is damaged says nothing; it is no reason to refuse the object.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

_OWNER, _TYPE = b"FDO\0", 0x407C0C0A
#: Bytes of a segment that are read: a hundred times the longest notes of systemd's own libraries.
MOST = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Dlopen:
    """Something that an object opens by name at run time: the first of `names` (at least one) that can be found.

    required: the object does not work without; why: what it is for, in a few words.
    """

    names: tuple[str, ...]
    required: bool
    why: str


def dlopen_notes(segment: bytes, order: str, align: int) -> tuple[Dlopen, ...]:
    """The entries of the notes in a PT_NOTE segment. order: `<` or `>`; align: the segment's alignment in bytes."""
    return tuple(
        opened for kind, owner, text in _notes(segment, order, 8 if align == 8 else 4)
        if (kind, owner) == (_TYPE, _OWNER) for opened in _entries(text)
    )  # fmt: skip


def _notes(data: bytes, order: str, align: int) -> Iterator[tuple[int, bytes, bytes]]:
    """(type, owner, description) of each note, up to the first that does not fit."""
    head, at = struct.Struct(order + "3I"), 0
    while at + head.size <= len(data):
        name_size, size, kind = head.unpack_from(data, at)
        name = at + head.size
        text = _aligned(name + name_size, align)
        if text + size > len(data):
            return
        yield kind, data[name : name + name_size], data[text : text + size]
        at = _aligned(text + size, align)


def _aligned(offset: int, align: int) -> int:
    return -(-offset // align) * align


def _entries(text: bytes) -> Iterator[Dlopen]:
    try:
        rows = msgspec.json.decode(text.rstrip(b"\0"), type=list[dict[str, Any]])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return
    for row in rows:
        names = _names(row)
        if names:
            why = next((str(row[key]) for key in ("description", "feature") if row.get(key)), "a reason that it keeps")
            yield Dlopen(names=names, required=row.get("priority") == "required", why=why)


def _names(row: Mapping[str, Any]) -> tuple[str, ...]:
    found = row.get("soname")
    return tuple(name for name in found if isinstance(name, str) and name) if isinstance(found, list) else ()
