"""A second reader of ELF64 objects with GPU code, for the proof of a slimmed one: it shares no code with the first.

It reads by address, as the loader does: sections only say where GPU code is and what is not mapped. A region that is
not wholly understood has no containers, so that a proof then allows no change in it.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

from composer.errors import ElfError

Kind = Literal["ptx", "elf", "lto", "other"]
Variant = Literal["", "a", "f"]

_CHUNK = 1 << 20
_ZEROS = bytes(_CHUNK)
# Pages of a map count as memory of this process until it gives them back; Linux maps up to 16 at the touch of one.
_MOST_MAPPED = 64 << 20
_AROUND = 16 * 4096

PT_LOAD, PT_DYNAMIC, PT_PHDR = 1, 2, 6
SHT_NULL, SHT_SYMTAB, SHT_RELA, SHT_NOBITS, SHT_REL, SHT_DYNSYM = 0, 2, 4, 8, 9, 11
SHF_ALLOC, SHF_EXECINSTR, SHF_INFO_LINK = 0x2, 0x4, 0x40
X86_64, AARCH64 = 62, 183

SEGMENT_SIZE = 56
SECTION_SIZE = 64
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_WORD = struct.Struct("<Q")

_MOST_ALIGN = 4096

_CONTAINER = struct.Struct("<IHHQ")
_CONTAINER_MAGIC = 0xBA55ED50
_ENTRY = struct.Struct("<HHIQIIHHI")  # kind, 0x0101, header, payload, compressed, extension, minor, major, SM
_ENTRY_HEADER, _ENTRY_FLAGS = 64, 40
_KINDS: dict[int, Kind] = {1: "ptx", 2: "elf", 8: "lto"}
_VARIANTS: dict[int, Variant] = {0: "", 0x100000: "a", 0x200000: "f"}


class Readable(Protocol):
    """Bytes, or a map of a file: what has a length and gives slices."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> bytes | memoryview: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A program header; `stored` is p_filesz, `size` is p_memsz."""

    kind: int
    flags: int
    offset: int
    address: int
    physical: int
    stored: int
    size: int
    align: int

    @property
    def end(self) -> int:
        """The address behind its last byte in memory."""
        return self.address + self.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A section header with its name."""

    name: str
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    align: int
    entry: int

    @property
    def end(self) -> int:
        """The address behind its last byte."""
        return self.address + self.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One image of a container: addresses of its header and of the byte behind its payload."""

    kind: Kind
    sm: int
    variant: Variant
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """Images between two addresses."""

    start: int
    end: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Consecutive mapped addresses: from a file offset on, or zeros (`offset` None)."""

    start: int
    end: int
    offset: int | None


class Object:
    """The headers of an ELF64 object; raises ElfError when they are not all inside the file."""

    def __init__(self, buffer: Readable, where: str) -> None:
        self.buffer = buffer
        self.where = where
        self.size = len(buffer)
        self._mapped = 0
        head = _HEADER.unpack(self.read(0, _HEADER.size))
        self.ident: bytes = head[0]
        numbers: tuple[int, ...] = head[1:]
        self.kind, self.machine, self.version, self.entry, self.phoff, self.shoff, self.flags = numbers[:7]
        _, phentsize, self.phnum, shentsize, self.shnum, self.names = numbers[7:]
        if self.ident[:6] != b"\x7fELF\x02\x01" or phentsize != _SEGMENT.size:
            raise self.fault("not a little-endian ELF64 object")
        if self.shnum and shentsize != _SECTION.size:
            raise self.fault(f"section headers of {shentsize} bytes")
        self.segments = tuple(self._segments())
        self.loads = tuple(segment for segment in self.segments if segment.kind == PT_LOAD)
        self.sections = tuple(self._sections())

    def fault(self, what: str) -> ElfError:
        """An error that names this object."""
        return ElfError(what, where=self.where)

    def read(self, offset: int, size: int) -> bytes:
        """Bytes at a file offset, all of them or ElfError."""
        if offset + size > self.size:
            raise self.fault(f"{size} bytes at offset {offset:#x} are not inside the file of {self.size}")
        self._give_back(size + _AROUND)
        return bytes(self.buffer[offset : offset + size])

    def _give_back(self, more: int) -> None:
        """The page cache keeps what is given back, so it is at most a cheap fault away."""
        self._mapped += more
        if self._mapped > _MOST_MAPPED and isinstance(self.buffer, mmap.mmap):
            self.buffer.madvise(mmap.MADV_DONTNEED)
            self._mapped = more

    def offset_of(self, address: int, size: int) -> int | None:
        """The file offset of `size` bytes at an address, when one segment stores them all."""
        for load in self.loads:
            if load.address <= address and address + size <= load.address + load.stored:
                return load.offset + address - load.address
        return None

    def address_of(self, offset: int, size: int) -> int | None:
        """Where `size` bytes at a file offset are in memory, when one segment stores them all."""
        for load in self.loads:
            if load.offset <= offset and offset + size <= load.offset + load.stored:
                return load.address + offset - load.offset
        return None

    def runs(self, start: int, end: int) -> Iterator[Run]:
        """What is mapped of an address range, in order (segments ascend: a rule of the loader)."""
        if start >= end:
            return
        for load in self.loads:
            stored = load.address + load.stored
            first, last = max(start, load.address), min(end, stored)
            if first < last:
                yield Run(start=first, end=last, offset=load.offset + first - load.address)
            first, last = max(start, stored), min(end, load.end)
            if first < last:
                yield Run(start=first, end=last, offset=None)

    def at(self, address: int, size: int) -> bytes:
        """Stored bytes at an address, all of them or ElfError."""
        offset = self.offset_of(address, size)
        if offset is None:
            raise self.fault(f"{size} bytes at address {address:#x} are not mapped from the file")
        return self.read(offset, size)

    def word(self, address: int) -> int:
        """The 64-bit word at an address."""
        value: int = _WORD.unpack(self.at(address, 8))[0]
        return value

    def _segments(self) -> Iterator[Segment]:
        for row in _SEGMENT.iter_unpack(self.read(self.phoff, self.phnum * _SEGMENT.size)):
            kind, flags, offset, address, physical, stored, size, align = row
            yield Segment(kind=kind, flags=flags, offset=offset, address=address, physical=physical, stored=stored,
                          size=size, align=align)  # fmt: skip

    def _sections(self) -> Iterator[Section]:
        rows = list(_SECTION.iter_unpack(self.read(self.shoff, self.shnum * _SECTION.size)))
        if not rows:
            return
        if self.names >= len(rows):
            raise self.fault(f"section names in section {self.names} of {len(rows)}")
        strings = self.read(rows[self.names][4], rows[self.names][5])
        for name, kind, flags, address, offset, size, link, info, align, entry in rows:
            end = strings.find(b"\0", name)
            if end < 0:
                raise self.fault("a section name is not in the table of names")
            if kind != SHT_NOBITS and offset + size > self.size:
                raise self.fault(f"section {strings[name:end]!r} is not inside the file")
            yield Section(name=strings[name:end].decode("latin-1"), kind=kind, flags=flags, address=address,
                          offset=offset, size=size, link=link, info=info, align=align, entry=entry)  # fmt: skip

    @cached_property
    def dynamic(self) -> dict[int, int]:
        """The dynamic section's values by tag (the last one of each)."""
        table = next((segment for segment in self.segments if segment.kind == PT_DYNAMIC), None)
        if table is None:
            return {}
        # The loader reads up to DT_NULL, whatever the size says.
        run = next(self.runs(table.address, table.address + table.stored), None)
        if run is None or run.offset is None or run.start != table.address:
            return {}
        data = self.read(run.offset, (run.end - run.start) // 16 * 16)
        tags: dict[int, int] = {}
        for tag, value in struct.iter_unpack("<qQ", data):
            if not tag:
                break
            tags[tag] = value
        return tags


def difference(one: Object, at: int | None, other: Object, then: int | None, size: int) -> int | None:
    """How far two stretches of two files are the same; None when they are so to the end. None for an offset: zeros."""
    for done in range(0, size, _CHUNK):
        count = min(_CHUNK, size - done)
        left = _ZEROS[:count] if at is None else one.read(at + done, count)
        right = _ZEROS[:count] if then is None else other.read(then + done, count)
        if left != right:
            return done + next(index for index, (a, b) in enumerate(zip(left, right, strict=True)) if a != b)
    return None


def read_container(elf: Object, address: int) -> Container:
    """The container at an address; raises ElfError unless all of it is understood and mapped from the file."""
    magic, version, header, size = _CONTAINER.unpack(elf.at(address, _CONTAINER.size))
    if (magic, version, header) != (_CONTAINER_MAGIC, 1, _CONTAINER.size) or address % 8:
        raise elf.fault(f"no container of GPU code at {address:#x}")
    start, end = address + _CONTAINER.size, address + _CONTAINER.size + size
    base = elf.offset_of(start, size)
    if base is None:
        raise elf.fault(f"the container at {address:#x} is not mapped from the file")
    entries = []
    while start < end:
        entries.append(_read_entry(elf, start, base, end))
        base += entries[-1].end - start
        start = entries[-1].end
    return Container(start=address, end=end, entries=tuple(entries))


def _read_entry(elf: Object, address: int, offset: int, limit: int) -> Entry:
    """The entry at an address, whose byte is at `offset` of the file."""
    if limit - address < _ENTRY_HEADER:
        raise elf.fault(f"{limit - address} bytes at {address:#x} are no image of GPU code")
    data = elf.read(offset, _ENTRY_HEADER)
    kind, mark, header, payload, _, _, _, _, sm = _ENTRY.unpack_from(data)
    (flags,) = _WORD.unpack_from(data, _ENTRY_FLAGS)
    end = address + header + payload
    if mark != 0x0101 or header < _ENTRY_HEADER or end > limit or end % 8:
        raise elf.fault(f"no image of GPU code at {address:#x}")
    variant = _VARIANTS.get(flags & 0x300000)
    known = _KINDS.get(kind, "other") if variant is not None else "other"
    return Entry(kind=known, sm=sm, variant=variant or "", start=address, end=end)


def read_contiguous(elf: Object, start: int, end: int, align: int) -> tuple[Container, ...] | None:
    """The containers that fill an address range, or None when something else is there too.

    Between them there is no gap, or one of zeros up to the next multiple of `align`, the section's.
    """
    found = []
    while start < end:
        padding = min(-start % align, end - start) if 0 < align <= _MOST_ALIGN else 0
        if not any(elf.at(start, padding)):
            start += padding
        if start == end:
            break
        try:
            found.append(read_container(elf, start))
        except ElfError:
            return None
        start = found[-1].end
    return tuple(found) if start == end else None
