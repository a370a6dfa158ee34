"""What in an ELF object points to an address: relocations, dynamic symbols, and machine code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from composer.proofs._slim_reader import AARCH64, SHF_EXECINSTR, SHT_DYNSYM, SHT_NOBITS, X86_64, Object

Words = npt.NDArray[np.uint64]

_DT_PLTRELSZ, _DT_RELA, _DT_RELASZ, _DT_RELAENT, _DT_JMPREL, _DT_RELRSZ, _DT_RELR = 2, 7, 8, 9, 23, 35, 36
# psABIs: relocations that put an address in a word. The loader adds the load address to the addend of the first.
_RELATIVE = {X86_64: 8, AARCH64: 1027}
_ABSOLUTE = {X86_64: (1, 6, 7, 37), AARCH64: (257, 1025, 1026, 1032)}
_CODE_CHUNK = 1 << 22
_ADRP_REACH = 8  # instructions between an ADRP and the ADD that completes its address, as compilers place them


@dataclass(frozen=True, slots=True, kw_only=True)
class Pointer:
    """A word that the loader relocates: where it is, what it points to, and where the loader reads that."""

    place: int
    target: int
    slot: int


def pointers_into(elf: Object, ranges: list[tuple[int, int]]) -> list[Pointer]:
    """The relative relocations, RELA and RELR, that point into address ranges (their ends included)."""
    places, targets, slots = (np.concatenate(parts) for parts in zip(_rela(elf), _relr(elf), strict=True))
    inside = np.zeros(len(targets), dtype=bool)
    for start, end in ranges:
        inside |= (targets >= start) & (targets <= end)
    chosen = zip(places[inside].tolist(), targets[inside].tolist(), slots[inside].tolist(), strict=True)
    return [Pointer(place=place, target=target, slot=slot) for place, target, slot in chosen]


def named_addresses(elf: Object) -> Words:
    """Addresses that dynamic symbols, or relocations other than relative ones, refer to."""
    values = _symbol_values(elf)
    found = [values]
    for table in _tables(elf):
        used = table[np.isin(table[:, 1] & 0xFFFFFFFF, _ABSOLUTE.get(elf.machine, ()))]
        symbols = used[:, 1] >> 32
        known = symbols < len(values)
        rows, symbols = used[known], symbols[known]
        here = (symbols == 0) | (values[symbols] != 0)  # an undefined symbol is elsewhere
        found.append(values[symbols[here]] + rows[here, 2])
    return np.concatenate(found)


def code_addresses(elf: Object) -> Iterator[Words]:
    """Addresses that machine code computes relative to itself: `lea` on x86-64, ADRP and ADD on aarch64."""
    scan = {X86_64: _lea_targets, AARCH64: _adrp_targets}.get(elf.machine)
    for section in elf.sections:
        if scan is None or not section.flags & SHF_EXECINSTR or section.kind == SHT_NOBITS:
            continue
        for start in range(0, section.size, _CODE_CHUNK):
            size = min(_CODE_CHUNK + 4 * _ADRP_REACH, section.size - start)
            yield scan(elf.read(section.offset + start, size), section.address + start)


def _lea_targets(code: bytes, address: int) -> Words:
    """REX, 8D, a ModRM byte that says RIP-relative, and 32 bits counted from the next instruction."""
    data = np.frombuffer(code, dtype=np.uint8)
    at = np.flatnonzero((data[:-5] == 0x8D) & (data[1:-4] & 0xC7 == 0x05)) + 2
    far = data[at[:, None] + np.arange(4)].view("<i4").reshape(-1).astype(np.int64)
    targets: Words = (at + 4 + far).astype(np.uint64) + np.uint64(address)
    return targets


def _adrp_targets(code: bytes, address: int) -> Words:
    words = np.frombuffer(code[: len(code) // 4 * 4], dtype="<u4").astype(np.int64)
    at = np.flatnonzero(words & 0x9F000000 == 0x90000000)
    pages = ((words[at] >> 5 & 0x7FFFF) << 2 | words[at] >> 29 & 3) << 12
    pages = (address + at * 4 & ~0xFFF) + np.where(pages >> 32 & 1, pages - (1 << 33), pages)
    found = [np.zeros(0, dtype=np.uint64)]
    for step in range(1, _ADRP_REACH + 1):
        near = at + step < len(words)
        then = words[at[near] + step]
        # ADD (immediate, 64 bits, no shift) of the register that the ADRP filled
        adds = (then & 0xFFC00000 == 0x91000000) & (then >> 5 & 31 == words[at[near]] & 31)
        found.append((pages[near][adds] + (then[adds] >> 10 & 0xFFF)).astype(np.uint64))
    return np.concatenate(found)


def _symbol_values(elf: Object) -> Words:
    table = next((section for section in elf.sections if section.kind == SHT_DYNSYM), None)
    # Without a table there is just the empty symbol, which relocations without a symbol name.
    data = elf.read(table.offset, table.size // 24 * 24) if table else bytes(24)
    return np.frombuffer(data, dtype="<u8").reshape(-1, 3)[:, 1]


def _tables(elf: Object) -> Iterator[Words]:
    """The rows (offset, info, addend) of DT_RELA and of DT_JMPREL."""
    for start, size in ((_DT_RELA, _DT_RELASZ), (_DT_JMPREL, _DT_PLTRELSZ)):
        if start in elf.dynamic and elf.dynamic.get(_DT_RELAENT, 24) == 24:
            data = elf.at(elf.dynamic[start], elf.dynamic.get(size, 0) // 24 * 24)
            yield np.frombuffer(data, dtype="<u8").reshape(-1, 3)


def _rela(elf: Object) -> tuple[Words, Words, Words]:
    empty = np.zeros(0, dtype=np.uint64)
    if _DT_RELA not in elf.dynamic:
        return empty, empty, empty
    rows = next(_tables(elf), empty.reshape(-1, 3))
    relative = np.flatnonzero(rows[:, 1] == _RELATIVE.get(elf.machine, -1))
    slots = (relative * 24 + 16).astype(np.uint64) + np.uint64(elf.dynamic[_DT_RELA])
    return rows[relative, 0], rows[relative, 2], slots


def _relr(elf: Object) -> tuple[Words, Words, Words]:
    """The generic ABI's packed table: an even entry is an address, an odd one marks some of the 63 words behind."""
    empty = np.zeros(0, dtype=np.uint64)
    if _DT_RELR not in elf.dynamic:
        return empty, empty, empty
    data = elf.at(elf.dynamic[_DT_RELR], elf.dynamic.get(_DT_RELRSZ, 0) // 8 * 8)
    places = _unpacked(elf, np.frombuffer(data, dtype="<u8"))
    found, values = _stored_words(elf, places)
    return found, values, found


def _unpacked(elf: Object, entries: Words) -> Words:
    one = np.uint64(1)
    index = np.arange(len(entries))
    plain = entries & one == 0
    if (len(entries) and not plain[0]) or int(np.bitwise_count(entries[~plain]).sum()) > elf.size // 8:
        raise elf.fault("the packed relative relocations cannot be meant")
    last = np.maximum.accumulate(np.where(plain, index, 0))
    base = entries[last] + ((index - last - 1) * 504 + 8).astype(np.uint64)
    found = [entries[plain]]
    for bit in range(63):
        marked = ~plain & (entries >> np.uint64(bit + 1) & one == one)
        found.append(base[marked] + np.uint64(8 * bit))
    return np.concatenate(found)


def _stored_words(elf: Object, places: Words) -> tuple[Words, Words]:
    """Those of the places that a segment stores, and their words."""
    found, values = [np.zeros(0, dtype=np.uint64)], [np.zeros(0, dtype=np.uint64)]
    for load in elf.loads:
        mine = places[(places >= load.address) & (places <= max(load.address + load.stored - 8, 0))]
        if not load.stored >= 8 or not len(mine):
            continue
        first = int(mine.min())
        data = np.frombuffer(elf.at(first, int(mine.max()) - first + 8), dtype=np.uint8)
        at = (mine - np.uint64(first)).astype(np.int64)
        found.append(mine)
        values.append(data[at[:, None] + np.arange(8)].view("<u8").reshape(-1))
    return np.concatenate(found), np.concatenate(values)
