"""Where an ELF64 object keeps GPU code, and who points at it.

Fat binaries (see `fatbin`) are in `.nv_fatbin`, and in `__nv_relfatbin` those that device-linked code was made from.
The CUDA runtime finds them by 24-byte wrappers in `.nvFatBinSegment`: u32 magic 0x466243B1, u32 version, u64 pointer to
the container, u64 pointer for the runtime's own use; version 2 is device-linked code. The pointers are relative
relocations. `.cask_resource` (cuBLASLt, cuDNN, cuSPARSELt) is filled with items back to back, each a container or other
data with a tail of 8 zero bytes; `.data` has two words for each, its end and its start, and the end of an item is the
start of the next. All this was measured: nothing documents it. So an object whose GPU code shall move has to prove that
it is so made: every deviation is returned as a doubt.
"""

from __future__ import annotations

import itertools
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from composer.errors import ElfError
from composer.formats.elf import Elf, read_elf
from composer.formats.fatbin import CONTAINER_MAGIC, Container, find_containers, read_containers
from composer.formats.instructions import computed_addresses
from composer.formats.references import Pointer, Range, References, Source, read_references
from composer.formats.sections import PROGBITS, Section, SectionTable, read_sections
from composer.model.gpu import Selection, select, select_relinkable

FATBIN, RELINKABLE, RESOURCE, WRAPPERS = ".nv_fatbin", "__nv_relfatbin", ".cask_resource", ".nvFatBinSegment"
DEVICE_LINKED = 2

_WRAPPER = struct.Struct("<IIQQ")
_WRAPPER_MAGIC = 0x466243B1
_WRAPPER_VERSIONS = (1, DEVICE_LINKED)
_MACHINES = ("x86_64", "aarch64")
_MOST_DOUBTS = 10
_ALIGN, _MOST_ALIGN = 8, 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One item of `.cask_resource`, file offsets `start` to `end`, its tail included.

    ends, starts: the words that hold the addresses of its end, which is the start of the next item, and of its start.
    container: what it holds, at its start; None for other data, which must be kept as it is.
    """

    start: int
    end: int
    ends: tuple[Pointer, ...]
    starts: tuple[Pointer, ...]
    container: Container | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A section that holds containers: file offset, address and size in bytes. items: only of `.cask_resource`.

    align: what the address of every container is a multiple of: 8 on x86_64 and 256 on AArch64, with zeros between
    them (measured in every library of both stacks); 1 in `.cask_resource`, whose items leave no room.
    """

    name: str
    offset: int
    address: int
    size: int
    align: int = 1
    containers: tuple[Container, ...]
    items: tuple[Item, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrapper:
    """24 bytes at file offset `offset` that lead to the container at file offset `container`, by `pointer`."""

    offset: int
    version: int
    container: int
    pointer: Pointer


@dataclass(frozen=True, slots=True, kw_only=True)
class Elsewhere:
    """Containers among the other data of a section: of no known use, so never touched."""

    section: str
    containers: tuple[Container, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuCode:
    """The GPU code of one object.

    Attributes
    ----------
    wrappers: ascending by offset.
    pinned: file offsets of the containers that must stay where and as they are: no wrapper leads there, or something
        besides the wrapper does.
    doubts: why nothing may move; empty when all pointers are proven.
    damaged: why nothing at all of the file may be changed: its tables contradict each other. None for a sound one.
    """

    machine: str
    regions: tuple[Region, ...] = ()
    wrappers: tuple[Wrapper, ...] = ()
    pinned: frozenset[int] = frozenset()
    elsewhere: tuple[Elsewhere, ...] = ()
    doubts: tuple[str, ...] = ()
    damaged: str | None = None


def read_gpu_code(buffer: Source, where: str) -> GpuCode:
    """The GPU code of an ELF object: no regions where it has none, or no section headers.

    Payloads are not read. Raises ElfError for what is not a well-formed ELF object; what is odd about its GPU code
    alone are doubts.
    """
    elf = read_elf(buffer, where)
    if elf.bits != 64 or elf.machine not in _MACHINES:
        return GpuCode(machine=elf.machine)
    table = read_sections(buffer, where)
    draft = _Draft(buffer, elf, table, where)
    draft.read_regions()
    draft.find_elsewhere()
    if draft.regions:
        draft.read_pointers()
    return GpuCode(
        machine=elf.machine, regions=tuple(draft.regions), wrappers=tuple(draft.wrappers),
        pinned=frozenset(draft.pinned), elsewhere=tuple(draft.elsewhere), doubts=tuple(draft.doubts[:_MOST_DOUBTS]),
        damaged=draft.damaged,
    )  # fmt: skip


def kept_entries(code: GpuCode, selection: Selection) -> Mapping[int, frozenset[int]]:
    """For every container in the regions, by file offset, the indices of the entries that a selection keeps.

    Pinned containers keep all of theirs.
    """
    containers = {one.start: one for region in code.regions for one in region.containers}
    linked = [
        containers[one.container].entries
        for one in code.wrappers if one.version == DEVICE_LINKED and one.container in containers
    ]  # fmt: skip
    kept = {}
    for region in code.regions:
        for one in region.containers:
            if one.start in code.pinned:
                kept[one.start] = frozenset(range(len(one.entries)))
            elif region.name == RELINKABLE:
                kept[one.start] = select_relinkable(one.entries, linked, selection)
            else:
                kept[one.start] = select(one.entries, selection)
    return kept


class _Draft:
    """What is known so far of one object."""

    def __init__(self, buffer: Source, elf: Elf, table: SectionTable, where: str) -> None:
        self.buffer = buffer
        self.elf = elf
        self.table = table
        self.where = where
        self.regions: list[Region] = []
        self.wrappers: list[Wrapper] = []
        self.pinned: set[int] = set()
        self.elsewhere: list[Elsewhere] = []
        self.doubts: list[str] = []
        self.damaged: str | None = None
        self.places: dict[int, int] = {}  # address to file offset of every container that a wrapper may lead to

    # What is where

    def read_regions(self) -> None:
        """The three sections, with the containers of those that hold nothing else."""
        for name in (FATBIN, RELINKABLE, RESOURCE):
            found = [one for one in self.table.named(name) if one.kind == PROGBITS and one.size]
            if len(found) > 1:
                self.doubts.append(f"{len(found)} sections are named {name}")
            for section in found:
                self._check_place(section)
                containers = () if name == RESOURCE else self._containers(section)
                self._place(section, containers)
                self.regions.append(Region(
                    name=name, offset=section.offset, address=section.address, size=section.size,
                    align=_alignment(section, containers), containers=containers,
                ))  # fmt: skip
        if self.regions and self.elf.kind not in ("shared", "executable"):
            self.doubts.append(f"it is a {self.elf.kind} object, which no loader has relocated")

    def _containers(self, section: Section) -> tuple[Container, ...]:
        try:
            return read_containers(self.buffer, section.offset, section.end, self.where)
        except ElfError as fault:
            self._doubt(fault)
            return ()

    def _place(self, section: Section, containers: Sequence[Container]) -> None:
        self.places |= {one.start - section.offset + section.address: one.start for one in containers}

    def _doubt(self, fault: ElfError) -> None:
        self.doubts.append(fault.what + (f" ({fault.why})" if fault.why else ""))

    def _check_place(self, section: Section) -> None:
        """A section header may lie; what counts is how the segments map its bytes, and that nothing else is there."""
        mapped = [
            load for load in self.elf.loads
            if load.vaddr <= section.address and section.address + section.size <= load.vaddr + load.filesz
            and section.address - load.vaddr == section.offset - load.offset
        ]  # fmt: skip
        if len(mapped) != 1:
            self.doubts.append(f"{section.name} is not where its header says")
        for other in self.table.sections:
            if other is not section and max(other.offset, section.offset) < min(other.end, section.end):
                self.doubts.append(f"{section.name} and {other.name or 'another section'} overlap")

    def find_elsewhere(self) -> None:
        """Containers in sections of data that are not regions."""
        known = {(region.offset, region.size) for region in self.regions}
        for section in self.table.sections:
            if section.kind != PROGBITS or not section.allocated or section.executable:
                continue
            if (section.offset, section.size) not in known:
                found = find_containers(self.buffer, section.offset, section.end, self.where)
                if found:
                    self.elsewhere.append(Elsewhere(section=section.name, containers=found))
                    self._place(section, found)

    # Who points there

    def read_pointers(self) -> None:
        """Wrappers, items and everything else that refers to the regions."""
        segments = [one for one in self.table.named(WRAPPERS) if one.kind == PROGBITS]
        try:
            found = read_references(
                self.buffer, self.table, [Range(one.address, one.address + one.size) for one in self.regions],
                [Range(one.address, one.address + one.size - 1) for one in segments if one.size], self.where,
            )  # fmt: skip
        except ElfError as fault:
            self._doubt(fault)
            self.damaged = self.doubts[-1]
            return
        self.doubts += [f"a relocation writes into GPU code, at {address:#x}" for address in sorted(found.written)]
        self.doubts += [
            f"{count} relocations for one word, at {word:#x}"
            for word, count in Counter(one.word for one in found.pointers).items() if count > 1
        ]  # fmt: skip
        pointers = {one.word: one for one in found.pointers}
        for segment in segments:
            self._read_wrappers(segment, pointers)
        self._read_resources(pointers)
        self._pin(found, pointers.values())

    def _read_wrappers(self, section: Section, pointers: dict[int, Pointer]) -> None:
        """The wrappers of a section; those of their pointers that are in order are taken out of `pointers`."""
        if section.size % _WRAPPER.size:
            self.doubts.append(f"{section.name} is not a whole number of wrappers")
        for start in range(0, section.size - section.size % _WRAPPER.size, _WRAPPER.size):
            offset = section.offset + start
            magic, version, *_ = _WRAPPER.unpack(self.buffer[offset : offset + _WRAPPER.size])
            pointer = pointers.pop(section.address + start + 8, None)
            container = self.places.get(pointer.target) if pointer else None
            if magic != _WRAPPER_MAGIC or version not in _WRAPPER_VERSIONS:
                self.doubts.append(f"an unknown wrapper at offset {offset:#x}: magic {magic:#010x}, version {version}")
            elif pointer is None or container is None:
                self.doubts.append(f"the wrapper at offset {offset:#x} does not lead to a container")
            else:
                wrapper = Wrapper(offset=offset, version=version, container=container, pointer=pointer)
                self.wrappers.append(wrapper)

    def _read_resources(self, pointers: dict[int, Pointer]) -> None:
        """The items of `.cask_resource`; the words that delimit them are taken out of `pointers`."""
        for index, region in enumerate(self.regions):
            if region.name != RESOURCE:
                continue
            pairs = _pairs(region, pointers)
            for word in [pointer.word for pair in pairs for pointer in pair]:
                del pointers[word]
            items = tuple(self._items(region, pairs))
            self.regions[index] = Region(
                name=region.name, offset=region.offset, address=region.address, size=region.size, items=items,
                containers=tuple(item.container for item in items if item.container),
            )  # fmt: skip

    def _items(self, region: Region, pairs: Sequence[tuple[Pointer, Pointer]]) -> Iterator[Item]:
        spans: dict[tuple[int, int], list[tuple[Pointer, Pointer]]] = {}
        for pair in pairs:
            spans.setdefault((pair[1].target, pair[0].target), []).append(pair)
        edges = [region.address, *(end for _, end in sorted(spans))]
        if [start for start, _ in sorted(spans)] != edges[:-1] or edges[-1] != region.address + region.size:
            self.doubts.append(f"the pointers into {region.name} do not divide it into items")
            return
        for (start, end), found in sorted(spans.items()):
            first, last = (address - region.address + region.offset for address in (start, end))
            container = self._item_container(first, last)
            yield Item(
                start=first, end=last, ends=tuple(pair[0] for pair in found), starts=tuple(pair[1] for pair in found),
                container=container,
            )  # fmt: skip

    def _item_container(self, start: int, end: int) -> Container | None:
        if self.buffer[start : start + 4] != CONTAINER_MAGIC.to_bytes(4, "little"):
            return None
        try:
            found = read_containers(self.buffer, start, end, self.where)
        except ElfError as fault:
            self._doubt(fault)
            return None
        if len(found) > 1:
            self.doubts.append(f"an item of {RESOURCE} holds {len(found)} containers, at offset {start:#x}")
        return found[0]

    def _pin(self, found: References, pointers: Iterable[Pointer]) -> None:
        """Find the containers that must stay. `pointers`: those that are neither of a wrapper nor of an item."""
        led = Counter(wrapper.container for wrapper in self.wrappers)
        twice = [one for one, count in led.items() if count > 1]
        self.doubts += [f"several wrappers lead to the container at offset {one:#x}" for one in twice]
        targets = {one.target for one in pointers} | found.symbolic | self._computed()
        for region in self.regions:
            containers = {one.start for one in region.containers}
            fixed = {target - region.address + region.offset for target in targets}
            for target in sorted(one for one in fixed if region.offset <= one < region.offset + region.size):
                if region.name == RESOURCE or target not in containers:
                    self.doubts.append(f"something points into {region.name}, at offset {target:#x}")
            if region.name != RESOURCE:
                self.pinned |= (containers - led.keys()) | (containers & fixed)

    def _computed(self) -> frozenset[int]:
        """The starts of containers and items that code computes: a compiler has no name for what is inside."""
        addresses = {
            start - region.offset + region.address for region in self.regions
            for start in (*(one.start for one in region.containers), *(one.start for one in region.items))
        }  # fmt: skip
        try:
            return computed_addresses(self.buffer, self.table, self.elf.machine, addresses, self.where)
        except ElfError as fault:
            self._doubt(fault)
            return frozenset()


def _alignment(section: Section, containers: Iterable[Container]) -> int:
    """The section's alignment if it is one, and each container's, too; else that of a container."""
    starts = [one.start - section.offset + section.address for one in containers]
    is_one = _ALIGN <= section.align <= _MOST_ALIGN and section.align.bit_count() == 1
    return section.align if is_one and not any(start % section.align for start in starts) else _ALIGN


def _pairs(region: Region, pointers: Mapping[int, Pointer]) -> list[tuple[Pointer, Pointer]]:
    """Neighbouring words that hold the end and the start of something in the region."""
    words = sorted(
        one.word for one in pointers.values() if region.address <= one.target <= region.address + region.size
    )
    found = []
    skip = False
    for word, following in itertools.pairwise(words):
        if skip:
            skip = False
        elif following == word + 8 and pointers[word].target > pointers[following].target:
            found.append((pointers[word], pointers[following]))
            skip = True
    return found
