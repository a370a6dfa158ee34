"""Whether the header tables of a shared object agree with each other and with what a loader accepts.

An object that they do not agree about may still load. But who edits it would have to choose which table to believe, and
nothing could be proven of the result. No object of a linker, of strip or of patchelf has been seen that fails here.
Sources: System V gABI chapters 4 and 5; glibc's `elf/dl-load.c`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from composer.formats.elf import Readable, load_faults, read_elf
from composer.formats.elf_tables import PT_PHDR, SEGMENT, SHF_ALLOC, Segment, Tables

_SMALLEST_PAGE = 4096


def damage(buffer: Readable, tables: Tables, where: str) -> list[str]:
    """What is wrong with the object, whose tables these are; nothing with a sound one. ElfError as `read_elf`."""
    faults = [] if tables.loads else ["it has no segment to load"]
    faults += [f"segment at {load.address:#x} has no alignment" for load in tables.loads if not load.align]
    faults += load_faults(read_elf(buffer, where))
    faults += [f"segments at {one.address:#x} and {then.address:#x} share a page" for one, then in _sharing(tables)]
    faults += [f"PT_PHDR at {one.address:#x} is not what it says" for one in tables.segments if _is_astray(one, tables)]
    faults += [f"section {number} is not where its header says" for number in _misplaced(tables)]
    places = sorted((one.offset, one.end, number) for number, one in enumerate(tables.sections) if one.offset < one.end)
    faults += [f"sections {one[2]} and {then[2]} overlap" for one, then in pairwise(places) if then[0] < one[1]]
    return faults


def _sharing(tables: Tables) -> Iterator[tuple[Segment, Segment]]:
    """Neighbours of which one would be mapped over a part of the other, in the smallest pages."""
    for one, then in pairwise(tables.loads):
        same = one.address - one.offset == then.address - then.offset and one.flags == then.flags
        if -(-(one.address + one.memsz) // _SMALLEST_PAGE) > then.address // _SMALLEST_PAGE and not (
            same and one.filesz == one.memsz
        ):
            yield one, then


def _is_astray(segment: Segment, tables: Tables) -> bool:
    """Whether it is a PT_PHDR that does not say where the program headers are; lld gives it room for one more."""
    at, size = tables.header.segments_at, tables.header.segments * SEGMENT.size
    return segment.kind == PT_PHDR and not any(
        load.offset <= at and at + size <= load.end and segment.offset == at
        and segment.address == segment.physical == load.address + at - load.offset for load in tables.loads
    )  # fmt: skip


def _misplaced(tables: Tables) -> Iterator[int]:
    """The numbers of the sections that are in memory, but not as the segments have it."""
    for number, section in enumerate(tables.sections):
        if section.flags & SHF_ALLOC and section.offset < section.end and not any(
            load.offset <= section.offset and section.end <= load.end
            and section.address - section.offset == load.address - load.offset for load in tables.loads
        ):  # fmt: skip
            yield number
