"""What the GPU code of an object is for: who points to it, and which images the driver could pick for a GPU.

The proof of a slimmed library states here, in its own words, what must not be lost.
"""

from __future__ import annotations

import bisect
import itertools
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from composer.errors import ElfError
from composer.proofs._slim_pointers import Pointer, Words, code_addresses, named_addresses, pointers_into
from composer.proofs._slim_reader import (
    SHT_NOBITS,
    Container,
    Entry,
    Kind,
    Object,
    Section,
    read_container,
    read_contiguous,
)

FATBIN, RELFATBIN, CASK = ".nv_fatbin", "__nv_relfatbin", ".cask_resource"
REGIONS = (FATBIN, RELFATBIN, CASK)
# NVIDIA's Tegra parts run only code made for them, and other parts none of it. CUDA 13 calls 101 110.
_TEGRA = frozenset({53, 62, 72, 87, 110})
_WRAPPER_MAGIC = 0x466243B1
_RENAMED = {101: 110}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrapped:
    """A container and the one wrapper that leads to it."""

    container: Container
    pointer: Pointer
    version: int
    region: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """What is between two neighbouring bounds of .cask_resource: a container and a tail, or only a tail."""

    start: int
    end: int
    container: Container | None

    @property
    def tail(self) -> int:
        """Where the bytes behind the container start, or the item when it has none."""
        return self.container.end if self.container else self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """The GPU code of an object, where all that points to it is known.

    `open` are the regions that may change; `pinned` are containers in them that may not; `pairs` are the words that
    bound the items.
    """

    open: tuple[Section, ...]
    wrapped: tuple[Wrapped, ...]
    pinned: tuple[Container, ...]
    items: tuple[Item, ...]
    pairs: tuple[Pointer, ...]

    @property
    def pointers(self) -> tuple[Pointer, ...]:
        """All words that lead to GPU code and may change with it."""
        return (*(one.pointer for one in self.wrapped), *self.pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Others:
    """Addresses in GPU code that are named by symbols or relocations, or computed by machine code."""

    named: Sequence[int]
    computed: frozenset[int]

    def reach(self, what: Container | Item) -> bool:
        """Whether something points there. What is computed counts at the start only: elsewhere it is chance."""
        at = bisect.bisect_left(self.named, what.start)
        return what.start in self.computed or (at < len(self.named) and self.named[at] < what.end)


def read_code(elf: Object) -> Code:
    """Find the GPU code of an object and the words that point to it.

    A region that is not wholly understood is left out; a container with no wrapper, or with anything else that points
    into it, is pinned.
    """
    regions = [section for section in elf.sections if _is_region(elf, section)]
    if not regions:
        return Code(open=(), wrapped=(), pinned=(), items=(), pairs=())
    pointers = pointers_into(elf, [(region.address, region.end) for region in regions])
    others = _Others(
        named=sorted(_within(named_addresses(elf), regions)),
        computed=frozenset().union(*(_within(found, regions) for found in code_addresses(elf))),
    )
    parts = [_read_region(elf, region, pointers, others) for region in regions]
    return Code(
        open=tuple(region for part in parts for region in part.open),
        wrapped=tuple(one for part in parts for one in part.wrapped),
        pinned=tuple(one for part in parts for one in part.pinned),
        items=tuple(item for part in parts for item in part.items),
        pairs=tuple(pointer for part in parts for pointer in part.pairs),
    )


def _read_region(elf: Object, region: Section, pointers: Sequence[Pointer], others: _Others) -> Code:
    mine = [pointer for pointer in pointers if region.address <= pointer.target < region.end]
    if region.name == CASK:
        ends = [pointer for pointer in pointers if pointer.target == region.end]
        return _read_items(elf, region, [*mine, *ends], others)
    opened: list[Section] = []
    wrapped: list[Wrapped] = []
    pinned: list[Container] = []
    if containers := read_contiguous(elf, region.address, region.end, region.align):
        opened.append(region)
        for container, found in _pointed(containers, mine):
            one = None if others.reach(container) else _wrapped(elf, container, found, region.name)
            pinned += [container] if one is None else []
            wrapped += [] if one is None else [one]
    return Code(open=tuple(opened), wrapped=tuple(wrapped), pinned=tuple(pinned), items=(), pairs=())


def _read_items(elf: Object, region: Section, pointers: Sequence[Pointer], others: _Others) -> Code:
    bounds = _bounds(pointers)
    items = list(_items(elf, bounds))
    if bounds[:1] + bounds[-1:] != [region.address, region.end] or any(others.reach(item) for item in items):
        return Code(open=(), wrapped=(), pinned=(), items=(), pairs=())
    return Code(open=(region,), wrapped=(), pinned=(), items=tuple(items), pairs=tuple(pointers))


def _within(addresses: Words, regions: Sequence[Section]) -> set[int]:
    return {
        address
        for region in regions
        for address in addresses[(addresses >= region.address) & (addresses < region.end)].tolist()
    }


def _is_region(elf: Object, section: Section) -> bool:
    return (
        section.name in REGIONS
        and section.kind != SHT_NOBITS
        and elf.offset_of(section.address, section.size) == section.offset
    )


def _pointed(containers: Sequence[Container], pointers: Iterable[Pointer]) -> Iterator[tuple[Container, list[Pointer]]]:
    """Each container with what points into it, in order."""
    queue = sorted(pointers, key=lambda pointer: pointer.target)
    at = 0
    for container in containers:
        first = at
        while at < len(queue) and queue[at].target < container.end:
            at += 1
        yield container, queue[first:at]


def _wrapped(elf: Object, container: Container, found: Sequence[Pointer], region: str) -> Wrapped | None:
    if len(found) != 1 or found[0].target != container.start:
        return None
    version = _wrapper_version(elf, found[0].place)
    if version is None:
        return None
    return Wrapped(container=container, pointer=found[0], version=version, region=region)


def _wrapper_version(elf: Object, place: int) -> int | None:
    """The version of the wrapper whose pointer to a container is at `place`; None when there is no wrapper."""
    try:
        magic, version = struct.unpack("<II", elf.at(place - 8, 8))
    except ElfError:
        return None
    return version if magic == _WRAPPER_MAGIC and version in (1, 2) else None


def _bounds(pointers: Sequence[Pointer]) -> list[int]:
    """Where items of .cask_resource start and end, in order: nothing unless all pointers are {end, start} pairs."""
    by_place = {pointer.place: pointer.target for pointer in pointers}
    loose = set(by_place)
    for place, end in by_place.items():
        if by_place.get(place + 8, end) < end:
            loose -= {place, place + 8}
    return [] if loose or len(by_place) != len(pointers) else sorted(set(by_place.values()))


def _items(elf: Object, bounds: Sequence[int]) -> Iterator[Item]:
    for start, end in itertools.pairwise(bounds):
        try:
            container = read_container(elf, start)
        except ElfError:
            container = None
        if container is not None and container.end > end:
            container = None
        yield Item(start=start, end=end, container=container)


def needed(code: Code, one: Wrapped, sms: Sequence[int], *, keep_ptx: bool) -> set[int]:
    """Which entries of a wrapped container must stay, by position.

    __nv_relfatbin is what the driver links again when a device-linked container (a wrapper of version 2) has no image
    for the GPU; only then is it read.
    """
    entries = one.container.entries
    if one.region != RELFATBIN or not sms:
        return pickable(entries, sms, keep_ptx=keep_ptx)
    linked = [other.container.entries for other in code.wrapped if other.version == 2 and other.region == FATBIN]
    if not linked:
        return pickable(entries, sms, keep_ptx=keep_ptx)
    found = _unknown(entries)
    for sm in sms:
        if not all(_has_image(images, sm) for images in linked):
            found |= pickable(entries, (sm,), keep_ptx=keep_ptx)
        elif keep_ptx:
            found |= _later_ptx(entries, sm)
    return found


def _has_image(entries: Sequence[Entry], sm: int) -> bool:
    return any(entry.kind == "elf" and _runs(entry, sm) for entry in entries)


def _unknown(entries: Sequence[Entry]) -> set[int]:
    return {at for at, entry in enumerate(entries) if entry.kind == "other"}


def pickable(entries: Sequence[Entry], sms: Sequence[int], *, keep_ptx: bool) -> set[int]:
    """Which entries of a container a driver could pick on any of these GPUs, by position; no GPUs mean all.

    - Machine code of the highest SM that the GPU runs; without one, PTX of the highest SM that it can compile.
    - LTO-IR of the highest SM that the GPU can compile.
    - What is of an unknown kind: always.
    - With `keep_ptx`, the PTX for the GPU and for each one after it.
    """
    if not sms:
        return set(range(len(entries)))
    found = _unknown(entries)
    for sm in sms:
        code = [at for at in enumerate(entries) if at[1].kind == "elf" and _runs(at[1], sm)]
        found |= _highest((at, _number(entry.sm)) for at, entry in code)
        found |= _newest(entries, "lto", sm)
        if keep_ptx or not code:
            found |= _newest(entries, "ptx", sm)
        if keep_ptx:
            found |= _later_ptx(entries, sm)
    return found


def _newest(entries: Sequence[Entry], kind: Kind, sm: int) -> set[int]:
    usable = [at for at in enumerate(entries) if at[1].kind == kind and _compiles(at[1], sm)]
    return _highest((at, _number(entry.sm)) for at, entry in usable)


def _later_ptx(entries: Sequence[Entry], sm: int) -> set[int]:
    """What GPUs after this one could compile: the best up to it, and each one above."""
    portable = [
        (at, _number(entry.sm)) for at, entry in enumerate(entries) if entry.kind == "ptx" and not entry.variant
    ]
    wanted = _number(sm)
    return _highest(one for one in portable if one[1] <= wanted) | {at for at, made in portable if made > wanted}


def _highest(found: Iterable[tuple[int, int]]) -> set[int]:
    """The positions of those rows (position, SM) that have the highest SM."""
    rows = list(found)
    top = max((sm for _, sm in rows), default=0)
    return {at for at, sm in rows if sm == top}


def _number(sm: int) -> int:
    return _RENAMED.get(sm, sm)


def _runs(entry: Entry, sm: int) -> bool:
    """NVIDIA, Blackwell compatibility guide: same major, same or higher minor; `a` exactly, `f` within its family."""
    made, wanted = _number(entry.sm), _number(sm)
    if entry.variant == "a" or made in _TEGRA or wanted in _TEGRA:
        return made == wanted
    return made // 10 == wanted // 10 and made <= wanted


def _compiles(entry: Entry, sm: int) -> bool:
    made, wanted = _number(entry.sm), _number(sm)
    if entry.variant == "a":
        return made == wanted
    return made <= wanted and (entry.variant != "f" or made // 10 == wanted // 10)
