"""The names that an ELF object leaves for other libraries to define, and those that it defines itself.

Section headers are not used, as in `elf`; but then nothing says how many dynamic symbols there are, and it has to be
found from the tables around them. Sources: System V gABI chapter 5 (symbol table, hash table); LSB 5.0 (symbol
versioning); binutils' and glibc's `.gnu.hash`, in which the symbols that cannot be looked up, the undefined ones among
them, come before all others.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from typing import Literal

from composer.errors import ElfError
from composer.formats.elf import VER_FLG_BASE, Dynamic, Reader, open_elf

Kind = Literal["function", "object", "thread-local"]

_DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_RELA, _DT_INIT, _DT_FINI, _DT_JMPREL = 4, 5, 6, 7, 12, 13, 23
_DT_GNU_HASH, _DT_VERSYM, _DT_VERDEF, _DT_VERNEED = 0x6FFFFEF5, 0x6FFFFFF0, 0x6FFFFFFC, 0x6FFFFFFE
# Where something else begins, one of which always follows the symbols.
_PLACES = (_DT_STRTAB, _DT_RELA, _DT_INIT, _DT_FINI, _DT_JMPREL, _DT_GNU_HASH, _DT_VERSYM, _DT_VERDEF, _DT_VERNEED)
_DT_VERDEFNUM = 0x6FFFFFFD
_SHN_UNDEF, _SHN_ABS = 0, 0xFFF1
_SYMBOL = "IBBHQQ"
_LOCAL, _SECTION, _FILE = 0, 3, 4
_KINDS: dict[int, Kind] = {2: "function", 6: "thread-local", 10: "function"}  # STT_FUNC, STT_TLS, STT_GNU_IFUNC
_SEEN_OUTSIDE = (0, 3)  # STV_DEFAULT, STV_PROTECTED
# An index of `.gnu.version`: 0 is a name that is not exported, 1 one without a version; the bit says `@` and not `@@`.
_NOT_EXPORTED, _NO_VERSION, _HIDDEN = 0, 1, 0x8000


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """A dynamic symbol that an object defines for others.

    size: bytes of an object's data; of a function's code, about which nobody else cares. version: its name, or None
    where the object defines no versions. default: what a reference without a version is linked with.
    """

    name: str
    kind: Kind = "function"
    size: int = 0
    version: str | None = None
    default: bool = True


def defined_symbols(buffer: bytes | memoryview | mmap.mmap, where: str) -> tuple[Definition, ...]:
    """The dynamic symbols that an ELF64 object defines, weak ones too, in the order of its table.

    The absolute symbols that some linkers add for the versions themselves are left out. Arguments and errors as for
    `undefined_symbols`.
    """
    dynamic = _open(buffer, where)
    if dynamic is None or _DT_SYMTAB not in dynamic.values:
        return ()
    reader = dynamic.reader
    layout = struct.Struct(reader.order + _SYMBOL)
    count = symbol_count(dynamic)
    start, _ = reader.offset_of(dynamic.values[_DT_SYMTAB])
    table = reader.take(start, count * layout.size)
    indices, names = version_indices(dynamic, count), version_names(dynamic)
    return tuple(
        Definition(name=dynamic.name(name), kind=_KINDS.get(info & 15, "object"), size=size,
                   version=names.get(index & ~_HIDDEN), default=not index & _HIDDEN)
        for (name, info, other, section, _, size), index in zip(layout.iter_unpack(table), indices, strict=True)
        if section not in (_SHN_UNDEF, _SHN_ABS) and info >> 4 != _LOCAL and info & 15 not in (_SECTION, _FILE)
        and other & 3 in _SEEN_OUTSIDE and index & ~_HIDDEN != _NOT_EXPORTED
    )  # fmt: skip


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


def _open(buffer: bytes | memoryview | mmap.mmap, where: str) -> Dynamic | None:
    opened = open_elf(buffer, where)
    if opened.reader.bits != 64:
        raise ElfError("not a 64-bit object", where=where)
    return opened.dynamic


def _count(dynamic: Dynamic, size: int) -> int:
    """How many symbols, from the first, include every undefined one."""
    reader = dynamic.reader
    place = dynamic.at(_DT_HASH)
    if place:
        return reader.unpack("2I", place[0])[1]
    place = dynamic.at(_DT_GNU_HASH)
    first = reader.unpack("2I", place[0])[1] if place else 0
    # An object that defines nothing gets an empty table from GNU ld, with 1 here whatever the number of symbols.
    return first if first > 1 else _most(dynamic, size)


def _most(dynamic: Dynamic, size: int) -> int:
    """As many symbols as fit before the next table. What follows the last one may be rubbish with names too far off."""
    start = dynamic.values[_DT_SYMTAB]
    offset, end = dynamic.reader.offset_of(start)
    following = [value for tag, value in dynamic.values.items() if tag in _PLACES and value > start]
    return min([end - offset, *(value - start for value in following)]) // size


def symbol_count(dynamic: Dynamic) -> int:
    """How many symbols of an ELF64 object there are, from the first to the last that can be looked up."""
    size = struct.calcsize("=" + _SYMBOL)
    if dynamic.at(_DT_HASH):
        return _count(dynamic, size)
    place = dynamic.at(_DT_GNU_HASH)
    return _gnu_total(dynamic.reader, place[0]) if place else _most(dynamic, size)


def _gnu_total(reader: Reader, start: int) -> int:
    """The index behind the last symbol of `.gnu.hash`: the end of the last chain, which an odd hash marks."""
    buckets, first, blooms, _ = reader.unpack("4I", start)
    at = start + 16 + blooms * 8
    last = max(reader.unpack(f"{buckets}I", at), default=0)
    if not last:
        return first
    if last < first:
        raise reader.fault("a hash bucket begins before the symbols that can be looked up", f"{last}, {first}")
    while not reader.unpack("I", at + (buckets + last - first) * 4)[0] & 1:
        last += 1
    return last + 1


def version_indices(dynamic: Dynamic, count: int) -> tuple[int, ...]:
    """The entries of `.gnu.version` of the first symbols; 1, which is no version, for all where there is none."""
    place = dynamic.at(_DT_VERSYM)
    if place is None:
        return (_NO_VERSION,) * count
    return struct.unpack(f"{dynamic.reader.order}{count}H", dynamic.reader.take(place[0], count * 2))


def version_names(dynamic: Dynamic) -> dict[int, str]:
    """The versions that an object defines by their index, without its own base name."""
    place = dynamic.at(_DT_VERDEF)
    if place is None:
        return {}
    found = {}
    chain = dynamic.reader.chain
    for offset, (_, flags, index, _, _, first, _) in chain("4H3I", place[0], dynamic.values.get(_DT_VERDEFNUM, 0)):
        if not flags & VER_FLG_BASE:
            found[index] = dynamic.name(dynamic.reader.unpack("I", offset + first)[0])
    return found
