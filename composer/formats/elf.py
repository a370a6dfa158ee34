"""Read what the dynamic loader reads of an ELF object, and no more.

Only the program headers and what they lead to are touched (PT_DYNAMIC, its string table, the GNU version tables), so a
1 GB library costs a few pages. Section headers are never used: the loader ignores them, and a stripped, edited or
hostile object may carry wrong ones. Sources: System V gABI (object files, dynamic linking), LSB 5.0 (symbol versioning)
and glibc's `elf/dl-load.c`, whose reading is taken where it and the documents differ.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from composer.errors import ElfError
from composer.formats.dlopen import MOST, Dlopen, dlopen_notes

Kind = Literal["none", "relocatable", "executable", "shared", "core", "other"]

_MAGIC = b"\x7fELF"
_MACHINES = {3: "i386", 40: "arm", 62: "x86_64", 183: "aarch64", 190: "cuda", 224: "amdgpu", 243: "riscv"}
_KINDS: Mapping[int, Kind] = {0: "none", 1: "relocatable", 2: "executable", 3: "shared", 4: "core"}
_ET_DYN = 3
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP, _PT_NOTE = 1, 2, 3, 4
_PN_XNUM = 0xFFFF

_DT_NULL, _DT_NEEDED, _DT_STRTAB, _DT_STRSZ, _DT_SONAME, _DT_RPATH, _DT_RUNPATH = 0, 1, 5, 10, 14, 15, 29
_DT_FLAGS_1, _DT_VERDEF, _DT_VERDEFNUM, _DT_VERNEED, _DT_VERNEEDNUM = (
    0x6FFFFFFB, 0x6FFFFFFC, 0x6FFFFFFD, 0x6FFFFFFE, 0x6FFFFFFF,
)  # fmt: skip
_DF_1_PIE = 0x08000000
VER_FLG_BASE = 1
_VER_FLG_WEAK = 2

_PAGE = 4096
# A version index has 15 bits, so no valid object has more records; a hostile one must not keep us busy.
_MOST_RECORDS = 0x8000
_MOST_DYNAMIC = 0x10000
_MOST_TEXT = 0x10000


class Readable(Protocol):
    """The bytes of a whole file: `bytes`, a memoryview, a map, or what keeps some and knows which are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, wanted: slice, /) -> bytes | memoryview: ...


class Load(NamedTuple):
    """One PT_LOAD segment; all five are bytes."""

    offset: int
    vaddr: int
    filesz: int
    memsz: int
    align: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Elf:
    """What the loader sees of one object.

    Attributes
    ----------
    machine: `x86_64`, `aarch64`, another known name, or `em<number>`.
    bits: 32 or 64.
    kind: by e_type, except that a position-independent program is `executable`.
    rpath, runpath: the entries as written; `("",)` is a tag with an empty value, `()` is no tag.
    versions_needed: library name to the versions it must define, without weak references, which may stay open.
    versions_defined: the versions this object defines, without its own base name.
    opens: what its own notes say that it opens by name at run time.
    dynamic: there is a PT_DYNAMIC, so the loader has something to do.
    size: bytes of the whole file.
    """

    machine: str
    bits: Literal[32, 64]
    kind: Kind
    soname: str | None = None
    needed: tuple[str, ...] = ()
    rpath: tuple[str, ...] = ()
    runpath: tuple[str, ...] = ()
    interpreter: str | None = None
    versions_needed: Mapping[str, frozenset[str]]
    versions_defined: frozenset[str] = frozenset()
    opens: tuple[Dlopen, ...] = ()
    dynamic: bool = False
    loads: tuple[Load, ...] = ()
    size: int


class _Header(NamedTuple):
    kind: int
    machine: int
    table: int
    entry_size: int
    entries: int


class _Segment(NamedTuple):
    kind: int
    load: Load


class Reader:
    """Bounds-checked reads of one object; every fault names it."""

    __slots__ = ("bits", "buffer", "loads", "order", "records", "size", "where")

    def __init__(self, buffer: Readable, where: str) -> None:
        self.buffer = buffer
        self.size = len(buffer)
        self.where = where
        self.records = 0
        self.loads: tuple[Load, ...] = ()
        ident = self.take(0, 16)
        if not is_elf(ident):
            raise self.fault("not an ELF object")
        if ident[4] not in (1, 2) or ident[5] not in (1, 2):
            raise self.fault("unknown ELF class or byte order", f"class {ident[4]}, data {ident[5]}")
        self.bits: Literal[32, 64] = 32 if ident[4] == 1 else 64
        self.order = "<" if ident[5] == 1 else ">"

    def fault(self, what: str, why: str | None = None) -> ElfError:
        """An error that names the object."""
        return ElfError(what, where=self.where, why=why, fix="Fetch the file again, or report it to its publisher.")

    def take(self, offset: int, size: int) -> bytes:
        """Bytes that must be there."""
        if offset + size > self.size:
            raise self.fault("truncated", f"{size} bytes wanted at offset {offset}, the file has {self.size}")
        return bytes(self.buffer[offset : offset + size])

    def unpack(self, layout: str, offset: int) -> tuple[int, ...]:
        """Fields of a struct layout, in the object's byte order."""
        layout = self.order + layout
        return struct.unpack(layout, self.take(offset, struct.calcsize(layout)))

    def offset_of(self, address: int) -> tuple[int, int]:
        """The file offset of a virtual address and the end of the file-backed bytes that follow it."""
        for load in self.loads:
            if load.vaddr <= address < load.vaddr + load.filesz:
                return load.offset + address - load.vaddr, min(load.offset + load.filesz, self.size)
        raise self.fault("an address is in no loaded segment", hex(address))

    def text(self, offset: int, end: int) -> str:
        """The NUL-terminated string at `offset`, which must end before `end`."""
        for length in (256, _MOST_TEXT):
            head, found, _ = bytes(self.buffer[offset : min(end, offset + length)]).partition(b"\0")
            if found:
                break
        else:
            raise self.fault("a string has no end", f"offset {offset}")
        try:
            return head.decode()
        except UnicodeDecodeError as error:
            raise self.fault("a string is not UTF-8", repr(head[:80])) from error

    def chain(self, layout: str, offset: int, count: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        """The records of a linked list whose last field is the distance to the next record, at most `count`."""
        for _ in range(count):
            self.records += 1
            if self.records > _MOST_RECORDS:
                raise self.fault("more version records than a version index can name")
            fields = self.unpack(layout, offset)
            yield offset, fields
            if not fields[-1]:
                return
            offset += fields[-1]


class Dynamic:
    """The dynamic section: tag to value, and the string table."""

    __slots__ = ("needed", "reader", "strings", "strings_end", "values")

    def __init__(self, reader: Reader, segment: Load) -> None:
        self.reader = reader
        self.values: dict[int, int] = {}
        self.needed: list[int] = []
        for tag, value in _dynamic_entries(reader, segment):
            if tag == _DT_NEEDED:
                self.needed.append(value)
            self.values[tag] = value  # the loader, too, keeps the last of a repeated tag
        self.strings, end = self.at(_DT_STRTAB) or (0, 0)
        self.strings_end = min(end, self.strings + self.values.get(_DT_STRSZ, 0))

    def at(self, tag: int) -> tuple[int, int] | None:
        """The file offset that the address in `tag` stands for, and the end of its segment."""
        return self.reader.offset_of(self.values[tag]) if tag in self.values else None

    def name(self, index: int) -> str:
        """A string of its string table."""
        return self.reader.text(self.strings + index, self.strings_end)

    def optional_name(self, tag: int) -> str | None:
        """The string that a tag names, if the tag is there."""
        return self.name(self.values[tag]) if tag in self.values else None

    def entries(self, tag: int) -> tuple[str, ...]:
        """The parts, between colons, of the string that a tag names."""
        return tuple(self.name(self.values[tag]).split(":")) if tag in self.values else ()


def is_elf(head: bytes) -> bool:
    """Whether a file that begins with `head` (four bytes suffice) says that it is ELF."""
    return head[:4] == _MAGIC


class Opened(NamedTuple):
    """One object with its program headers read, and what the last PT_DYNAMIC leads to, if there is one."""

    reader: Reader
    header: _Header
    segments: list[_Segment]
    dynamic: Dynamic | None


def open_elf(buffer: Readable, where: str) -> Opened:
    """The start of every reading of an object; `where` names it in errors. Raises ElfError."""
    reader = Reader(buffer, where)
    header = _header(reader)
    segments = _segments(reader, header)
    reader.loads = tuple(segment.load for segment in segments if segment.kind == _PT_LOAD)
    tables = [segment.load for segment in segments if segment.kind == _PT_DYNAMIC and segment.load.filesz]
    return Opened(reader, header, segments, Dynamic(reader, tables[-1]) if tables else None)


def dynamic_range(buffer: Readable, where: str) -> tuple[int, int]:
    """File offsets of the dynamic section's start and end, both 0 where there is none. Raises ElfError."""
    reader = Reader(buffer, where)
    tables = [segment.load for segment in _segments(reader, _header(reader)) if segment.kind == _PT_DYNAMIC]
    return (tables[-1].offset, tables[-1].offset + tables[-1].filesz) if tables else (0, 0)


def read_elf(buffer: Readable, where: str) -> Elf:
    """Read one object from what holds the whole file; `where` names it in errors.

    Raises ElfError for anything that is not a well-formed ELF object as far as the loader would read it.
    """
    reader, header, segments, dynamic = open_elf(buffer, where)
    interpreter = _interpreter(reader, segments)
    soname = dynamic.optional_name(_DT_SONAME) if dynamic else None
    return Elf(
        machine=_MACHINES.get(header.machine, f"em{header.machine}"),
        bits=reader.bits,
        kind=_kind(header, dynamic, interpreter=interpreter, soname=soname),
        soname=soname,
        needed=tuple(dynamic.name(index) for index in dynamic.needed) if dynamic else (),
        rpath=dynamic.entries(_DT_RPATH) if dynamic else (),
        runpath=dynamic.entries(_DT_RUNPATH) if dynamic else (),
        interpreter=interpreter,
        versions_needed=_versions_needed(dynamic) if dynamic else {},
        versions_defined=_versions_defined(dynamic) if dynamic else frozenset(),
        opens=_opens(reader, segments),
        dynamic=dynamic is not None,
        loads=reader.loads,
        size=reader.size,
    )


def load_faults(elf: Elf) -> tuple[str, ...]:
    """Why the loader would refuse to map this object: empty for a sound one.

    The rules are gABI's and glibc's (`_dl_map_object_from_fd`): alignment a power of two and whole pages, address
    congruent to offset, segments ascending and apart, file bytes inside the file. `strip` after an RPATH edit is known
    to break them.
    """
    faults = [fault for load in elf.loads for fault in _segment_faults(load, elf.size)]
    for before, after in zip(elf.loads, elf.loads[1:], strict=False):
        if after.vaddr < before.vaddr + before.memsz:
            faults.append(f"segment at {after.vaddr:#x} is not above the one at {before.vaddr:#x}")
    return tuple(faults)


def _segment_faults(load: Load, size: int) -> Iterator[str]:
    name = f"segment at {load.vaddr:#x}"
    if load.align & (load.align - 1) or load.align % _PAGE:
        yield f"{name} has alignment {load.align}, not a power of two of at least {_PAGE}"
    elif load.align and (load.vaddr - load.offset) % load.align:
        yield f"{name} is not congruent to its offset {load.offset:#x} modulo {load.align:#x}"
    if load.filesz > load.memsz:
        yield f"{name} has {load.filesz} bytes in the file and {load.memsz} in memory"
    if load.offset + load.filesz > size:
        yield f"{name} ends at offset {load.offset + load.filesz}, past the end of the file ({size})"


def _header(reader: Reader) -> _Header:
    address = "I" if reader.bits == 32 else "Q"
    fields = reader.unpack(f"HHI{address * 3}IHHHHHH", 16)
    kind, machine, _, _, table, _, _, _, entry_size, entries = fields[:10]
    if entries == _PN_XNUM:
        raise reader.fault("too many program headers for a loadable object")
    return _Header(kind, machine, table, entry_size, entries)


def _segments(reader: Reader, header: _Header) -> list[_Segment]:
    layout, size = ("8I", 32) if reader.bits == 32 else ("2I6Q", 56)
    if header.entries and header.entry_size != size:
        raise reader.fault("wrong program header size", f"{header.entry_size}, expected {size}")
    return [_segment(reader, layout, header.table + index * size) for index in range(header.entries)]


def _segment(reader: Reader, layout: str, offset: int) -> _Segment:
    fields = reader.unpack(layout, offset)
    if reader.bits == 64:  # p_flags is second there, and second to last in a 32-bit object
        kind, _, start, vaddr, _, filesz, memsz, align = fields
    else:
        kind, start, vaddr, _, filesz, memsz, _, align = fields
    return _Segment(kind, Load(start, vaddr, filesz, memsz, align))


def _interpreter(reader: Reader, segments: list[_Segment]) -> str | None:
    for kind, load in segments:
        if kind == _PT_INTERP and load.filesz:
            return reader.text(load.offset, min(load.offset + load.filesz, reader.size))
    return None


def _opens(reader: Reader, segments: list[_Segment]) -> tuple[Dlopen, ...]:
    found: list[Dlopen] = []
    for kind, load in segments:
        if kind == _PT_NOTE:
            end = min(load.offset + min(load.filesz, MOST), reader.size)
            found += dlopen_notes(bytes(reader.buffer[load.offset : end]), reader.order, load.align)
    return tuple(found)


def _kind(header: _Header, dynamic: Dynamic | None, *, interpreter: str | None, soname: str | None) -> Kind:
    """A PIE says so in DT_FLAGS_1; one by an old linker has an interpreter and, unlike libc.so.6, no SONAME."""
    if header.kind == _ET_DYN and dynamic:
        marked = dynamic.values.get(_DT_FLAGS_1, 0) & _DF_1_PIE
        if marked or (interpreter and not soname):
            return "executable"
    return _KINDS.get(header.kind, "other")


def _dynamic_entries(reader: Reader, segment: Load) -> Iterator[tuple[int, int]]:
    layout, size = ("iI", 8) if reader.bits == 32 else ("qQ", 16)
    start, end = reader.offset_of(segment.vaddr)
    for index in range(min(segment.filesz, end - start) // size):
        if index == _MOST_DYNAMIC:
            break
        tag, value = reader.unpack(layout, start + index * size)
        if tag == _DT_NULL:
            return
        yield tag, value
    raise reader.fault("the dynamic section has no end")


def _versions_needed(dynamic: Dynamic) -> dict[str, frozenset[str]]:
    place = dynamic.at(_DT_VERNEED)
    if place is None:
        return {}
    found: dict[str, set[str]] = {}
    chain = dynamic.reader.chain
    for offset, (_, count, library, first, _) in chain("HHIII", place[0], dynamic.values.get(_DT_VERNEEDNUM, 0)):
        names = found.setdefault(dynamic.name(library), set())
        for _, (_, flags, _, name, _) in chain("IHHII", offset + first, count):
            if not flags & _VER_FLG_WEAK:
                names.add(dynamic.name(name))
    return {library: frozenset(names) for library, names in found.items()}


def _versions_defined(dynamic: Dynamic) -> frozenset[str]:
    place = dynamic.at(_DT_VERDEF)
    if place is None:
        return frozenset()
    found: set[str] = set()
    chain = dynamic.reader.chain
    for offset, (_, flags, _, _, _, first, _) in chain("4H3I", place[0], dynamic.values.get(_DT_VERDEFNUM, 0)):
        # The first name is the version's own; those after it are its predecessors.
        for _, (name, _) in chain("II", offset + first, 0 if flags & VER_FLG_BASE else 1):
            found.add(dynamic.name(name))
    return frozenset(found)
