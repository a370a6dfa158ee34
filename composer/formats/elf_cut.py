"""Cut bytes out of an ELF64 shared object so that every virtual address stays.

What no segment maps (symbol tables, debug information) leaves the file as it is. What a PT_LOAD maps leaves it in whole
pages: the segment is split in two around a hole in the address space, and what is left of the range at the hole's two
ends is zeroed. Everything behind a cut moves down in the file, by a multiple of the page size where it is mapped, so
that offset and address stay congruent; p_align is lowered to the page size where it asked for more (NVIDIA links with
2 MB). Only the headers know offsets, so only they change. A program header table that grew goes to the front of a freed
range, where a segment maps it, as its old place has no room behind it.

Nothing is copied but the headers: the result is a list of spans of the source and a few small pieces. Sources: System V
gABI chapters 4 and 5; glibc's `elf/dl-load.c` and `dl-map-segments.h` (holes are mapped PROT_NONE, offset and address
congruent modulo p_align).
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from composer.errors import ElfError
from composer.formats.elf import Readable, load_faults, read_elf
from composer.formats.elf_damage import damage
from composer.formats.elf_tables import (
    HEADER,
    PT_INTERP,
    PT_LOAD,
    PT_PHDR,
    SECTION,
    SEGMENT,
    SHF_ALLOC,
    SHF_INFO_LINK,
    SHN_LORESERVE,
    SHN_XINDEX,
    SHT_DYNSYM,
    SHT_PROGBITS,
    SHT_REL,
    SHT_RELA,
    SHT_SYMTAB,
    SYMBOL,
    Section,
    Segment,
    Tables,
    read_tables,
)

_PIECE = 1 << 20
_PF_R = 4
# What no segment maps keeps its offset modulo this: no section there asks for more, and its tables need 8.
_LOOSE = 16
_MOST_ADDRESS = 1 << 63
_MOST_FAULTS = 5
_FIX = "Leave this file as it is."


class Span(NamedTuple):
    """Bytes that the source already has, by their offsets: content that is not copied until it is written."""

    start: int
    end: int


Content = bytes | Span


class _Piece(NamedTuple):
    size: int
    content: Content | None  # None: zeros


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """The new file: its size in bytes and, as a Readable, its bytes, put together from the source when asked for."""

    size: int
    _source: Readable = field(repr=False)
    _pieces: Sequence[_Piece] = field(repr=False)
    _starts: Sequence[int] = field(repr=False)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, wanted: slice, /) -> bytes:
        start, stop, _ = wanted.indices(self.size)
        found = []
        number = bisect.bisect_right(self._starts, start) - 1
        while start < stop:
            end = min(stop, self._starts[number + 1])
            found.append(self._part(number, start - self._starts[number], end - self._starts[number]))
            start, number = end, number + 1
        return found[0] if len(found) == 1 else b"".join(found)

    def pieces(self) -> Iterator[bytes]:
        """The bytes from the first to the last, at most 1 MiB at a time."""
        for start in range(0, self.size, _PIECE):
            yield self[start : start + _PIECE]

    def _part(self, number: int, start: int, end: int) -> bytes:
        content = self._pieces[number].content
        if content is None:
            return bytes(end - start)
        if isinstance(content, Span):
            return bytes(self._source[content.start + start : content.start + end])
        return content[start:end]


class _Extent(NamedTuple):
    """Bytes of the source that stay together, and where they go."""

    start: int
    end: int
    to: int


class _Layout:
    """Where each byte of the source goes; `size` is that of the new file."""

    __slots__ = ("extents", "size", "starts")

    def __init__(self, extents: Sequence[_Extent]) -> None:
        self.extents = extents
        self.starts = [extent.start for extent in extents]
        self.size = extents[-1].to + extents[-1].end - extents[-1].start

    def extent(self, offset: int) -> _Extent:
        """The extent that holds `offset`, or the last one before it."""
        return self.extents[max(0, bisect.bisect_right(self.starts, offset) - 1)]

    def moved(self, offset: int) -> int:
        """The new offset; that of the cut for bytes that were cut out."""
        extent = self.extent(offset)
        return extent.to + min(offset, extent.end) - extent.start


class _Edit(NamedTuple):
    """What leaves the file or is zeroed in it, and where the program headers are; all by the source's offsets."""

    removed: Sequence[Span]
    zeroed: Sequence[Span]
    table: int


def cut(
    buffer: Readable,
    free: Iterable[tuple[int, int]],
    overlays: Mapping[int, Content],
    where: str,
    *,
    drop_sections: Collection[int] = (),
    zero: Iterable[tuple[int, int]] = (),
) -> Cut:
    """The object without the `free` byte ranges (start and end offset), in whole pages where a segment maps them.

    overlays: offset in `buffer` to what the new file has there, bytes or a span of the source; must not touch `free`.
    drop_sections: numbers of the sections that leave the section header table; their bytes stay unless they are free.
    zero: ranges that are free as well, but stay in the file as zeros.
    A section whose last bytes are in one of the ranges ends before them in the new file.

    Raises ElfError, naming `where`, when the object or the wish cannot be understood, when something that the loader
    reads is in the way, and when the result could not be loaded.
    """
    tables = read_tables(buffer, where)
    kept = _kept_sections(buffer, tables, frozenset(drop_sections), where)
    ranges, zeros = _merged(free, len(buffer), where), _merged(zero, len(buffer), where)
    if faults := damage(buffer, tables, where):
        raise _fault("it is damaged", where, "; ".join(faults[:_MOST_FAULTS]))
    _check(tables, [*ranges, *zeros], where)
    start, end = (tables.header.sections_at + count * SECTION.size for count in (len(kept), len(tables.sections)))
    edit = _plan(tables, ranges, [Span(start, end)] if start < end else [], where)
    edit = edit._replace(zeroed=[*edit.zeroed, *zeros])
    return _apply(buffer, tables, [*ranges, *zeros], edit, kept, overlays, where)


def unchanged(buffer: Readable) -> Cut:
    """The file as it is."""
    size = len(buffer)
    return Cut(size=size, _source=buffer, _pieces=[_span(0, size)], _starts=[0, size])


def _apply(
    buffer: Readable,
    tables: Tables,
    ranges: Sequence[Span],
    edit: _Edit,
    kept: Sequence[int],
    overlays: Mapping[int, Content],
    where: str,
) -> Cut:
    layout = _layout(tables, edit.removed, len(buffer))
    segments = _segments(tables, edit, layout)
    sections = _sections(tables, ranges, edit, layout, kept, where)
    headers = [
        (0, _header(tables, edit, layout, len(segments), kept)),
        (edit.table, b"".join(SEGMENT.pack(*segment) for segment in segments)),
        *([(tables.header.sections_at, b"".join(SECTION.pack(*section) for section in sections))] if sections else []),
    ]
    written = [(at, _Piece(_length(content), content)) for at, content in (*overlays.items(), *headers)]
    written += [(span.start, _Piece(_length(span), None)) for span in edit.zeroed]
    result = _assembled(buffer, layout, sorted(written, key=lambda pair: pair[0]), where)
    faults = load_faults(read_elf(result, where))
    if faults:
        raise _fault("the loader would refuse what is left after the cut", where, "; ".join(faults))
    return result


def _fault(what: str, where: str, why: str | None = None) -> ElfError:
    return ElfError(what, where=where, why=why, fix=_FIX)


# Ranges.


def _length(content: Content) -> int:
    return content.end - content.start if isinstance(content, Span) else len(content)


def _up(number: int, unit: int) -> int:
    return number + -number % unit


def _merged(free: Iterable[tuple[int, int]], size: int, where: str) -> list[Span]:
    merged: list[Span] = []
    for start, end in sorted(free):
        if not 0 <= start <= end <= size:
            raise _fault("a free range is not inside the file", where, f"{start} to {end} of {size}")
        if merged and start <= merged[-1].end:
            merged[-1] = Span(merged[-1].start, max(end, merged[-1].end))
        elif start < end:
            merged.append(Span(start, end))
    return merged


def _common(ranges: Iterable[Span], start: int, end: int) -> list[Span]:
    """What the ranges have between two offsets."""
    return [
        Span(max(start, span.start), min(end, span.end)) for span in ranges if span.start < end and start < span.end
    ]


def _without(span: Span, ranges: Iterable[Span]) -> Iterator[Span]:
    """What is left of a span, the ranges being sorted and apart."""
    start = span.start
    for taken in _common(ranges, *span):
        if start < taken.start:
            yield Span(start, taken.start)
        start = taken.end
    if start < span.end:
        yield Span(start, span.end)


# What is refused.


def _check(tables: Tables, ranges: Sequence[Span], where: str) -> None:
    for load in tables.loads:
        if load.address + load.memsz > _MOST_ADDRESS:
            raise _fault("a segment cannot be mapped", where, f"at {load.address:#x}")
    for before, after in pairwise(tables.loads):
        if after.offset < before.end:
            raise _fault("its segments overlap or are out of order in the file", where, f"at {after.address:#x}")
    for name, start, end in _taken(tables):
        if _common(ranges, start, end):
            raise _fault(f"a free range holds a part of {name}", where, f"offset {start:#x}")


def _taken(tables: Tables) -> Iterator[tuple[str, int, int]]:
    """The headers, and what the loader finds by a header of its own."""
    header = tables.header
    yield "the ELF header", 0, HEADER.size
    yield "the program headers", header.segments_at, header.segments_at + header.segments * SEGMENT.size
    yield "the section headers", header.sections_at, header.sections_at + header.sections * SECTION.size
    for segment in tables.segments:
        if segment.kind != PT_LOAD:
            yield f"a segment of type {segment.kind:#x}", segment.offset, segment.end


def _kept_sections(buffer: Readable, tables: Tables, dropped: frozenset[int], where: str) -> list[int]:
    """The numbers of the sections that stay, in order; a symbol's section must not change its number."""
    if not dropped:
        return list(range(len(tables.sections)))
    for number in sorted(dropped):
        if not 0 < number < len(tables.sections) or number == tables.header.names:
            raise _fault("a section cannot be dropped", where, f"number {number} of {len(tables.sections)}")
        if tables.sections[number].flags & SHF_ALLOC:
            raise _fault("a section that is in memory cannot be dropped", where, f"number {number}")
    kept = [number for number in range(len(tables.sections)) if number not in dropped]
    for number in kept:
        if _highest(buffer, tables.sections[number], where) >= min(dropped):
            raise _fault("a symbol names a section behind a dropped one", where, f"symbol table {number}")
    return kept


def _highest(buffer: Readable, section: Section, where: str) -> int:
    """The highest section number that a symbol table names, 0 for any other section."""
    if section.kind not in (SHT_SYMTAB, SHT_DYNSYM) or section.size < SYMBOL.itemsize:
        return 0
    table = bytes(buffer[section.offset : section.end - section.size % SYMBOL.itemsize])
    numbers = np.frombuffer(table, SYMBOL)["section"]
    if (numbers == SHN_XINDEX).any():
        raise _fault("a symbol's section number does not fit 16 bits", where)
    return int(numbers[numbers < SHN_LORESERVE].max(initial=0))


# What leaves, and where the rest goes.


def _plan(tables: Tables, ranges: Sequence[Span], rows: Sequence[Span], where: str) -> _Edit:
    removed, zeroed = _removal(tables, [*ranges, *rows])
    size = _table_size(tables, removed)
    if size <= _table_size(tables, ()):
        return _Edit(removed, zeroed, tables.header.segments_at)
    place = _table_place(tables, ranges, size, where)
    removed, zeroed = _removal(tables, [rest for span in (*ranges, *rows) for rest in _without(span, [place])])
    # The room that it took may have been all that could leave of its range, which then needs no split.
    used = place.start + _table_size(tables, removed)
    return _Edit(removed, [*zeroed, *_without(place, [Span(place.start, used)])], place.start)


def _table_size(tables: Tables, removed: Sequence[Span]) -> int:
    """Bytes of the program headers once the segments are split around what is removed."""
    loads = sum(len(_parts(load, removed)) for load in tables.loads)
    return (len(tables.segments) - len(tables.loads) + loads) * SEGMENT.size


def _removal(tables: Tables, ranges: Sequence[Span]) -> tuple[list[Span], list[Span]]:
    """The bytes that can leave the file, and those that can only be zeroed."""
    loaded = [Span(load.offset, load.end) for load in tables.loads]
    removed = [rest for span in ranges for rest in _without(span, loaded)]
    zeroed: list[Span] = []
    for load in tables.loads:
        for span in _common(ranges, load.offset, load.end):
            whole = _pages(load, span, tables.page)
            removed += whole
            zeroed += _without(span, whole)
    return sorted(removed), zeroed


def _pages(load: Segment, span: Span, page: int) -> list[Span]:
    """The whole pages, in memory, of a span of a segment: none or one run of them; a last part page counts as whole."""
    shift = load.address - load.offset
    start = _up(span.start + shift, page) - shift
    end = span.end if span.end == load.end and load.filesz == load.memsz else span.end - (span.end + shift) % page
    return [Span(start, end)] if start < end else []


def _table_place(tables: Tables, ranges: Sequence[Span], size: int, where: str) -> Span:
    """Room for the program headers at the front of a free range that is mapped, where it costs the fewest pages."""
    if any(segment.kind == PT_INTERP for segment in tables.segments):
        raise _fault("the program headers of a program cannot move", where)
    places = []
    for load in tables.loads:
        for span in _common(ranges, load.offset, load.end if load.flags & _PF_R else load.offset):
            start = _up(span.start, 8)
            left = _pages(load, Span(start + size, span.end), tables.page)
            if start + size <= span.end:
                places.append((-sum(map(_length, left)) + sum(map(_length, _pages(load, span, tables.page))), start))
    if not places:
        raise _fault("there is no room for more program headers", where, f"{size} bytes")
    start = min(places)[1]
    return Span(start, start + size)


def _layout(tables: Tables, removed: Sequence[Span], size: int) -> _Layout:
    edges = sorted({edge for load in tables.loads for edge in (load.offset, load.end)})
    extents: list[_Extent] = []
    at = 0
    for span in _without(Span(0, size), removed):
        inner = [edge for edge in edges if span.start < edge < span.end]
        for start, end in pairwise([span.start, *inner, span.end]):
            mapped = any(load.offset <= start < load.end for load in tables.loads)
            to = at + (start - at) % (tables.page if mapped else _LOOSE)
            extents.append(_Extent(start, end, to))
            at = to + end - start
    return _Layout(extents)


def _parts(load: Segment, removed: Sequence[Span]) -> list[Span]:
    """What is left of a segment in the file; an empty last one holds the memory behind its bytes."""
    parts = list(_without(Span(load.offset, load.end), removed))
    if load.memsz > load.filesz and (not parts or parts[-1].end < load.end):
        parts.append(Span(load.end, load.end))
    return parts


# The headers of the new file.


def _segments(tables: Tables, edit: _Edit, layout: _Layout) -> list[Segment]:
    moved: list[Segment] = []
    for segment in tables.segments:
        if segment.kind == PT_LOAD:
            moved += [_load(segment, part, tables.page, layout) for part in _parts(segment, edit.removed)]
        else:
            moved.append(segment._replace(offset=layout.moved(segment.offset)))
    return [
        _own(tables, segment, edit, layout, len(moved)) if segment.kind == PT_PHDR else segment for segment in moved
    ]


def _load(load: Segment, part: Span, page: int, layout: _Layout) -> Segment:
    inside = part.start - load.offset
    address = load.address + inside
    offset = layout.moved(part.start)
    if part.start == part.end:  # no byte of the file is mapped, but the loader compares all the same
        lower = offset - (offset - address) % page
        offset = lower if lower >= 0 else lower + page
    last = part.end == load.end
    return load._replace(
        offset=offset,
        address=address,
        physical=(load.physical + inside) % 2**64,
        filesz=_length(part),
        memsz=_length(part) + (load.memsz - load.filesz if last else 0),
        align=load.align if load.align and (address - offset) % load.align == 0 else page,
    )


def _own(tables: Tables, segment: Segment, edit: _Edit, layout: _Layout, count: int) -> Segment:
    """PT_PHDR, which says where the program headers are themselves."""
    size = count * SEGMENT.size
    address = segment.address
    for load in tables.loads:
        if load.offset <= edit.table < load.end:
            address = load.address + edit.table - load.offset
    return segment._replace(offset=layout.moved(edit.table), address=address, physical=address, filesz=size, memsz=size)


def _header(tables: Tables, edit: _Edit, layout: _Layout, segments: int, kept: Sequence[int]) -> bytes:
    header = tables.header
    changed = header._replace(segments_at=layout.moved(edit.table), segments=segments)
    if kept:
        changed = changed._replace(
            sections_at=layout.moved(header.sections_at), sections=len(kept), names=kept.index(header.names)
        )
    return HEADER.pack(*changed)


def _sections(
    tables: Tables, ranges: Sequence[Span], edit: _Edit, layout: _Layout, kept: Sequence[int], where: str
) -> list[Section]:
    numbers = {old: new for new, old in enumerate(kept)}
    moved = []
    for old in kept:
        section = tables.sections[old]
        try:
            link = numbers[section.link] if section.link else 0
            info = numbers[section.info] if _names_a_section(section) else section.info
        except KeyError as fault:
            raise _fault("a section refers to one that is dropped or missing", where, f"section {old}") from fault
        size = _left(section, old, ranges, edit.removed, where)
        moved.append(section._replace(offset=layout.moved(section.offset), size=size, link=link, info=info))
    return moved


def _names_a_section(section: Section) -> bool:
    return bool(section.info and (section.flags & SHF_INFO_LINK or section.kind in (SHT_REL, SHT_RELA)))


def _left(section: Section, number: int, ranges: Sequence[Span], removed: Sequence[Span], where: str) -> int:
    """The bytes of a section that it keeps: those before a free range that goes to its end."""
    size = section.size
    for span in _common(ranges, section.offset, section.end):
        if section.kind != SHT_PROGBITS:
            raise _fault("a free range holds a part of a table", where, f"section {number}")
        if span.end == section.end:
            size = span.start - section.offset
    if _common(removed, section.offset, section.offset + (size if section.end > section.offset else 0)):
        raise _fault("a cut would leave a hole in a section", where, f"section {number}")
    return size


# The bytes of the new file.


def _assembled(buffer: Readable, layout: _Layout, written: Sequence[tuple[int, _Piece]], where: str) -> Cut:
    pieces: list[_Piece] = []
    todo = iter(written)
    at, piece = next(todo, (len(buffer), None))
    end = 0
    for extent in layout.extents:
        pieces.append(_Piece(extent.to - end, None))
        start = extent.start
        while piece and at < extent.end:
            if at < start or at + piece.size > extent.end:
                raise _fault("a change of bytes that are cut, or changed twice", where, f"at offset {at:#x}")
            pieces += (_span(start, at), piece)
            start = at + piece.size
            at, piece = next(todo, (len(buffer), None))
        pieces.append(_span(start, extent.end))
        end = extent.to + extent.end - extent.start
    if piece:
        raise _fault("a change behind the end of the file", where, f"at offset {at:#x}")
    pieces = [piece for piece in pieces if piece.size]
    return Cut(size=end, _source=buffer, _pieces=pieces, _starts=[*accumulate((p.size for p in pieces), initial=0)])


def _span(start: int, end: int) -> _Piece:
    return _Piece(end - start, Span(start, end))
