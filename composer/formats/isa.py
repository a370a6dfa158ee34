"""Count the instructions of an object's code that not every CPU has.

x86-64: what counts is told by the VEX or EVEX prefix, the opcode map, the opcode, W, the vector length and, where it
matters, ModRM. Where instructions begin is found by `sweep`. AArch64: every instruction is one word, and bits of it
tell. Sources: Intel's manual, volume 2, 2.3, 2.7 and the instruction pages; Arm's Architecture Reference Manual, C4.
"""

from __future__ import annotations

import itertools
import mmap
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from composer.errors import ElfError
from composer.formats.arm_features import count_words
from composer.formats.elf import is_elf
from composer.formats.elf_tables import HEADER, SEGMENT, SYMBOL
from composer.formats.sections import NOBITS, SectionTable, read_sections
from composer.formats.sweep import sweep
from composer.formats.vector_table import (
    AVX2_256,
    AVX2_REGISTER,
    FEATURES,
    LENGTHLESS,
    MASKS,
    NARROWING,
    NO_REGISTER,
    SCALAR,
    TABLE,
)  # fmt: skip

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Signed = NDArray[np.int64]
    Flags = NDArray[np.bool_]

MACHINES = {62: "x86_64", 183: "aarch64"}

_PIECE = 1 << 18
_PF_X, _PT_LOAD, _PT_EH_FRAME = 1, 1, 0x6474E550
_MOST_ADDRESS = 1 << 62
_SYMTAB, _DYNSYM, _FUNCTION = 2, 11, 2
# Version 1; then the frame pointer pcrel|sdata4, the count udata4, the table datarel|sdata4, as every linker writes it.
_EH_HEAD = bytes([1, 0x1B, 0x03, 0x3B])
# Of libgcc, of glibc, and of the library cpuinfo. libgcc's own `__getauxval` chooses atomics only.
_ASKING = (b"__cpu_model", b"__cpu_indicator_init", b"getauxval", b"cpuinfo_initialize")
_PREFIXES = np.isin(np.arange(256), [0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x67])
_VECTOR = np.isin(np.arange(256), [0xC4, 0xC5, 0x62])
_PAD = 16


class Range(NamedTuple):
    """Code of an object: file offset, bytes, and the address that it is loaded at."""

    offset: int
    size: int
    address: int

    @property
    def end(self) -> int:
        """The address behind it."""
        return self.address + self.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """Where the code of one object is.

    entries: addresses at which functions begin, ascending. asks: it imports a function or a variable that tells what
    the CPU has.
    """

    machine: str
    ranges: tuple[Range, ...]
    entries: Signed
    asks: bool


class Piece(NamedTuple):
    """A part of the code that begins and ends with whole functions: file offset, bytes, and where entries are in it."""

    offset: int
    size: int
    entries: Signed


def read_code(buffer: bytes | memoryview | mmap.mmap, where: str) -> Code | None:
    """Where an ELF64 object for x86-64 or AArch64 holds code; None for an object of another machine.

    By its sections, and without any by its executable segments. ElfError for headers outside the file.
    """
    head = bytes(buffer[: HEADER.size])
    if len(head) < HEADER.size or not is_elf(head):
        raise ElfError("not an ELF object", where=where)
    machine = MACHINES.get(struct.unpack_from("<H", head, 18)[0])
    if machine is None or head[4:6] != b"\2\1":
        return None
    segments = tuple(_segments(buffer, where))
    table = read_sections(buffer, where)
    ranges = _ranges(table, segments, len(buffer), where)
    found = [_frame_entries(buffer, segments), *_symbol_entries(buffer, table)]
    names = b"".join(bytes(buffer[one.offset : one.end]) for one in table.named(".dynstr"))
    asks = any(b"\0" + name + b"\0" in names for name in _ASKING)
    return Code(machine=machine, ranges=ranges, entries=np.unique(np.concatenate(found)), asks=asks)


def pieces(code: Code) -> Iterator[Piece]:
    """The code in parts that can be counted in any order, of a quarter of a megabyte where functions allow it."""
    for one in code.ranges:
        inside = code.entries[(code.entries >= one.address) & (code.entries < one.end)] - one.address
        if code.machine == "aarch64":
            inside = np.arange(0, one.size, _PIECE)
        cuts = np.unique(np.searchsorted(inside, np.arange(_PIECE, one.size, _PIECE)))
        starts = [0, *(at for at in inside[cuts[cuts < len(inside)]].tolist() if at), one.size]
        for start, end in itertools.pairwise(starts):
            yield Piece(one.offset + start, end - start, inside[(inside >= start) & (inside < end)] - start)


def count_piece(buffer: bytes | memoryview | mmap.mmap, piece: Piece, machine: str) -> Counter[str]:
    """How many instructions of each kind: see docs/reference/isa.md for their names. HostError without capstone 5."""
    data = np.frombuffer(buffer, np.uint8, piece.size, piece.offset)
    if machine == "aarch64":
        return count_words(data)
    starts, undecoded = sweep(data, piece.entries)
    counts = count_instructions(data, starts)
    counts["undecoded"] = undecoded
    return counts


def count_instructions(code: Bytes, starts: Signed) -> Counter[str]:
    """The x86-64 instructions at given offsets of `code`, by kind."""
    padded = np.concatenate([code, np.zeros(_PAD, np.uint8)])
    counts = Counter(instructions=len(starts))
    first, second = padded[starts], padded[starts + 1]
    counts["cpuid"] = int(((first == 0x0F) & (second == 0xA2)).sum())
    at = starts[_VECTOR[first]]
    prefixed = starts[_PREFIXES[first]]
    for _ in range(3):
        prefixed = prefixed + 1
        at = np.concatenate([at, prefixed[_VECTOR[padded[prefixed]]]])
        prefixed = prefixed[_PREFIXES[padded[prefixed]]]
    _count_vectors(padded, at, counts)
    return counts


@dataclass(frozen=True, slots=True, kw_only=True)
class _Vectors:
    """The fields of VEX and EVEX instructions, one element for each. bits: what the table says."""

    evex: Flags
    bits: NDArray[np.uint64]
    length: Signed
    rounding: Flags
    register: Flags


def _decode(code: Bytes, at: Signed) -> _Vectors:
    first, p0, p1, p2 = (code[at + ahead].astype(np.int64) for ahead in range(4))
    evex, short = first == 0x62, first == 0xC5
    payload = np.where(short, p0 & 0x7F, p1)  # the short form has R where the others have W, which is 0 in it
    table = np.where(evex, p0 & 7, np.where(short, 1, p0 & 0x1F))
    opcode_at = at + np.where(evex, 4, np.where(short, 2, 3))
    opcode, register = code[opcode_at].astype(np.int64), code[opcode_at + 1] >= 0xC0
    bits = TABLE[evex.astype(np.int64), np.where(table < 8, table, 0), payload & 3, payload >> 7, opcode]
    length = np.where(evex, p2 >> 5 & 3, payload >> 2 & 1)
    return _Vectors(evex=evex, bits=bits, length=length, rounding=evex & (p2 >> 4 & 1 == 1), register=register)


def _count_vectors(code: Bytes, at: Signed, counts: Counter[str]) -> None:
    one = _decode(code, at)
    vector = ~_has(one.bits, SCALAR | LENGTHLESS | MASKS)
    rounded = one.rounding & one.register  # then the length bits are a rounding mode, and the length is 512
    length = np.where(rounded, 2, one.length)
    named = vector & (one.register | ~_has(one.bits, NO_REGISTER))
    names = length - (_has(one.bits, NARROWING) & ~one.register)  # the longest register that it names
    counts["vex"], counts["evex"] = int((~one.evex).sum()), int(one.evex.sum())
    counts["ymm"], counts["zmm"] = int((named & (names == 1)).sum()), int((named & (names == 2)).sum())
    counts["avx512vl"] = int((one.evex & vector & (length < 2)).sum())
    wide = _has(one.bits, AVX2_256) & (length == 1) | _has(one.bits, AVX2_REGISTER) & one.register
    avx2 = ~one.evex & (wide | _has(one.bits, FEATURES["avx2"]))
    counts["avx2"] = int(avx2.sum())
    for name, bit in FEATURES.items():
        if name != "avx2":
            counts[name] = int(_has(one.bits, bit).sum())
    plain = ~avx2 & ~_has(one.bits, sum(FEATURES.values()))
    counts["avx"] = int((plain & ~one.evex).sum())
    counts["avx512f"] += int((plain & one.evex).sum())


def _has(bits: NDArray[np.uint64], mask: int) -> Flags:
    found: Flags = (bits & np.uint64(mask)) != 0
    return found


# Where the code is


def _segments(buffer: bytes | memoryview | mmap.mmap, where: str) -> Iterator[tuple[int, ...]]:
    """The program headers: type, flags, offset, address, physical address, bytes in the file, in memory, alignment."""
    fields = HEADER.unpack(bytes(buffer[: HEADER.size]))
    start, size, count = fields[5], fields[9], fields[10]
    if not count:
        return
    if size != SEGMENT.size or start + count * size > len(buffer):
        raise ElfError("the program headers lie outside the file", where=where)
    yield from SEGMENT.iter_unpack(bytes(buffer[start : start + count * size]))


def _ranges(table: SectionTable, segments: Iterable[tuple[int, ...]], size: int, where: str) -> tuple[Range, ...]:
    found = {
        Range(one.offset, one.size, one.address)
        for one in table.sections if one.executable and one.allocated and one.kind != NOBITS and one.size
    }  # fmt: skip
    if not table.sections:
        found = {Range(one[2], one[5], one[3]) for one in segments if one[0] == _PT_LOAD and one[1] & _PF_X and one[5]}
    if any(one.offset + one.size > size or one.end > _MOST_ADDRESS for one in found):
        raise ElfError("code lies outside the file, or at no address", where=where)
    return tuple(sorted(found))


def _frame_entries(buffer: bytes | memoryview | mmap.mmap, segments: Iterable[tuple[int, ...]]) -> Signed:
    """Where unwind information begins: the sorted table of .eh_frame_hdr (LSB 5.0, 10.6.2)."""
    for kind, _, offset, address, _, size, *_ in segments:
        head = bytes(buffer[offset : offset + 12]) if kind == _PT_EH_FRAME else b""
        if len(head) == 12 and head[:4] == _EH_HEAD and address < _MOST_ADDRESS:
            count = int.from_bytes(head[8:], "little")
            if 12 + 8 * count <= size and offset + size <= len(buffer):
                rows = np.frombuffer(buffer, "<i4", 2 * count, offset + 12).reshape(-1, 2)
                return rows[:, 0].astype(np.int64) + address
    return np.empty(0, np.int64)


def _symbol_entries(buffer: bytes | memoryview | mmap.mmap, table: SectionTable) -> Iterator[Signed]:
    for one in table.sections:
        if one.kind in (_SYMTAB, _DYNSYM) and one.size:
            rows = np.frombuffer(buffer, SYMBOL, one.size // SYMBOL.itemsize, one.offset)
            functions = rows[
                (rows["info"] & 15 == _FUNCTION) & (rows["section"] != 0) & (rows["value"] < _MOST_ADDRESS)
            ]
            yield functions["value"].astype(np.int64)
