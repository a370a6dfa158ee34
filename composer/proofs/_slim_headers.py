"""What must hold between the headers of an ELF object and those of a slimmed one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from composer.proofs._slim_code import REGIONS
from composer.proofs._slim_reader import (
    AARCH64,
    PT_LOAD,
    PT_PHDR,
    SEGMENT_SIZE,
    SHF_ALLOC,
    SHF_INFO_LINK,
    SHT_DYNSYM,
    SHT_NOBITS,
    SHT_NULL,
    SHT_REL,
    SHT_RELA,
    SHT_SYMTAB,
    Object,
    Section,
    Segment,
    difference,
)

# A kernel maps whole pages: of 4 KiB on x86-64, of up to 64 KiB on aarch64.
_PAGES: dict[int, tuple[int, ...]] = {AARCH64: (0x10000, 0x4000)}
_SMALLEST_PAGE = 0x1000
_DEBUG_NAMES = frozenset(
    {".symtab", ".strtab", ".symtab_shndx", ".gdb_index", ".gnu_debugdata", ".gnu_debugaltlink", ".stab", ".stabstr",
     ".debug"}
)  # fmt: skip
_DEBUG_PREFIXES = (".debug_", ".zdebug_", ".rela.debug_", ".gnu.debuglto_")
_SHN_LORESERVE = 0xFF00


def page_size(old: Object) -> int:
    """The largest page, in bytes, that the original can be loaded with; ElfError when there is none."""
    faults: list[str] = []
    for page in (*_PAGES.get(old.machine, ()), _SMALLEST_PAGE):
        faults = list(load_faults(old, page))
        if not faults:
            return page
    raise old.fault(f"cannot be loaded: {faults[0]}")


def load_faults(elf: Object, page: int) -> Iterator[str]:
    """What the loader, on a machine with pages of this size, would refuse or get wrong in the segments."""
    for load in elf.loads:
        align = load.align
        if not align or align & (align - 1) or align % page or (load.address - load.offset) % align:
            yield f"the segment at {load.address:#x} is not aligned to {align:#x} in pages of {page:#x}"
        if load.offset + load.stored > elf.size or load.stored > load.size:
            yield f"the segment at {load.address:#x} is not inside the file"
    for first, then in zip(elf.loads, elf.loads[1:], strict=False):
        if first.end > then.address or (_share_page(first, then, page) and not _same_page(first, then)):
            yield f"the segments at {first.address:#x} and {then.address:#x} overlap"
    if not elf.loads:
        yield "nothing is loaded"


def _share_page(first: Segment, then: Segment, page: int) -> bool:
    return -(-first.end // page) > then.address // page


def _same_page(first: Segment, then: Segment) -> bool:
    """Whether a page that both share has the same bytes and rights, whichever is mapped last."""
    same = first.address - first.offset == then.address - then.offset and first.flags == then.flags
    return same and first.size == first.stored


def header_faults(old: Object, new: Object) -> Iterator[str]:
    """What differs in the ELF header besides the places of the other headers."""
    for name in ("ident", "kind", "machine", "version", "entry", "flags"):
        if getattr(old, name) != getattr(new, name):
            yield f"the ELF header has another {name}"


def table_address(elf: Object) -> int | None:
    """Where the program headers are in memory; None when no segment holds them all."""
    return elf.address_of(elf.phoff, elf.phnum * SEGMENT_SIZE)


def segment_faults(old: Object, new: Object) -> Iterator[str]:
    """Program headers: what is mapped is part of a segment of the original, all else is the same but for its offset."""
    table = table_address(new)
    if table is None:
        yield "the program headers are not mapped"
    for load in new.loads:
        if not any(_is_part(load, whole) for whole in old.loads):
            yield f"the segment at {load.address:#x} is not part of one of the original, with the same rights"
    wanted = [segment for segment in old.segments if segment.kind != PT_LOAD]
    found = [segment for segment in new.segments if segment.kind != PT_LOAD]
    if [segment.kind for segment in wanted] != [segment.kind for segment in found]:
        yield "the kinds of program headers differ"
        return
    for one, other in zip(wanted, found, strict=True):
        expected = one if one.kind != PT_PHDR else _table_segment(one, new, table or 0)
        if replace(expected, offset=other.offset) != other or not _is_placed(old, one, new, other):
            yield f"the program header of kind {one.kind:#x} for {one.address:#x} differs"
    if _table_is_late(new) and not _table_is_late(old):
        yield "PT_PHDR is behind a PT_LOAD"


def _table_is_late(elf: Object) -> bool:
    kinds = [segment.kind for segment in elf.segments]
    return PT_PHDR in kinds and PT_LOAD in kinds[: kinds.index(PT_PHDR)]


def _is_part(part: Segment, whole: Segment) -> bool:
    same = (part.flags, part.physical - part.address) == (whole.flags, whole.physical - whole.address)
    return same and whole.address <= part.address and part.end <= whole.end


def _table_segment(one: Segment, new: Object, table: int) -> Segment:
    size = new.phnum * SEGMENT_SIZE
    return replace(one, address=table, physical=table + one.physical - one.address, stored=size, size=size)


def _is_placed(old: Object, one: Segment, new: Object, other: Segment) -> bool:
    """Whether p_offset is where p_vaddr is; only where that held for the original."""
    if not one.stored or old.offset_of(one.address, one.stored) != one.offset:
        return True
    return new.offset_of(other.address, other.stored) == other.offset


def section_faults(old: Object, new: Object, moves: Mapping[int, int], *, debug: bool) -> Iterator[str]:
    """Section headers, and the bytes of sections that are not mapped.

    `moves` gives the new address of what moved: the values of symbols in .symtab follow it.
    """
    kept = _matched(old, new)
    for index in sorted(set(range(len(old.sections))) - set(kept)):
        section = old.sections[index]
        if not debug or not _is_debug(section):
            yield f"section {section.name!r} is gone"
    for section in (new.sections[index] for index in sorted(set(range(len(new.sections))) - set(kept.values()))):
        yield f"section {section.name!r} is new"
    if old.sections and kept.get(old.names) != new.names:
        yield "the names of sections are in another section"
    for index, now in kept.items():
        yield from _section_pair_faults(old, old.sections[index], new, new.sections[now], kept, moves)


def _matched(old: Object, new: Object) -> dict[int, int]:
    """Which section of the new object each of the original is, by name and in order."""
    kept: dict[int, int] = {}
    for at, section in enumerate(old.sections):
        if len(kept) < len(new.sections) and new.sections[len(kept)].name == section.name:
            kept[at] = len(kept)
    return kept


def _is_debug(section: Section) -> bool:
    named = section.name in _DEBUG_NAMES or section.name.startswith(_DEBUG_PREFIXES)
    return named and not section.flags & SHF_ALLOC


def _section_pair_faults(
    old: Object, one: Section, new: Object, other: Section, kept: Mapping[int, int], moves: Mapping[int, int]
) -> Iterator[str]:
    expected = replace(one, offset=other.offset, link=kept.get(one.link, -1))
    if one.flags & SHF_INFO_LINK or one.kind in (SHT_REL, SHT_RELA):
        expected = replace(expected, info=kept.get(one.info, -1))
    if one.name in REGIONS and one.address <= other.address and other.end <= one.end:
        expected = replace(expected, address=other.address, size=other.size)
    if one is old.sections[old.names]:
        expected = replace(expected, size=other.size)
    if expected != other:
        yield f"the header of section {one.name!r} differs"
    elif not _same_content(old, one, new, other, moves):
        yield f"section {one.name!r} has another content, or is in another place"
    if one.kind in (SHT_DYNSYM, SHT_SYMTAB):
        yield from _symbol_faults(old, one, kept)


def _same_content(old: Object, one: Section, new: Object, other: Section, moves: Mapping[int, int]) -> bool:
    """Whether the bytes are the same; those that are mapped are compared by address, so only their place counts."""
    if not one.size or not other.size or one.kind in (SHT_NULL, SHT_NOBITS) or one is old.sections[old.names]:
        return True
    address = old.address_of(one.offset, one.size)
    if address is not None:
        return new.offset_of(address + other.address - one.address, other.size) == other.offset
    if one.kind == SHT_SYMTAB and moves:
        return _same_symbols(old.read(one.offset, one.size), new.read(other.offset, other.size), moves)
    return difference(old, one.offset, new, other.offset, one.size) is None


def _same_symbols(old: bytes, new: bytes, moves: Mapping[int, int]) -> bool:
    whole = len(old) // 24 * 24  # the table may end in a part of a row, which is no symbol
    if old[whole:] != new[whole:]:
        return False
    was, now = (np.frombuffer(data[:whole], dtype="<u8").reshape(-1, 3) for data in (old, new))
    changed = np.flatnonzero((was != now).any(axis=1))
    if (was[changed][:, ::2] != now[changed][:, ::2]).any():
        return False
    pairs = zip(was[changed, 1].tolist(), now[changed, 1].tolist(), strict=True)
    return all(moves.get(value) == moved for value, moved in pairs)


def _symbol_faults(old: Object, table: Section, kept: Mapping[int, int]) -> Iterator[str]:
    """A symbol names its section by number, and its table is not rewritten."""
    data = np.frombuffer(old.read(table.offset, table.size // 24 * 24), dtype="<u2").reshape(-1, 12)
    for index in np.unique(data[:, 3]).tolist():
        if 0 < index < min(_SHN_LORESERVE, len(old.sections)) and kept.get(index) != index:
            yield f"symbols of {table.name!r} name section {index}, which is another one now"
