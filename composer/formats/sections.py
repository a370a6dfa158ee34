"""The section headers of an ELF64 object, which the loader ignores and tools read.

They may be wrong, or gone: whoever edits by them must also prove by other means what the sections hold.
Source: System V gABI, chapter 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from composer.errors import ElfError
from composer.formats.elf import Readable, Reader

PROGBITS, NOBITS, DYNSYM = 1, 8, 11
_HEADER_SIZE = 64
_MOST_NAME = 256
_MOST_OVERLAP = 4


class Section(NamedTuple):
    """One section: name, sh_type, sh_flags; address, file offset, size and alignment in bytes."""

    name: str
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    align: int

    @property
    def allocated(self) -> bool:
        """Whether it is loaded."""
        return bool(self.flags & 2)

    @property
    def executable(self) -> bool:
        """Whether it holds instructions."""
        return bool(self.flags & 4)

    @property
    def end(self) -> int:
        """The file offset behind it; a section that is not in the file ends where it starts."""
        return self.offset + (0 if self.kind == NOBITS else self.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class SectionTable:
    """All sections; the file offset of their headers is `start`, 0 where there are none."""

    start: int
    sections: tuple[Section, ...]

    def named(self, name: str) -> tuple[Section, ...]:
        """Those of one name."""
        return tuple(section for section in self.sections if section.name == name)


def read_sections(buffer: Readable, where: str) -> SectionTable:
    """The section headers of an ELF64 object.

    ElfError for a table, a name or a section outside the file, and for sections that lie on top of each other so often
    that reading all of them would never end.
    """
    reader = Reader(buffer, where)
    if reader.bits != 64:
        raise ElfError("not a 64-bit object", where=where)
    (start,) = reader.unpack("Q", 40)
    size, count, names = reader.unpack("3H", 58)
    if not start or not count:
        return SectionTable(start=0, sections=())
    if size != _HEADER_SIZE or names >= count:
        raise reader.fault("wrong section headers", f"{count} of {size} bytes, the names in number {names}")
    rows = [reader.unpack("2I4Q2I2Q", start + index * size) for index in range(count)]
    texts, texts_end = rows[names][4], rows[names][4] + rows[names][5]
    found = tuple(
        Section(
            name=reader.text(texts + row[0], min(texts + row[0] + _MOST_NAME, texts_end)),
            kind=row[1],
            flags=row[2],
            address=row[3],
            offset=row[4],
            size=row[5],
            align=row[8],
        )
        for row in rows
    )
    for section in found:
        if section.end > reader.size:
            raise reader.fault("a section ends outside the file", section.name)
    if sum(section.end - section.offset for section in found) > _MOST_OVERLAP * reader.size:
        raise reader.fault("the sections are larger than the file")
    return SectionTable(start=start, sections=found)
