"""Prove, from the bytes alone, that a slimmed shared object is the original less GPU code that its targets never run.

The proof shares no code with what slims: it reads both files as the loader does, by address. Memory must be the same
byte for byte, but for regions of GPU code, the words that point into them, and the file's own headers; each container
must be reachable as before and hold, unchanged, at least the images that a driver could pick.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from composer.errors import ElfError
from composer.proofs._slim_code import CASK, FATBIN, Code, Item, needed, pickable, read_code
from composer.proofs._slim_headers import (
    header_faults,
    load_faults,
    page_size,
    section_faults,
    segment_faults,
    table_address,
)
from composer.proofs._slim_pointers import Pointer
from composer.proofs._slim_reader import (
    SECTION_SIZE,
    SEGMENT_SIZE,
    Container,
    Entry,
    Object,
    Readable,
    Run,
    difference,
    read_container,
)

# e_phoff, e_shoff, and from e_phnum to e_shstrndx: what says where headers are, when the ELF header is mapped.
_HEADER_WORDS = ((32, 48), (56, 58), (60, 64))
_LISTED = 8  # differences of memory that an error lists; a shifted file differs everywhere


def prove_slimmed(
    before: Readable, after: Readable, where: str, sms: Sequence[int], *, keep_ptx: bool, debug: bool
) -> None:
    """Raise ElfError with each fault of `after` as a slimmed `before`; return when there is none.

    `sms` are the targets (90 for compute capability 9.0); with none, all images must be there. `keep_ptx`: PTX for
    later GPUs must be there too. `debug`: debug symbols may be gone. ElfError also when one of the two cannot be read.
    """
    old, new = Object(before, f"{where} (original)"), Object(after, f"{where} (slimmed)")
    page = page_size(old)
    case = _Case(old=old, new=new, code=read_code(old))
    case.follow()
    faults = [
        *header_faults(old, new),
        *load_faults(new, page),
        *segment_faults(old, new),
        *section_faults(old, new, case.addresses, debug=debug),
        *case.faults,
        *_container_faults(case, sms, keep_ptx=keep_ptx),
        *_item_faults(case, sms, keep_ptx=keep_ptx),
        *_place_faults(case),
        *_room_faults(case),
        *_alignment_faults(case),
        *_memory_faults(case),
    ]
    ElfError.collect([ElfError(fault, where=where) for fault in faults])


def kept_images(before: Readable, after: Readable, where: str) -> tuple[str, ...]:
    """The machine code in .nv_fatbin that can be reached in a slimmed object, in the order of addresses.

    In the words of `cuobjdump -lelf`, which lists just this section: sm_90, sm_90a. Raises ElfError when one of the
    two cannot be read.
    """
    old = Object(before, where)
    case = _Case(old=old, new=Object(after, where), code=read_code(old))
    case.follow()
    regions = [region for region in case.code.open if region.name == FATBIN]
    containers = [
        container
        for container in [*case.containers.values(), *case.code.pinned]
        if any(region.address <= container.start < region.end for region in regions)
    ]
    entries = [entry for one in sorted(containers, key=lambda one: one.start) for entry in one.entries]
    return tuple(f"sm_{entry.sm}{entry.variant}" for entry in entries if entry.kind == "elf")


@dataclass(slots=True, kw_only=True)
class _Case:
    """Both objects, and where GPU code of the original is now: by old address, the new one and the container there."""

    old: Object
    new: Object
    code: Code
    addresses: dict[int, int] = field(default_factory=dict)
    containers: dict[int, Container] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def follow(self) -> None:
        """Read all pointers of the new object, and the containers that they lead to."""
        for pointer in self.code.pointers:
            self._follow(pointer)
        items = [item.container for item in self.code.items if item.container]
        for container in [*(one.container for one in self.code.wrapped), *items]:
            if container.start in self.addresses:
                self._find(container.start, self.addresses[container.start])

    def _follow(self, pointer: Pointer) -> None:
        try:
            target = self.new.word(pointer.slot)
        except ElfError as fault:
            self.faults.append(fault.what)
            return
        if self.addresses.setdefault(pointer.target, target) != target:
            self.faults.append(f"words that all pointed to {pointer.target:#x} now point to different addresses")

    def _find(self, start: int, now: int) -> None:
        try:
            self.containers[start] = read_container(self.new, now)
        except ElfError as fault:
            self.faults.append(f"the pointer to the container at {start:#x} now leads to {now:#x}: {fault.what}")

    def same(self, start: int, now: int, size: int) -> bool:
        """Whether `size` bytes at an address of the original are stored, unchanged, at `now` in the new object."""
        at, then = self.old.offset_of(start, size), self.new.offset_of(now, size)
        return at is not None and then is not None and difference(self.old, at, self.new, then, size) is None


def _container_faults(case: _Case, sms: Sequence[int], *, keep_ptx: bool) -> Iterator[str]:
    """Wrapped containers hold what they must and nothing else; pinned ones are where they were."""
    for one in case.code.wrapped:
        yield from _entry_faults(case, one.container, needed(case.code, one, sms, keep_ptx=keep_ptx))
    for container in case.code.pinned:
        if not case.same(container.start, container.start, container.end - container.start):
            yield f"the container at {container.start:#x}, which no wrapper alone leads to, has changed"


def _entry_faults(case: _Case, was: Container, wanted: set[int]) -> Iterator[str]:
    now = case.containers.get(was.start)
    if now is None:
        return  # told when it could not be found
    kept: set[int] = set()
    at = 0
    for entry in now.entries:
        while at < len(was.entries) and not _same_entry(case, was.entries[at], entry):
            at += 1
        if at == len(was.entries):
            yield f"the container at {was.start:#x}, now at {now.start:#x}, holds an image that is not its own"
            return
        kept.add(at)
        at += 1
    if lost := [_title(was.entries[at]) for at in sorted(wanted - kept)]:
        yield f"the container at {was.start:#x}, now at {now.start:#x}, has lost {', '.join(lost)}"


def _title(entry: Entry) -> str:
    return f"{entry.kind} {entry.sm}{entry.variant}"


def _same_entry(case: _Case, one: Entry, other: Entry) -> bool:
    size = one.end - one.start
    return size == other.end - other.start and case.same(one.start, other.start, size)


def _item_faults(case: _Case, sms: Sequence[int], *, keep_ptx: bool) -> Iterator[str]:
    """An item of .cask_resource ends where the next one starts, so its length says what it holds."""
    for item in case.code.items:
        if item.container:
            yield from _entry_faults(case, item.container, pickable(item.container.entries, sms, keep_ptx=keep_ptx))
        found = _item_now(case, item)
        if found is None:
            continue  # told when it could not be found
        tail, end = found
        if end - tail != item.end - item.tail or not case.same(item.tail, tail, end - tail):
            yield f"the item of {CASK} at {item.start:#x} has changed behind its container"


def _item_now(case: _Case, item: Item) -> tuple[int, int] | None:
    """Where the tail and the end of an item are in the new object."""
    start, end = case.addresses.get(item.start), case.addresses.get(item.end)
    container = case.containers.get(item.start)
    if start is None or end is None or (item.container and not container):
        return None
    return container.end if container else start, end


def _place_faults(case: _Case) -> Iterator[str]:
    """Where the loader reads an addend, the word that it fills may hold a copy of it, or what it held."""
    for pointer in case.code.pointers:
        places = case.old.offset_of(pointer.place, 8), case.new.offset_of(pointer.place, 8)
        if pointer.place == pointer.slot or None in places or pointer.target not in case.addresses:
            continue
        allowed = (case.old.word(pointer.place), case.addresses[pointer.target])
        if case.new.word(pointer.place) not in allowed:
            yield f"the pointer at {pointer.place:#x} holds something else than its relocation"


def _room_faults(case: _Case) -> Iterator[str]:
    """Containers lie in their sections, nothing lies in two of them, and what is between them is empty."""
    taken = sorted(_taken(case))
    for (start, end, name), (then, _, other) in itertools.pairwise(taken):
        if end > then:
            yield f"{name} at {start:#x} and {other} at {then:#x} overlap"
    for start, end, name in taken:
        sections = [section for section in case.new.sections if section.name == name]
        if sections and not any(section.address <= start and end <= section.end for section in sections):
            yield f"something of {name} at {start:#x} is outside of that section"
    for region in case.code.open:
        at = region.address
        for start, end, _ in [*taken, (region.end, region.end, "")]:
            yield from _stale(case.new, at, min(start, region.end))
            at = max(at, end)


def _alignment_faults(case: _Case) -> Iterator[str]:
    """Where every container began at a multiple of its section's alignment, each still does."""
    for region in case.code.open:
        mine = [one.container for one in case.code.wrapped if one.region == region.name]
        if not region.align or any(one.start % region.align for one in [*mine, *case.code.pinned]):
            continue
        for one in mine:
            now = case.containers.get(one.start)
            if now and now.start % region.align:
                yield f"the container at {one.start:#x}, now at {now.start:#x}, is not aligned to {region.align} bytes"


def _taken(case: _Case) -> Iterator[tuple[int, int, str]]:
    """Address ranges of the new object's GPU code and program headers: start, end, section."""
    for one in case.code.wrapped:
        if now := case.containers.get(one.container.start):
            yield now.start, now.end, one.region
    for item in case.code.items:
        if found := _item_now(case, item):
            yield case.addresses[item.start], found[1], CASK
    for container in case.code.pinned:
        yield container.start, container.end, "a pinned container"
    if table := table_address(case.new):
        yield table, table + case.new.phnum * SEGMENT_SIZE, "program headers"


def _stale(new: Object, start: int, end: int) -> Iterator[str]:
    for run in new.runs(start, end):
        if run.offset is not None:
            at = difference(new, run.offset, new, None, run.end - run.start)
            if at is not None:
                yield f"bytes at {run.start + at:#x} are left over from what was cut"


def _memory_faults(case: _Case) -> Iterator[str]:
    """Each address of the original is mapped and holds the same byte, but for what may change."""
    found = 0
    free = sorted(_changing(case.old, case.code))
    for load in case.old.loads:
        at = load.address
        for start, end in [*free, (load.end, load.end)]:
            for run in case.old.runs(at, min(start, load.end)):
                for fault in _run_faults(case, run):
                    found += 1
                    if found <= _LISTED:
                        yield fault
            at = max(at, end)
    if found > _LISTED:
        yield f"memory differs in {found - _LISTED} more places"


def _changing(old: Object, code: Code) -> Iterator[tuple[int, int]]:
    """Address ranges that other rules judge: GPU code, the words that lead to it, and what says where headers are."""
    for region in code.open:
        yield region.address, region.end
    for pointer in code.pointers:
        yield pointer.slot, pointer.slot + 8
        yield pointer.place, pointer.place + 8
    header = next((load.address for load in old.loads if load.offset == 0), None)
    if header is not None:
        yield from ((header + start, header + end) for start, end in _HEADER_WORDS)
    if table := table_address(old):
        yield table, table + old.phnum * SEGMENT_SIZE
    # patchelf puts the section headers, which no loader reads, inside the segment that it adds.
    for load in old.loads:
        start, end = max(old.shoff, load.offset), min(old.shoff + old.shnum * SECTION_SIZE, load.offset + load.stored)
        if start < end:
            yield load.address + start - load.offset, load.address + end - load.offset


def _run_faults(case: _Case, run: Run) -> Iterator[str]:
    at = run.start
    for now in case.new.runs(run.start, run.end):
        if now.start > at:
            yield f"addresses from {at:#x} on are no longer mapped"
        offset = None if run.offset is None else run.offset + now.start - run.start
        if offset is not None or now.offset is not None:
            far = difference(case.old, offset, case.new, now.offset, now.end - now.start)
            if far is not None:
                yield f"memory differs at {now.start + far:#x}"
        at = now.end
    if at < run.end:
        yield f"addresses from {at:#x} on are no longer mapped"
