"""Write a shared object whose functions all give one answer, without a compiler.

It stands in for a library that only the host can have, the NVIDIA driver's libcuda.so.1, or for one that is linked and
never called. Only what the dynamic loader reads is there; a linker would also want section headers, which this object
has none of. Sources: System V gABI, chapters 4 and 5 (object files, dynamic linking); LSB 5.0 (symbol versioning); the
psABI supplements for x86-64 and AArch64 (machine numbers, largest page size, return register); Linux's tables of
system calls.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from composer.errors import ElfError
from composer.formats.stubcode import Answer, Code, Machine, write_code
from composer.formats.symbols import Definition

__all__ = ["Answer", "Machine", "render_library", "render_stub"]

_ET_DYN, _EV_CURRENT = 3, 1
_PT_LOAD, _PT_DYNAMIC, _PT_GNU_STACK = 1, 2, 0x6474E551
_EXECUTE, _WRITE, _READ = 1, 2, 4
_DT_NULL, _DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_STRSZ, _DT_SYMENT, _DT_SONAME = 0, 4, 5, 6, 10, 11, 14
_DT_VERSYM, _DT_VERDEF, _DT_VERDEFNUM = 0x6FFFFFF0, 0x6FFFFFFC, 0x6FFFFFFD
_VER_DEF_CURRENT, _VER_FLG_BASE, _BASE, _HIDDEN = 1, 1, 1, 0x8000
_TYPES = {"function": 2, "object": 1}  # STT_FUNC, STT_OBJECT
_GLOBAL = 1 << 4  # STB_GLOBAL
# Any index that is not SHN_UNDEF; glibc adds the load address to all but SHN_ABS and looks up no section.
_SOME_SECTION = 1

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<2I6Q")
_SYMBOL = struct.Struct("<IBBHQQ")
_ENTRY = struct.Struct("<2Q")
_VERSION = struct.Struct("<4H3I2I")  # a Verdef and its only Verdaux
_SEGMENTS = 4
_TABLES_AT = _HEADER.size + _SEGMENTS * _SEGMENT.size
#: Bytes of a line: its length, too, is loaded by one instruction.
_LONGEST = 0xFFFF
#: What the strictest vector instructions ask of data.
_DATA_ALIGNMENT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class _Architecture:
    machine: int  # e_machine
    page: int  # the largest page size that the psABI allows for


_ARCHITECTURES: dict[Machine, _Architecture] = {
    "x86_64": _Architecture(machine=62, page=0x1000),
    "aarch64": _Architecture(machine=183, page=0x10000),
}


def render_stub(soname: str, functions: Iterable[str], result: int, machine: Machine) -> bytes:
    """`render_library` for functions without versions that return `result` and say nothing."""
    return render_library(soname, [Definition(name=name) for name in functions], Answer(status=result), machine)


def render_library(soname: str, symbols: Iterable[Definition], answer: Answer, machine: Machine) -> bytes:
    """An ELF64 shared object named `soname` that defines `symbols`: functions that take anything and give `answer`, and
    zeroed data.

    The order and repetition of `symbols` do not matter: equal sets give equal bytes. Raises ElfError for a status that
    one AArch64 instruction does not hold (-65536 to 65535), a line of more than 65535 bytes, and a thread-local symbol.
    """
    ordered = sorted(set(symbols), key=lambda one: (one.name, one.version or "", one.default))
    for one in ordered:
        if one.kind == "thread-local":
            raise ElfError("a stub cannot stand in for a thread-local variable", where=soname, why=one.name)
    if not answer.holds():
        raise ElfError("a stub's status must be from -65536 to 65535", where=soname, why=str(answer.status))
    if any(len(answer.line(one.name)) > _LONGEST for one in ordered):
        raise ElfError(f"a stub's line must be of at most {_LONGEST} bytes", where=soname)
    return _Image(soname, ordered, answer, machine).render()


class _Image:
    """The parts of the object. Offsets in the file and addresses are the same numbers throughout.

    A first segment holds the headers, the tables, the functions and what they write. The second is writable: the
    dynamic section, in which glibc relocates addresses, and, as zeros that are not in the file, the functions' flag and
    the data.
    """

    def __init__(self, soname: str, symbols: Sequence[Definition], answer: Answer, machine: Machine) -> None:
        self._symbols = symbols
        self._answer = answer
        self._machine = machine
        self._architecture = _ARCHITECTURES[machine]
        self._versions = sorted({one.version for one in symbols if one.version})
        self._strings, self._at = _string_table([soname, *self._versions, *(one.name for one in symbols)])
        self._soname = soname

    def render(self) -> bytes:
        tables = self._placed_tables()
        code_at = _aligned(max((at + len(data) for at, data in tables.values()), default=_TABLES_AT), 16)
        names = [one.name for one in self._symbols if one.kind == "function"]
        # The code's length is needed for the address of its data, on which only its operands depend.
        draft = write_code(self._machine, self._answer, names, at=code_at, flag=0)
        text_end = code_at + len(draft.data)
        dynamic_at = _aligned(text_end, self._architecture.page)
        dynamic = self._dynamic({tag: at for tag, (at, _) in tables.items()})
        flag = _aligned(dynamic_at + len(dynamic), _DATA_ALIGNMENT)
        code = write_code(self._machine, self._answer, names, at=code_at, flag=flag)
        places, end = self._data_places(flag + 1)
        symbols_at, _ = tables[_DT_SYMTAB]
        parts = {**dict(tables.values()), code_at: code.data, dynamic_at: dynamic}
        parts[symbols_at] = self._symbol_table(code, places)
        return _placed(self._headers(text_end, dynamic_at, len(dynamic), end - dynamic_at), parts)

    def _placed_tables(self) -> dict[int, tuple[int, bytes]]:
        """Each table by the tag that points at it: where it is, and its bytes (of the symbols only their length)."""
        tables = {
            _DT_HASH: _hash_table([one.name for one in self._symbols]),
            _DT_SYMTAB: bytes(_SYMBOL.size * (1 + len(self._symbols))),
            _DT_STRTAB: self._strings,
        }
        if self._versions:
            tables |= {_DT_VERSYM: self._version_indices(), _DT_VERDEF: self._version_table()}
        placed, at = {}, _TABLES_AT
        for tag, data in tables.items():
            placed[tag] = (at := _aligned(at, 8), data)
            at += len(data)
        return placed

    def _dynamic(self, places: Mapping[int, int]) -> bytes:
        values = {_DT_SONAME: self._at[self._soname], **places, _DT_STRSZ: len(self._strings), _DT_SYMENT: _SYMBOL.size}
        if self._versions:
            values[_DT_VERDEFNUM] = 1 + len(self._versions)
        return b"".join(_ENTRY.pack(tag, value) for tag, value in {**values, _DT_NULL: 0}.items())

    def _version_indices(self) -> bytes:
        indices: dict[str | None, int] = {None: _BASE}
        indices |= {name: number for number, name in enumerate(self._versions, start=_BASE + 1)}
        words = [indices[one.version] | (0 if one.default else _HIDDEN) for one in self._symbols]
        return struct.pack(f"<{1 + len(words)}H", 0, *words)

    def _version_table(self) -> bytes:
        """The object's own name as the base, and the versions. What inherits from what only matters to linkers."""
        names = [self._soname, *self._versions]
        last, aux = len(names), _VERSION.size - 8
        return b"".join(
            _VERSION.pack(_VER_DEF_CURRENT, _VER_FLG_BASE if number == _BASE else 0, number, 1, _hash(name), aux,
                          _VERSION.size if number < last else 0, self._at[name], 0)
            for number, name in enumerate(names, start=_BASE)
        )  # fmt: skip

    def _data_places(self, start: int) -> tuple[dict[Definition, int], int]:
        """The address of each data symbol, and the end of all. Names of one thing get one place each."""
        places, end = {}, start
        for one in self._symbols:
            if one.kind == "object":
                places[one] = _aligned(end, _DATA_ALIGNMENT)
                end = places[one] + one.size
        return places, end

    def _symbol_table(self, code: Code, places: Mapping[Definition, int]) -> bytes:
        """The undefined symbol 0, and every definition."""
        functions = iter(code.functions)
        rows = [bytes(_SYMBOL.size)]
        for one in self._symbols:
            at, size = (places[one], one.size) if one in places else (next(functions), code.size)
            info = _GLOBAL | _TYPES[one.kind]
            rows.append(_SYMBOL.pack(self._at[one.name], info, 0, _SOME_SECTION, at, size))
        return b"".join(rows)

    def _headers(self, text_end: int, dynamic_at: int, dynamic_size: int, memory: int) -> bytes:
        ident = b"\x7fELF" + bytes([2, 1, _EV_CURRENT])  # 64 bits, little endian
        header = _HEADER.pack(
            ident, _ET_DYN, self._architecture.machine, _EV_CURRENT, 0, _HEADER.size, 0, 0,
            _HEADER.size, _SEGMENT.size, _SEGMENTS, 0, 0, 0,
        )  # fmt: skip
        page, writable = self._architecture.page, _READ | _WRITE
        return header + b"".join(
            (
                _segment(_PT_LOAD, _READ | _EXECUTE, 0, text_end, text_end, page),
                _segment(_PT_LOAD, writable, dynamic_at, dynamic_size, memory, page),
                _segment(_PT_DYNAMIC, writable, dynamic_at, dynamic_size, dynamic_size, 8),
                _segment(_PT_GNU_STACK, writable, 0, 0, 0, 16),
            )
        )


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _placed(image: bytes, parts: Mapping[int, bytes]) -> bytes:
    whole = bytearray(image)
    for offset, part in sorted(parts.items()):
        whole += bytes(offset - len(whole)) + part
    return bytes(whole)


def _segment(kind: int, flags: int, offset: int, size: int, memory: int, alignment: int) -> bytes:
    return _SEGMENT.pack(kind, flags, offset, offset, offset, size, memory, alignment)


def _string_table(texts: Iterable[str]) -> tuple[bytes, dict[str, int]]:
    """The texts, each once and ended by NUL, after the empty one; and where each begins."""
    table, places = bytearray(1), {}
    for text in dict.fromkeys(texts):
        places[text] = len(table)
        table += text.encode() + b"\0"
    return bytes(table), places


def _hash_table(names: Sequence[str]) -> bytes:
    """DT_HASH: about one name a bucket. `names[i]` is symbol `i + 1`; a bucket's symbols form a chain ended by 0."""
    buckets, chain = [0] * (len(names) | 1), [0]
    for index, name in enumerate(names, start=1):
        bucket = _hash(name) % len(buckets)
        chain.append(buckets[bucket])
        buckets[bucket] = index
    words = [len(buckets), len(chain), *buckets, *chain]
    return struct.pack(f"<{len(words)}I", *words)


def _hash(name: str) -> int:
    """The gABI's symbol hash."""
    value = 0
    for byte in name.encode():
        value = (value << 4) + byte
        value = (value ^ (value >> 24 & 0xF0)) & 0x0FFF_FFFF
    return value
