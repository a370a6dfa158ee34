"""Take the GPU code that a set of targets never runs, and debug symbols, out of a shared object.

In each region (see `gpu_code`) the kept images are packed to the front in their order: every container keeps its header
with a new size, an image is moved as it is, and a container of which nothing stays becomes an empty one, which the
driver treats as one with images for other GPUs only. The pointers follow, by their relocations. What is then free at
the region's end leaves the file (see `elf_cut`), and the region's section ends where its last container does. A
container that is pinned stays in its place with all its images, and so does all that comes before it: a gap between
containers, more than their alignment needs, would be read as the end of them.

Where a pointer is not proven, the GPU code stays as it was; where the free bytes cannot leave, they become zeros.
"""

from __future__ import annotations

import bisect
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from composer.errors import ElfError
from composer.formats.debug import DebugSymbols, find_debug
from composer.formats.elf_cut import Content, Cut, Span, cut, unchanged
from composer.formats.elf_tables import SHT_SYMTAB, SYMBOL, Section, read_tables
from composer.formats.fatbin import CONTAINER_HEADER, CONTAINER_MAGIC, Container, Entry
from composer.formats.gpu_code import GpuCode, Region, kept_entries, read_gpu_code
from composer.formats.references import Pointer, Source
from composer.model.gpu import Selection

_WORD = struct.Struct("<Q")
_ADDEND_AT = 16  # of the 24 bytes of an Elf64_Rela
_VALUE_AT = 8  # of the 24 bytes of an Elf64_Sym
_VERSION = 1


class Tally(NamedTuple):
    """Images of GPU code: how many, and their bytes in the file, headers included."""

    images: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Slimmed:
    """The new file.

    Attributes
    ----------
    how: `shrunk` is smaller; `compacted` has zeros where the code was, and its old size; `unchanged` has its old bytes.
    why: what was asked for and not done, and the reason; None when all was.
    kept, dropped: the images of the regions; of both none where there is no GPU code.
    debug: bytes of debug symbols that left.
    content: the bytes, as a Readable that puts them together from the source when asked for.
    """

    how: Literal["shrunk", "compacted", "unchanged"]
    why: str | None
    kept: Tally
    dropped: Tally
    debug: int
    content: Cut

    @property
    def size(self) -> int:
        """Bytes of the new file."""
        return self.content.size

    def pieces(self) -> Iterator[bytes]:
        """The bytes of the new file from the first to the last, at most 1 MiB at a time."""
        return self.content.pieces()


def slim(buffer: Source, where: str, selection: Selection, *, debug: bool = False) -> Slimmed:
    """The ELF object in `buffer`, which holds the whole file, with the GPU code of `selection` only.

    debug: cut the debug symbols, too. `where` names the object in errors. A selection of all targets, or an object
    without GPU code, has nothing to drop. Raises ElfError for what is not a well-formed ELF object.
    """
    packing = _pack(buffer, where, selection)
    symbols = _debug_symbols(buffer, where) if debug else DebugSymbols()
    doubts = [why for why in (packing.why, symbols.why_kept) if why]
    for way in _ways(packing, symbols):
        try:
            content = way.apply(buffer, packing, where)
        except ElfError as fault:
            doubts.append(f"{fault.what} ({fault.why})" if fault.why else fault.what)
        else:
            return _slimmed(buffer, content, packing, way.symbols.size, doubts)
    return _slimmed(buffer, unchanged(buffer), packing.undone(), 0, doubts)


class _Moved(NamedTuple):
    """Where the parts of a region go: old file offsets, ascending, and the new ones; the last pair is the end."""

    region: Region
    old: Sequence[int]
    new: Sequence[int]

    def begins(self, address: int) -> bool:
        """Whether something begins there that pointers may lead to; only an item's end is the end of a region."""
        starts = self.old if self.region.items else self.old[:-1]
        return address - self.region.address + self.region.offset in starts

    def address(self, address: int) -> int:
        """The new address of a container, an item or the end; of a byte inside one, that of the whole."""
        inside = address - self.region.address + self.region.offset
        number = bisect.bisect_right(self.old, inside) - 1
        return address + (self.new[number] - inside if number >= 0 else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Packing:
    """What becomes of the GPU code. free: the ends of the regions. writes: at an offset, what is there instead."""

    kept: Tally
    dropped: Tally
    free: tuple[Span, ...] = ()
    writes: Mapping[int, Content] = field(default_factory=dict)
    moved: tuple[_Moved, ...] = ()
    why: str | None = None

    def undone(self) -> _Packing:
        kept = Tally(self.kept.images + self.dropped.images, self.kept.bytes + self.dropped.bytes)
        return _Packing(kept=kept, dropped=Tally(0, 0), why=self.why)


class _Way(NamedTuple):
    """One way to make the new file: what leaves it, and what is zeroed in it."""

    free: tuple[Span, ...]
    zero: tuple[Span, ...]
    symbols: DebugSymbols

    def apply(self, buffer: Source, packing: _Packing, where: str) -> Cut:
        values = _symbol_values(buffer, packing.moved, self.symbols.sections, where)
        return cut(
            buffer, (*self.free, *self.symbols.ranges), {**packing.writes, **values}, where,
            drop_sections=self.symbols.sections, zero=self.zero,
        )  # fmt: skip


def _ways(packing: _Packing, symbols: DebugSymbols) -> Iterator[_Way]:
    """From the best to the least."""
    choices = (symbols, DebugSymbols()) if symbols.sections else (symbols,)
    if packing.free:
        yield from (_Way(packing.free, (), choice) for choice in choices)
        yield from (_Way((), packing.free, choice) for choice in choices)
    elif symbols.sections:
        yield _Way((), (), symbols)


def _slimmed(buffer: Source, content: Cut, packing: _Packing, debug: int, doubts: Sequence[str]) -> Slimmed:
    how: Literal["shrunk", "compacted", "unchanged"] = "compacted" if packing.free else "unchanged"
    return Slimmed(
        how="shrunk" if content.size < len(buffer) else how, why="; ".join(dict.fromkeys(doubts)) or None,
        kept=packing.kept, dropped=packing.dropped, debug=debug, content=content,
    )  # fmt: skip


def _debug_symbols(buffer: Source, where: str) -> DebugSymbols:
    try:
        return find_debug(buffer, where)
    except ElfError as fault:
        return DebugSymbols(why_kept=fault.what)


# Packing.


def _pack(buffer: Source, where: str, selection: Selection) -> _Packing:
    code = read_gpu_code(buffer, where)
    if code.damaged:
        raise ElfError(code.damaged, where=where, fix="Leave this file as it is.")
    containers = [one for region in code.regions for one in region.containers]
    everything = _tally(entry for one in containers for entry in one.entries)
    if code.doubts or not selection.sms:
        doubts = "the GPU code stays: " + "; ".join(code.doubts) if code.doubts and selection.sms else None
        return _Packing(kept=everything, dropped=Tally(0, 0), why=doubts)
    packer = _Packer(code, selection)
    packer.run(buffer)
    kept = _tally(packer.kept)
    return _Packing(
        kept=kept, dropped=Tally(everything.images - kept.images, everything.bytes - kept.bytes),
        free=tuple(packer.free), writes=packer.writes if packer.free else {}, moved=tuple(packer.moved),
    )  # fmt: skip


def _tally(entries: Iterable[Entry]) -> Tally:
    images = size = 0
    for entry in entries:
        images, size = images + 1, size + entry.end - entry.start
    return Tally(images, size)


class _Packer:
    """Packs region by region; `writes` says what the file has instead, at offsets of the source."""

    def __init__(self, code: GpuCode, selection: Selection) -> None:
        self.code = code
        self.chosen = kept_entries(code, selection)
        self.kept: list[Entry] = []
        self.free: list[Span] = []
        self.writes: dict[int, Content] = {}
        self.moved: list[_Moved] = []

    def run(self, buffer: Source) -> None:
        for region in self.code.regions:
            self._region(region)
        targets = {one.container: one.pointer for one in self.code.wrappers}
        for moved in self.moved:
            for one in moved.region.containers:
                if one.start in targets:
                    self._point(buffer, targets[one.start], moved)
            for item in moved.region.items:
                for pointer in (*item.ends, *item.starts):
                    self._point(buffer, pointer, moved)

    def _region(self, region: Region) -> None:
        units = [(one.start, one.end, one.container) for one in region.items]
        units = units or [(one.start, one.end, one) for one in region.containers]
        stay = max((end for start, end, _ in units if start in self.code.pinned), default=region.offset)
        at = units[0][0] if units else region.offset
        new, behind = [], at
        for start, end, container in units:
            at = start if end <= stay else self._aligned(region, behind, start, at)
            new.append(at)
            at = self._stays(container, end) if end <= stay else self._unit(start, end, container, at)
            behind = end
        region_end = region.offset + region.size
        if units and at < units[-1][1]:
            self.free.append(Span(at, region_end))
            self.moved.append(_Moved(region, [*(start for start, _, _ in units), region_end], [*new, at]))

    def _stays(self, container: Container | None, end: int) -> int:
        self.kept += container.entries if container else ()
        return end

    def _aligned(self, region: Region, behind: int, start: int, at: int) -> int:
        """Where what begins at `start`, after what ended at `behind`, may begin when `at` is the first free byte."""
        place = at + (region.offset - region.address - at) % region.align
        if at < place and (at, place) != (behind, start):
            self.writes[at] = bytes(place - at)
        return place

    def _unit(self, start: int, end: int, container: Container | None, at: int) -> int:
        """Put a container, or an item, at `at`; what is behind an item's container goes with it."""
        if container:
            entries = [container.entries[index] for index in sorted(self.chosen[container.start])]
            self.kept += entries
            size = sum(entry.end - entry.start for entry in entries)
            if at != start or size != container.end - container.start - CONTAINER_HEADER.size:
                self.writes[at] = CONTAINER_HEADER.pack(CONTAINER_MAGIC, _VERSION, CONTAINER_HEADER.size, size)
            at += CONTAINER_HEADER.size
            for entry in entries:
                at = self._move(entry.start, entry.end, at)
            start = container.end
        return self._move(start, end, at)

    def _move(self, start: int, end: int, at: int) -> int:
        if at != start and start < end:
            self.writes[at] = Span(start, end)
        return at + end - start

    def _point(self, buffer: Source, pointer: Pointer, moved: _Moved) -> None:
        """Lead a pointer to where its target went. RELR has the address in the word, RELA in a row or in both."""
        new = _WORD.pack(moved.address(pointer.target))
        old = _WORD.pack(pointer.target)
        if new == old:
            return
        if pointer.row is not None:
            self.writes[pointer.row + _ADDEND_AT] = new
        if pointer.row is None or bytes(buffer[pointer.offset : pointer.offset + _WORD.size]) == old:
            self.writes[pointer.offset] = new


def _symbol_values(
    buffer: Source, moved: Sequence[_Moved], cut_sections: Sequence[int], where: str
) -> dict[int, Content]:
    """The new values of the symbols in what moved, in the symbol tables that stay."""
    if not moved:
        return {}
    sections = read_tables(buffer, where).sections
    values: dict[int, Content] = {}
    for number, section in enumerate(sections):
        if section.kind == SHT_SYMTAB and number not in cut_sections:
            values |= _table_values(buffer, section, sections, moved, where)
    return values


def _table_values(
    buffer: Source, table: Section, sections: Sequence[Section], moved: Sequence[_Moved], where: str
) -> dict[int, Content]:
    rows = np.frombuffer(bytes(buffer[table.offset : table.end - table.size % SYMBOL.itemsize]), SYMBOL)
    values: dict[int, Content] = {}
    for one in moved:
        place = (one.region.address, one.region.offset, one.region.size)
        number = next(index for index, section in enumerate(sections) if section[3:6] == place)
        for row in np.flatnonzero(rows["section"] == number).tolist():
            old = int(rows["value"][row])
            new = one.address(old) if one.region.address <= old <= one.region.address + one.region.size else old
            if new != old:
                if not one.begins(old):
                    raise ElfError("a symbol names a place inside GPU code", where=where, why=f"{old:#x}")
                values[table.offset + row * SYMBOL.itemsize + _VALUE_AT] = _WORD.pack(new)
    return values
