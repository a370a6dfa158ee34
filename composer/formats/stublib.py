"""Write a shared object whose functions all return one number, without a compiler.

It stands in for a library that only the host can have, the NVIDIA driver's libcuda.so.1: with it on the search path,
what links the driver can be loaded and imported where there is no driver. Only what the dynamic loader reads is there;
a linker would also want section headers, which this object has none of. Sources: System V gABI, chapters 4 and 5
(object files, dynamic linking); the psABI supplements for x86-64 and AArch64 (machine numbers, largest page size,
return register).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from composer.errors import ElfError

Machine = Literal["x86_64", "aarch64"]

_ET_DYN, _EV_CURRENT = 3, 1
_PT_LOAD, _PT_DYNAMIC, _PT_GNU_STACK = 1, 2, 0x6474E551
_EXECUTE, _WRITE, _READ = 1, 2, 4
_DT_NULL, _DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_STRSZ, _DT_SYMENT, _DT_SONAME = 0, 4, 5, 6, 10, 11, 14
_GLOBAL_FUNCTION = 1 << 4 | 2  # STB_GLOBAL, STT_FUNC
# Any index that is not SHN_UNDEF; glibc adds the load address to all but SHN_ABS and looks up no section.
_SOME_SECTION = 1

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<2I6Q")
_SYMBOL = struct.Struct("<IBBHQQ")
_ENTRY = struct.Struct("<2Q")
_SEGMENTS = 4
_CODE_AT = _HEADER.size + _SEGMENTS * _SEGMENT.size


@dataclass(frozen=True, slots=True, kw_only=True)
class _Architecture:
    machine: int  # e_machine
    page: int  # the largest page size that the psABI allows for

    def function(self, result: int) -> bytes:
        """`return result`: `mov eax, imm32; ret` or `movz w0, #imm16; ret`."""
        if self.machine == _AARCH64.machine:
            return struct.pack("<2I", 0x5280_0000 | result << 5, 0xD65F_03C0)
        return struct.pack("<BIB", 0xB8, result, 0xC3)


_AARCH64 = _Architecture(machine=183, page=0x10000)
_ARCHITECTURES: dict[Machine, _Architecture] = {"x86_64": _Architecture(machine=62, page=0x1000), "aarch64": _AARCH64}


def render_stub(soname: str, functions: Iterable[str], result: int, machine: Machine) -> bytes:
    """An ELF64 shared object named `soname` in which each of `functions` takes anything and returns `result`.

    The order and repetition of `functions` do not matter: equal sets give equal bytes. Raises ElfError for a result
    that does not fit 16 bits, the widest that one AArch64 instruction loads.
    """
    if not 0 <= result <= 0xFFFF:
        raise ElfError("a stub's result must be from 0 to 65535", where=soname, why=str(result))
    architecture = _ARCHITECTURES[machine]
    names = sorted(set(functions))
    code = architecture.function(result)
    strings, indices = _string_table([soname, *names])
    table = _hash_table(names)
    hash_at = _aligned(_CODE_AT + len(code), 8)
    symbols_at = _aligned(hash_at + len(table), 8)
    symbols = _symbol_table(indices[1:], len(code))
    strings_at = symbols_at + len(symbols)
    text_end = strings_at + len(strings)
    dynamic = _dynamic_section(
        {
            _DT_SONAME: indices[0], _DT_HASH: hash_at, _DT_STRTAB: strings_at, _DT_SYMTAB: symbols_at,
            _DT_STRSZ: len(strings), _DT_SYMENT: _SYMBOL.size, _DT_NULL: 0,
        }
    )  # fmt: skip
    dynamic_at = _aligned(text_end, architecture.page)
    head = _headers(architecture, text_end, dynamic_at, len(dynamic))
    parts = {_CODE_AT: code, hash_at: table, symbols_at: symbols, strings_at: strings, dynamic_at: dynamic}
    return _placed(head, parts)


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _placed(image: bytes, parts: dict[int, bytes]) -> bytes:
    for offset, part in parts.items():
        image = image.ljust(offset, b"\0") + part
    return image


def _headers(architecture: _Architecture, text_end: int, dynamic_at: int, dynamic_size: int) -> bytes:
    """The ELF header and four segments. The dynamic section is writable: glibc relocates the addresses in it."""
    ident = b"\x7fELF" + bytes([2, 1, _EV_CURRENT])  # 64 bits, little endian
    header = _HEADER.pack(
        ident, _ET_DYN, architecture.machine, _EV_CURRENT, 0, _HEADER.size, 0, 0,
        _HEADER.size, _SEGMENT.size, _SEGMENTS, 0, 0, 0,
    )  # fmt: skip
    return header + b"".join(
        (
            _segment(_PT_LOAD, _READ | _EXECUTE, 0, text_end, architecture.page),
            _segment(_PT_LOAD, _READ | _WRITE, dynamic_at, dynamic_size, architecture.page),
            _segment(_PT_DYNAMIC, _READ | _WRITE, dynamic_at, dynamic_size, 8),
            _segment(_PT_GNU_STACK, _READ | _WRITE, 0, 0, 16),
        )
    )


def _segment(kind: int, flags: int, offset: int, size: int, alignment: int) -> bytes:
    """A program header; offsets in the file and addresses are the same numbers throughout."""
    return _SEGMENT.pack(kind, flags, offset, offset, offset, size, size, alignment)


def _string_table(texts: Sequence[str]) -> tuple[bytes, list[int]]:
    """The texts, each ended by NUL, after the empty one; and where each begins."""
    table, indices = bytearray(1), []
    for text in texts:
        indices.append(len(table))
        table += text.encode() + b"\0"
    return bytes(table), indices


def _symbol_table(names: Sequence[int], size: int) -> bytes:
    """The undefined symbol 0, and one function of `size` bytes for each name: all are the same code."""
    functions = (_SYMBOL.pack(name, _GLOBAL_FUNCTION, 0, _SOME_SECTION, _CODE_AT, size) for name in names)
    return bytes(_SYMBOL.size) + b"".join(functions)


def _dynamic_section(values: dict[int, int]) -> bytes:
    return b"".join(_ENTRY.pack(tag, value) for tag, value in values.items())


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
