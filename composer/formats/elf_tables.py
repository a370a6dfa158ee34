"""The header tables of an ELF64 little-endian shared object, field by field, as an edit of the file needs them.

`elf` reads what the loader reads; this reads what has to be rewritten when bytes leave a file: every program header and
every section header. Sources: System V gABI chapters 4 and 5; the psABI supplements for x86-64 and AArch64 (page size).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from composer.errors import ElfError
from composer.formats.elf import Readable, is_elf

HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
SEGMENT = struct.Struct("<2I6Q")
SECTION = struct.Struct("<2I4Q2I2Q")

#: Elf64_Sym, for tables of up to millions of rows.
SYMBOL = np.dtype(
    [("name", "<u4"), ("info", "u1"), ("other", "u1"), ("section", "<u2"), ("value", "<u8"), ("size", "<u8")]
)

PT_LOAD, PT_INTERP, PT_PHDR = 1, 3, 6
SHT_PROGBITS, SHT_SYMTAB, SHT_STRTAB, SHT_RELA, SHT_NOBITS, SHT_REL, SHT_DYNSYM = 1, 2, 3, 4, 8, 9, 11
SHF_ALLOC, SHF_INFO_LINK = 2, 0x40
SHN_LORESERVE, SHN_XINDEX = 0xFF00, 0xFFFF

_CLASS_64, _LITTLE_ENDIAN, _ET_DYN = 2, 1, 3
# The largest page size that the psABI allows for: an object has to load on a kernel that uses it.
_PAGES = {62: 4096, 183: 65536}


class Header(NamedTuple):
    """The fields of Elf64_Ehdr, in their order."""

    ident: bytes
    kind: int
    machine: int
    version: int
    entry: int
    segments_at: int
    sections_at: int
    flags: int
    size: int
    segment_size: int
    segments: int
    section_size: int
    sections: int
    names: int


class Segment(NamedTuple):
    """The fields of Elf64_Phdr, in their order."""

    kind: int
    flags: int
    offset: int
    address: int
    physical: int
    filesz: int
    memsz: int
    align: int

    @property
    def end(self) -> int:
        """The file offset behind its bytes."""
        return self.offset + self.filesz


class Section(NamedTuple):
    """The fields of Elf64_Shdr, in their order."""

    name: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    align: int
    entry_size: int

    @property
    def end(self) -> int:
        """The file offset behind its bytes; its own offset when it has none in the file."""
        return self.offset + (0 if self.kind == SHT_NOBITS else self.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """Both tables of one object; `page` is the page size, in bytes, that it must be able to load with."""

    header: Header
    segments: tuple[Segment, ...]
    sections: tuple[Section, ...]
    page: int

    @property
    def loads(self) -> tuple[Segment, ...]:
        """The PT_LOAD segments."""
        return tuple(segment for segment in self.segments if segment.kind == PT_LOAD)


def read_tables(buffer: Readable, where: str) -> Tables:
    """Both tables of an x86-64 or AArch64 shared object; `where` names it in errors.

    Raises ElfError for another kind of object, and for a table or a part of one that lies outside the file.
    """
    size = len(buffer)
    header = _header(buffer, where)
    return Tables(
        header=header,
        segments=tuple(
            Segment._make(row) for row in _rows(buffer, SEGMENT, header.segments_at, header.segments, size, where)
        ),
        sections=_sections(buffer, header, size, where),
        page=_PAGES[header.machine],
    )


def _fault(what: str, where: str, why: str | None = None) -> ElfError:
    return ElfError(what, where=where, why=why, fix="Leave this file as it is.")


def _header(buffer: Readable, where: str) -> Header:
    data = bytes(buffer[: HEADER.size])
    if len(data) < HEADER.size or not is_elf(data):
        raise _fault("not an ELF object", where)
    header = Header._make(HEADER.unpack(data))
    if header.ident[4] != _CLASS_64 or header.ident[5] != _LITTLE_ENDIAN or header.machine not in _PAGES:
        raise _fault("not an ELF64 little-endian object for x86-64 or AArch64", where, f"machine {header.machine}")
    if header.kind != _ET_DYN:
        raise _fault("not a shared object", where, f"e_type {header.kind}")
    if header.segment_size != SEGMENT.size or not 0 < header.segments < 0xFFFF:
        raise _fault("no readable program header table", where)
    if header.sections and (header.section_size != SECTION.size or header.names >= header.sections):
        raise _fault("no readable section header table", where)
    if header.sections >= SHN_LORESERVE or (header.sections_at and not header.sections):
        raise _fault("too many sections to number them in 16 bits", where)
    return header


def _rows(
    buffer: Readable, layout: struct.Struct, start: int, count: int, size: int, where: str
) -> list[tuple[int, ...]]:
    end = start + count * layout.size
    if end > size:
        raise _fault("a header table lies outside the file", where, f"it ends at {end}, the file has {size} bytes")
    return list(layout.iter_unpack(bytes(buffer[start:end])))


def _sections(buffer: Readable, header: Header, size: int, where: str) -> tuple[Section, ...]:
    rows = _rows(buffer, SECTION, header.sections_at, header.sections, size, where)
    sections = tuple(Section._make(row) for row in rows)
    for number, section in enumerate(sections):
        if section.end > size:
            raise _fault("a section lies outside the file", where, f"section {number} ends at {section.end} of {size}")
    return sections
