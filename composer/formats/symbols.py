"""The names that an ELF object leaves for other libraries to define.

Section headers are not used, as in `elf`; but then nothing says how many dynamic symbols there are, and it has to be
found from the tables around them. Sources: System V gABI chapter 5 (symbol table, hash table); binutils' and glibc's
`.gnu.hash`, in which the symbols that cannot be looked up, the undefined ones among them, come before all others.
"""

from __future__ import annotations

import mmap
import struct

from composer.errors import ElfError
from composer.formats.elf import _PT_DYNAMIC, _PT_LOAD, _Dynamic, _header, _Reader, _segments

_DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_RELA, _DT_INIT, _DT_FINI, _DT_JMPREL = 4, 5, 6, 7, 12, 13, 23
_DT_GNU_HASH, _DT_VERSYM, _DT_VERDEF, _DT_VERNEED = 0x6FFFFEF5, 0x6FFFFFF0, 0x6FFFFFFC, 0x6FFFFFFE
# Where something else begins, one of which always follows the symbols.
_PLACES = (_DT_STRTAB, _DT_RELA, _DT_INIT, _DT_FINI, _DT_JMPREL, _DT_GNU_HASH, _DT_VERSYM, _DT_VERDEF, _DT_VERNEED)
_SHN_UNDEF = 0
_SYMBOL = "IBBHQQ"


def undefined_symbols(buffer: bytes | memoryview | mmap.mmap, where: str) -> frozenset[str]:
    """The dynamic symbols, weak ones too, that an ELF64 object uses and does not define, without their versions.

    The buffer holds the whole file; `where` names it in errors. An object without a dynamic section has none.
    Raises ElfError for what is not a well-formed ELF64 object as far as the loader would read it.
    """
    dynamic = _open(buffer, where)
    if dynamic is None or _DT_SYMTAB not in dynamic.values:
        return frozenset()
    reader = dynamic.reader
    start, _ = reader.offset_of(dynamic.values[_DT_SYMTAB])
    layout = struct.Struct(reader.order + _SYMBOL)
    table = reader.take(start, _count(dynamic, layout.size) * layout.size)
    size = dynamic.strings_end - dynamic.strings
    names = {name for name, _, _, section, _, _ in layout.iter_unpack(table) if section == _SHN_UNDEF and name < size}
    return frozenset(dynamic.name(name) for name in names) - {""}


def _open(buffer: bytes | memoryview | mmap.mmap, where: str) -> _Dynamic | None:
    reader = _Reader(buffer, where)
    if reader.bits != 64:
        raise ElfError("not a 64-bit object", where=where)
    segments = _segments(reader, _header(reader))
    reader.loads = tuple(segment.load for segment in segments if segment.kind == _PT_LOAD)
    tables = [segment.load for segment in segments if segment.kind == _PT_DYNAMIC and segment.load.filesz]
    return _Dynamic(reader, tables[-1]) if tables else None


def _count(dynamic: _Dynamic, size: int) -> int:
    """How many symbols, from the first, include every undefined one."""
    reader = dynamic.reader
    place = dynamic.at(_DT_HASH)
    if place:
        return reader.unpack("2I", place[0])[1]
    place = dynamic.at(_DT_GNU_HASH)
    first = reader.unpack("2I", place[0])[1] if place else 0
    # An object that defines nothing gets an empty table from GNU ld, with 1 here whatever the number of symbols.
    return first if first > 1 else _most(dynamic, size)


def _most(dynamic: _Dynamic, size: int) -> int:
    """As many symbols as fit before the next table. What follows the last one may be rubbish with names too far off."""
    start = dynamic.values[_DT_SYMTAB]
    offset, end = dynamic.reader.offset_of(start)
    following = [value for tag, value in dynamic.values.items() if tag in _PLACES and value > start]
    return min([end - offset, *(value - start for value in following)]) // size
