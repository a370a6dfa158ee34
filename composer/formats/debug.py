"""Which bytes of a shared object only debuggers and profilers read, so that they can be cut.

Everything that is in memory stays, so unwinding, exceptions, `dladdr` and dynamic symbols work as before; what goes are
the sections that GNU strip removes by default: DWARF, and the table of local symbols. A backtrace then names exported
functions only. Sources: System V gABI chapter 4; DWARF 5, section 7.3; GDB's manual, "Separate Debug Files".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from composer.formats.elf import Readable
from composer.formats.elf_cut import Span
from composer.formats.elf_tables import SHF_ALLOC, SHT_NOBITS, Section, Tables, read_tables
from composer.formats.sections import read_sections

_PREFIXES = (".debug_", ".zdebug_", ".gnu.debuglto_")
# .gnu_debugdata is MiniDebugInfo, a compressed .symtab. Both links name a file with the symbols by a checksum: of that
# file, not of this one, so .gnu_debuglink stays true and stays here, a few bytes by which a debugger finds what left.
# .gnu_debugaltlink is only read from .debug_info, by forms that refer into the other file.
_NAMES = frozenset(
    {".debug", ".gdb_index", ".symtab", ".symtab_shndx", ".strtab", ".stab", ".stabstr",
     ".gnu_debugdata", ".gnu_debugaltlink"}
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class DebugSymbols:
    """The debug sections of one object.

    Attributes
    ----------
    sections: their numbers, ascending.
    ranges: the bytes that only they use, as file offsets.
    why_kept: why nothing may be cut, None when it may.
    """

    sections: tuple[int, ...] = ()
    ranges: tuple[Span, ...] = ()
    why_kept: str | None = None

    @property
    def size(self) -> int:
        """Bytes that would leave the file."""
        return sum(span.end - span.start for span in self.ranges)


def find_debug(buffer: Readable, where: str) -> DebugSymbols:
    """The debug symbols of an x86-64 or AArch64 shared object. Raises ElfError for what is not one."""
    tables = read_tables(buffer, where)
    names = [section.name for section in read_sections(buffer, where).sections]
    chosen = _chosen(tables, names)
    if not chosen:
        return DebugSymbols()
    sections = [tables.sections[number] for number in chosen]
    why = _why_kept(tables, chosen, names)
    if why:
        return DebugSymbols(why_kept=why)
    return DebugSymbols(
        sections=chosen,
        ranges=tuple(sorted(Span(one.offset, one.end) for one in sections if one.offset < one.end)),
    )


def _chosen(tables: Tables, names: Sequence[str]) -> tuple[int, ...]:
    # LLVM may join .strtab and .shstrtab into one section, which then stays for the names that it holds.
    return tuple(
        number for number, section in enumerate(tables.sections)
        if _is_debug(section, names[number]) and number != tables.header.names
    )  # fmt: skip


def _is_debug(section: Section, name: str) -> bool:
    return not section.flags & SHF_ALLOC and (name.startswith(_PREFIXES) or name in _NAMES)


def _why_kept(tables: Tables, chosen: Sequence[int], names: Sequence[str]) -> str | None:
    taken = [(f"segment {number}", one.offset, one.end) for number, one in enumerate(tables.segments)]
    taken += [
        (names[number], one.offset, one.end)
        for number, one in enumerate(tables.sections)
        if number not in chosen and one.kind != SHT_NOBITS
    ]
    for number in chosen:
        section = tables.sections[number]
        for name, start, end in taken:
            if section.offset < end and start < section.end:
                return f"{names[number]} shares its bytes with {name}"
    for number, section in enumerate(tables.sections):
        if number not in chosen and section.link in chosen:
            return f"{names[number]} refers to {names[section.link]}"
    return None
