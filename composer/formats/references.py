"""Who holds an address in given ranges of a shared object: its relocations and dynamic symbols.

The tables have up to millions of rows, so they are read with numpy, in pieces. Sources: System V gABI (RELA, RELR), the
x86-64 psABI and the AArch64 ELF ABI (relocation types).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from composer.errors import ElfError
from composer.formats.elf import Dynamic, Load, open_elf
from composer.formats.elf_tables import SYMBOL
from composer.formats.sections import DYNSYM, SectionTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Words = NDArray[np.uint64]
    Bits = NDArray[np.bool_]

Source = bytes | memoryview | mmap.mmap

_DT_PLTRELSZ, _DT_SYMTAB, _DT_RELA, _DT_RELASZ, _DT_RELAENT, _DT_REL = 2, 6, 7, 8, 9, 17
_DT_JMPREL, _DT_RELRSZ, _DT_RELR, _DT_RELRENT = 23, 35, 36, 37
_RELA_SIZE = 24
_STT_TLS, _SHN_UNDEF, _SHN_ABS = 6, 0, 0xFFF1
_NOWHERE = 0xFFFFFFFFFFFFFFFF
_MOST_ADDRESS = 1 << 62
_ROWS = 1 << 18
_RELR_ROWS = 1 << 14
#: The most seen is 4,000 (cuBLASLt); a hostile table must not fill memory with them.
_MOST_FOUND = 1 << 16


class Range(NamedTuple):
    """Addresses from `start` to `end`, both included: an end pointer is a reference, too."""

    start: int
    end: int


class Pointer(NamedTuple):
    """A word that the loader fills with an address of the object itself, by a relative relocation.

    word: its address. offset: its file offset. row: file offset of its RELA row, None for RELR. target: the address,
    without the base that the loader adds.
    """

    word: int
    offset: int
    row: int | None
    target: int


@dataclass(frozen=True, slots=True, kw_only=True)
class References:
    """What refers to the ranges.

    Attributes
    ----------
    pointers: relative relocations, ascending by word; two for one word are both listed.
    symbolic: addresses that dynamic symbols define, or that other kinds of relocations may compute.
    written: addresses inside the ranges that a relocation writes to.
    """

    pointers: tuple[Pointer, ...]
    symbolic: frozenset[int]
    written: frozenset[int]


class _Machine(NamedTuple):
    relative: int
    no_address: tuple[int, ...]  # relocations for thread-local storage, and copies, whose values are no addresses


_MACHINES: Mapping[int, _Machine] = {
    62: _Machine(8, (0, 5, 16, 17, 18, 36)),
    183: _Machine(1027, (0, 1024, 1028, 1029, 1030, 1031)),
}


def read_references(buffer: Source, sections: SectionTable, targets: Sequence[Range], words: Sequence[Range],
                    where: str) -> References:  # fmt: skip
    """Everything that refers to `targets`, and every relative relocation of a word in `words`.

    Raises ElfError for tables that are malformed or of an unknown form.
    """
    return _Scan(memoryview(buffer).cast("B").toreadonly(), sections, targets, words, where).run()


class _Scan:
    """One object's tables and code, and what was found so far."""

    def __init__(self, view: memoryview, sections: SectionTable, targets: Sequence[Range], words: Sequence[Range],
                 where: str) -> None:  # fmt: skip
        self.view = view
        self.sections = sections
        self.targets = targets
        self.words = words
        self.reader, header, _, self.dynamic = open_elf(view, where)
        if header.machine not in _MACHINES or self.reader.bits != 64 or self.reader.order != "<":
            raise ElfError("a machine whose relocations are not known here", where=where, why=f"{header.machine}")
        self.machine = _MACHINES[header.machine]
        ends = [load.vaddr + load.memsz for load in self.reader.loads]
        ends += [section.address + section.size for section in sections.sections]
        if max(ends, default=0) >= _MOST_ADDRESS:
            raise self.reader.fault("an address that no program can have")
        self.pointers: list[Pointer] = []
        self.symbolic: set[int] = set()
        self.written: set[int] = set()

    def run(self) -> References:
        if self.dynamic:
            self._read_tables(self.dynamic)
        return References(
            pointers=tuple(sorted(self.pointers)), symbolic=frozenset(self.symbolic), written=frozenset(self.written),
        )  # fmt: skip

    def _read_tables(self, dynamic: Dynamic) -> None:
        if _DT_REL in dynamic.values:
            raise self.reader.fault("relocations without addends")
        values = self._symbol_values(dynamic)
        for start, size in self._rela_tables(dynamic):
            for first in range(start, start + size, _ROWS * _RELA_SIZE):
                self._rela(first, min(_ROWS, (start + size - first) // _RELA_SIZE), values)
        for found in self._relr_words(dynamic):
            self._relr(found)

    def _table(self, dynamic: Dynamic, tags: tuple[int, int], unit: int) -> tuple[int, int] | None:
        """File offset and size of a table, given the tags of its address and its size."""
        if tags[0] not in dynamic.values:
            return None
        start, end = self.reader.offset_of(dynamic.values[tags[0]])  # of an empty table, too: it may be damaged
        size = dynamic.values.get(tags[1], 0)
        if size % unit or start + size > end:
            raise self.reader.fault("a relocation table is not inside its segment", f"{size} bytes")
        return (start, size) if size else None

    def _symbol_values(self, dynamic: Dynamic) -> Words:
        """The address of every dynamic symbol that this object defines, nowhere for the others; notes `symbolic`."""
        if _DT_SYMTAB not in dynamic.values:
            return np.empty(0, np.uint64)
        address = dynamic.values[_DT_SYMTAB]
        tables = [one for one in self.sections.sections if one.kind == DYNSYM and one.address == address]
        start, end = self.reader.offset_of(address)
        if len(tables) != 1 or start + tables[0].size > end:
            raise self.reader.fault("no section header tells how many dynamic symbols there are")
        table = np.frombuffer(self.view, SYMBOL, tables[0].size // SYMBOL.itemsize, start)
        # Whatever a symbol is, a value in the ranges is taken for an address.
        named = table["value"][_inside(table["value"], self.targets)]
        self._check_count(len(named))
        self.symbolic.update(named.tolist())
        local = (table["section"] != _SHN_UNDEF) & (table["section"] != _SHN_ABS) & (table["info"] & 15 != _STT_TLS)
        return np.where(local, table["value"], np.uint64(_NOWHERE))

    def _rela_tables(self, dynamic: Dynamic) -> Iterator[tuple[int, int]]:
        main = self._table(dynamic, (_DT_RELA, _DT_RELASZ), _RELA_SIZE)
        if main and dynamic.values.get(_DT_RELAENT, _RELA_SIZE) != _RELA_SIZE:
            raise self.reader.fault("relocation rows of an unknown size")
        lazy = self._table(dynamic, (_DT_JMPREL, _DT_PLTRELSZ), _RELA_SIZE)
        if main:
            yield main
        if lazy and not (main and main[0] <= lazy[0] and sum(lazy) <= sum(main)):
            yield lazy

    def _rela(self, start: int, count: int, values: Words) -> None:
        words, info, addends = np.frombuffer(self.view, "<u8", count * 3, start).reshape(-1, 3).T
        kinds, symbols = info & 0xFFFFFFFF, info >> 32
        targets = addends.copy()
        named = np.flatnonzero(symbols)
        if len(named):
            if int(symbols[named].max()) >= len(values):
                raise self.reader.fault("a relocation names a symbol that does not exist")
            targets[named] += values[symbols[named]]
            targets[named[values[symbols[named]] == _NOWHERE]] = _NOWHERE
        relative = kinds == self.machine.relative
        if symbols[relative].any():
            raise self.reader.fault("a relative relocation names a symbol")
        hit = _inside(targets, self.targets)
        found = np.flatnonzero(relative & (hit | _inside(words, self.words)))
        written = words[_inside(words, self.targets, reach=7)]
        self._check_count(int(np.count_nonzero(hit)) + len(found) + len(written))
        for index in found.tolist():
            word = int(words[index])
            row = start + index * _RELA_SIZE
            self.pointers.append(Pointer(word, self._offset_of(word), row, int(addends[index])))
        other = hit & ~relative & ~np.isin(kinds, self.machine.no_address)
        self.symbolic.update(targets[other].tolist())
        self.written.update(written.tolist())

    def _check_count(self, more: int) -> None:
        if len(self.pointers) + len(self.symbolic) + len(self.written) + more > _MOST_FOUND:
            raise self.reader.fault("more references than can be real")

    def _offset_of(self, word: int) -> int:
        start, end = self.reader.offset_of(word)
        if start + 8 > end:
            raise self.reader.fault("a relocation writes outside the file", f"at {word:#x}")
        return start

    def _relr_words(self, dynamic: Dynamic) -> Iterator[Words]:
        """The addresses of the words that RELR lists: an even entry is one, each odd entry a map of the next 63."""
        table = self._table(dynamic, (_DT_RELR, _DT_RELRSZ), 8)
        if not table:
            return
        if dynamic.values.get(_DT_RELRENT, 8) != 8:
            raise self.reader.fault("relocation rows of an unknown size")
        following = None
        total = 0
        for start in range(table[0], sum(table), _RELR_ROWS * 8):
            rows = np.frombuffer(self.view, "<u8", min(_RELR_ROWS, (sum(table) - start) // 8), start)
            if following is None and int(rows[0]) & 1:
                raise self.reader.fault("a relocation table starts with a bitmap")
            found, following = _expand_relr(rows, following or 0)
            total += len(found)
            if total * 8 > self.reader.size:
                raise self.reader.fault("more relocated words than fit into the file")
            yield found

    def _relr(self, words: Words) -> None:
        """RELR keeps the address in the word itself."""
        for load in self.reader.loads:
            inside = words[_inside(words, (Range(load.vaddr, max(load.vaddr, load.vaddr + load.filesz - 8)),))]
            for first in range(0, len(inside), _ROWS):
                self._relr_in(load, inside[first : first + _ROWS])
        written = words[_inside(words, self.targets, reach=7)]
        self._check_count(len(written))
        self.written.update(written.tolist())

    def _relr_in(self, load: Load, words: Words) -> None:
        offsets = words - np.uint64(load.vaddr) + np.uint64(load.offset)
        if int(offsets.max()) + 8 > self.reader.size:
            raise self.reader.fault("a relocation writes outside the file")
        raw = np.frombuffer(self.view, np.uint8)
        targets = raw[offsets[:, None] + np.arange(8, dtype=np.uint64)].view("<u8")[:, 0]
        found = np.flatnonzero(_inside(targets, self.targets) | _inside(words, self.words))
        self._check_count(len(found))
        for index in found.tolist():
            self.pointers.append(Pointer(int(words[index]), int(offsets[index]), None, int(targets[index])))


def _inside(values: Words, ranges: Sequence[Range], reach: int = 0) -> Bits:
    """Which values are in one of the ranges, or at most `reach` bytes before it."""
    found = np.zeros(len(values), np.bool_)
    for start, end in ranges:
        low = max(0, start - reach)
        found |= (values >= np.uint64(low)) & (values <= np.uint64(end))
    return found


def _expand_relr(rows: Words, following: int) -> tuple[Words, int]:
    """The words that a piece of a RELR table lists, and the address that a bitmap after it would begin at."""
    is_map = (rows & np.uint64(1)).astype(np.bool_)
    # Where each row's own word or map begins: behind the address before it, 63 words further for every map between.
    position = np.arange(len(rows))
    last = np.maximum.accumulate(np.where(is_map, -1, position))
    base = np.where(last >= 0, rows[np.maximum(last, 0)] + np.uint64(8), np.uint64(following))
    maps_before = position - last - 1
    begin = base + maps_before.astype(np.uint64) * np.uint64(63 * 8)
    maps = rows[is_map]
    bits = np.unpackbits(maps.view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")[:, 1:]
    row, bit = np.nonzero(bits)
    words = begin[is_map][row] + bit.astype(np.uint64) * np.uint64(8)
    end = int(begin[-1]) + 63 * 8 if is_map[-1] else int(rows[-1]) + 8
    return np.concatenate([rows[~is_map], words]), end & _NOWHERE
