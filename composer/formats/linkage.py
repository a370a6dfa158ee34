"""What an object's symbols promise to others and want of them, small enough to be kept for every object of a stack.

Of a definition only a digest is kept, as a stack has a third of a million of them and they are only ever compared; of a
reference all that an error message needs. Section headers are not used, as in `elf`. Sources: System V gABI chapter 5
(symbol table, relocation), LSB 5.0 (symbol versioning), and glibc's `elf/dl-lookup.c` (`check_match`), whose answer to
"does this definition serve that reference" is the one given here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from composer.formats.elf import Dynamic, Readable, open_elf
from composer.formats.elf_tables import SYMBOL
from composer.formats.symbols import symbol_count, version_indices, version_names

#: Bytes of one digest.
DIGEST = 8

_DT_SYMTAB, _DT_RELA, _DT_RELASZ, _DT_PLTRELSZ, _DT_JMPREL, _DT_BIND_NOW, _DT_FLAGS = 6, 7, 8, 2, 23, 24, 30
_DT_VERSYM, _DT_RELACOUNT, _DT_FLAGS_1 = 0x6FFFFFF0, 0x6FFFFFF9, 0x6FFFFFFB
_DT_VERNEED, _DT_VERNEEDNUM = 0x6FFFFFFE, 0x6FFFFFFF
_DF_BIND_NOW, _DF_1_NOW = 8, 1
_RELOCATION = np.dtype([("place", "<u8"), ("kind", "<u4"), ("symbol", "<u4"), ("addend", "<i8")])
_SHN_UNDEF, _SHN_ABS = 0, 0xFFF1
_LOCAL, _WEAK = 0, 2
_STT_SECTION, _STT_FILE, _STT_TLS = 3, 4, 6
# An index of `.gnu.version`: 0 is a name that is not exported, 2 the oldest version; the bit says `@`.
_NOT_EXPORTED, _OLDEST, _HIDDEN = 0, 2, 0x8000
_INIT = b"PyInit_"

_Rows = npt.NDArray[np.void]
_Indices = npt.NDArray[np.intp]


class Wanted(msgspec.Struct, frozen=True, array_like=True):
    """A symbol that an object uses and cannot be loaded, or cannot go on, without.

    version: its name, and library: the one that was to define it when the object was linked; both None for a reference
    without a version. lazy: only calls use it, and it is looked for at the first of them, unless who loads the object
    asks for everything at once.
    """

    name: str
    version: str | None = None
    library: str | None = None
    lazy: bool = False

    @property
    def keys(self) -> tuple[bytes, bytes]:
        """The digests of the definitions that serve it, either of which does."""
        name = self.name.encode("latin-1")
        return digest(name), digest(name + (b"@@" if self.version is None else b"@" + self.version.encode()))


class Linkage(msgspec.Struct, frozen=True, kw_only=True):
    """The dynamic symbols of one object.

    defined: digests, one behind the other. wanted: without those that may stay undefined (weak ones), and without those
    that no relocation uses, which nobody looks for. modules: what it initialises for CPython (`x` of `PyInit_x`).
    """

    defined: bytes = b""
    wanted: Sequence[Wanted] = ()
    modules: Sequence[str] = ()


def digest(key: bytes) -> bytes:
    """What `Linkage.defined` holds: of NAME@VERSION; of NAME@@ for references without a version; of NAME for all."""
    return hashlib.blake2b(key, digest_size=DIGEST).digest()


def read_linkage(buffer: Readable, where: str) -> Linkage:
    """The symbols of an object, given what holds the whole file; `where` names it in errors.

    Of an object that is not little-endian ELF64 nothing is told: no machine that composer is for loads one. Raises
    ElfError for what is not well-formed as far as the loader would read it.
    """
    reader, _, _, dynamic = open_elf(buffer, where)
    if dynamic is None or _DT_SYMTAB not in dynamic.values or (reader.bits, reader.order) != (64, "<"):
        return Linkage()
    used, at_once = _used(dynamic)
    exported = symbol_count(dynamic)
    count = max(exported, int(used.max(initial=0)) + 1)
    symbols = _array(dynamic, _DT_SYMTAB, count, SYMBOL)
    versions = np.array(version_indices(dynamic, count), dtype="<u2")
    names = [*_names(dynamic, symbols["name"], _defining(symbols[:exported]))]
    return Linkage(
        defined=b"".join(map(digest, _keys(dynamic, names, versions))),
        wanted=[*_wanted(dynamic, symbols, versions, used, at_once)],
        modules=[name[len(_INIT) :].decode("latin-1") for _, name in names if name.startswith(_INIT)],
    )


def _array(dynamic: Dynamic, tag: int, count: int, layout: np.dtype[np.void]) -> _Rows:
    """The first rows of the table that a tag leads to."""
    start, _ = dynamic.reader.offset_of(dynamic.values[tag])
    return np.frombuffer(dynamic.reader.take(start, count * layout.itemsize), layout)


def _used(dynamic: Dynamic) -> tuple[_Indices, _Indices]:
    """The symbols that relocations use, sorted: all, and those that are looked for whatever the loader is asked for."""
    values = dynamic.values
    # The linker puts those first that use no symbol, and says how many there are; they can be millions.
    first = values.get(_DT_RELACOUNT, 0)
    rows = values.get(_DT_RELASZ, 0) // _RELOCATION.itemsize
    at_once = _symbols(dynamic, _DT_RELA, first, rows)
    calls = _symbols(dynamic, _DT_JMPREL, 0, values.get(_DT_PLTRELSZ, 0) // _RELOCATION.itemsize)
    everything = np.union1d(at_once, calls)
    now = _DT_BIND_NOW in values or values.get(_DT_FLAGS, 0) & _DF_BIND_NOW or values.get(_DT_FLAGS_1, 0) & _DF_1_NOW
    return everything, everything if now else at_once


def _symbols(dynamic: Dynamic, tag: int, first: int, rows: int) -> _Indices:
    if tag not in dynamic.values or first >= rows:
        return np.empty(0, np.intp)
    start, _ = dynamic.reader.offset_of(dynamic.values[tag])
    size = _RELOCATION.itemsize
    table = np.frombuffer(dynamic.reader.take(start + first * size, (rows - first) * size), _RELOCATION)
    found = np.unique(table["symbol"])
    return found[found > 0].astype(np.intp)


def _defining(symbols: _Rows) -> _Indices:
    """The rows that a lookup can end at (`do_lookup_x`), by what they say themselves."""
    section, kind = symbols["section"], symbols["info"] & 15
    placed = (symbols["value"] != 0) | (section == _SHN_ABS) | (kind == _STT_TLS)
    named = (symbols["info"] >> 4 != _LOCAL) & (kind != _STT_SECTION) & (kind != _STT_FILE)
    seen = np.isin(symbols["other"] & 3, (0, 3))  # STV_DEFAULT, STV_PROTECTED
    return np.flatnonzero((section != _SHN_UNDEF) & placed & named & seen)


def _names(dynamic: Dynamic, offsets: npt.NDArray[np.uint32], rows: _Indices) -> Iterator[tuple[int, bytes]]:
    """Index and name of each of these rows."""
    reader = dynamic.reader
    strings = reader.take(dynamic.strings, dynamic.strings_end - dynamic.strings)
    starts = offsets[rows]
    ends = np.flatnonzero(np.frombuffer(strings, np.uint8) == 0)
    places = np.searchsorted(ends, starts)
    if len(places) and places.max() >= len(ends):
        raise reader.fault("a symbol's name has no end", f"offset {starts.max()} of {len(strings)}")
    for row, start, end in zip(rows.tolist(), starts.tolist(), ends[places].tolist(), strict=True):
        yield row, strings[start:end]


def _keys(dynamic: Dynamic, names: Sequence[tuple[int, bytes]], versions: npt.NDArray[np.uint16]) -> Iterator[bytes]:
    """The texts whose digests say which references the definitions serve."""
    known = {index: name.encode() for index, name in version_names(dynamic).items()}
    # At an object without a version table glibc ends the process when a version was to be found there.
    suffix = b"" if _DT_VERSYM in dynamic.values else b"@@"
    for row, name in names:
        index = int(versions[row])
        version = known.get(index & ~_HIDDEN)
        if index == _NOT_EXPORTED:
            continue
        if version is None:
            if not index & _HIDDEN:
                yield name + suffix
            continue
        yield name + b"@" + version
        if not index & _HIDDEN or index & ~_HIDDEN == _OLDEST:
            yield name + b"@@"


def _wanted(dynamic: Dynamic, symbols: _Rows, versions: npt.NDArray[np.uint16], used: _Indices,
            at_once: _Indices) -> Iterator[Wanted]:  # fmt: skip
    rows = used[(symbols["section"][used] == _SHN_UNDEF) & (symbols["info"][used] >> 4 != _WEAK)]
    needs = _versions_needed(dynamic)
    soon = set(at_once.tolist())
    for row, name in _names(dynamic, symbols["name"], rows):
        version, library = needs.get(int(versions[row]) & ~_HIDDEN, (None, None))
        yield Wanted(name.decode("latin-1"), version, library, row not in soon)


def _versions_needed(dynamic: Dynamic) -> dict[int, tuple[str, str]]:
    """Version and library by the index that `.gnu.version` gives them."""
    place = dynamic.at(_DT_VERNEED)
    if place is None:
        return {}
    found: dict[int, tuple[str, str]] = {}
    chain = dynamic.reader.chain
    for offset, (_, count, library, first, _) in chain("HHIII", place[0], dynamic.values.get(_DT_VERNEEDNUM, 0)):
        for _, (_, _, index, name, _) in chain("IHHII", offset + first, count):
            found[index & ~_HIDDEN] = dynamic.name(name), dynamic.name(library)
    return found
