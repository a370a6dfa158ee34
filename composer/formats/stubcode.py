"""The machine code of a stub's functions: it needs no C library, no stack and no relocation.

Every function has an entry of its own that loads the line to write and goes on to what all share, or that returns a
text; without lines there is one function for all names. Sources: the x86-64 and AArch64 instruction sets (checked
against an assembler by the tests); Linux's system calls, which take their number in rax and x8.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Machine = Literal["x86_64", "aarch64"]

_STDERR = 2
_SIGABRT = 6
#: What a shell calls the end by SIGABRT; for a process that blocks the signal.
_ABORTED = 128 + _SIGABRT


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What every function of a stub does.

    status: the number to return (64 bits, signed); None ends the process with SIGABRT. message: a line for standard
    error, `{name}` in it being the function's name; with a status only the library's first call writes it. text: what
    the functions that are named in `texts` return instead, a `const char *`; only beside a message.
    """

    status: int | None = None
    message: str | None = None
    text: str = ""
    texts: frozenset[str] = frozenset()

    def holds(self) -> bool:
        """Whether one AArch64 instruction loads the status."""
        return self.status is None or -0x10000 <= self.status <= 0xFFFF

    def line(self, name: str) -> bytes:
        """What the function `name` writes, or returns."""
        if not self.message:
            return b""
        return f"{self.text}\0".encode() if name in self.texts else f"{self.message}\n".replace("{name}", name).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """Functions and what they write or return, as they are in memory.

    functions: the address of each. size: bytes of any of them.
    """

    data: bytes
    functions: Sequence[int]
    size: int


def write_code(machine: Machine, answer: Answer, names: Sequence[str], *, at: int, flag: int) -> Code:
    """The functions of these names, to be put at address `at`.

    flag: the address of a byte that is zero until the first call. The length depends on neither address.
    """
    writer = _X86_64 if machine == "x86_64" else _Aarch64
    if not answer.message and answer.status is not None:
        data = writer.finish(answer.status)
        return Code(data=data, functions=[at] * len(names), size=len(data))
    shared, size = writer.shared(answer, at, flag), writer.entry_size
    first = at + len(shared)
    functions = range(first, first + size * len(names), size)
    entries, lines, line_at = bytearray(), bytearray(), functions.stop
    for name, place in zip(names, functions, strict=True):
        line = answer.line(name)
        told = name in answer.texts
        entries += writer.text(place, line_at) if told else writer.entry(place, line_at, len(line), shared=at)
        lines += line
        line_at += len(line)
    return Code(data=bytes(shared + entries + lines), functions=functions, size=size)


class _X86_64:  # noqa: N801
    """The line is in rsi, its length in edx, as write(2) wants them."""

    entry_size = 17
    _write, _getpid, _gettid, _tgkill, _exit_group = 1, 39, 186, 234, 231

    @classmethod
    def text(cls, at: int, text: int) -> bytes:
        """`lea rax, [rip + text]; ret`, and traps up to the size of an entry."""
        return (b"\x48\x8d\x05" + struct.pack("<i", text - (at + 7)) + b"\xc3").ljust(cls.entry_size, b"\xcc")

    @staticmethod
    def entry(at: int, line: int, length: int, *, shared: int) -> bytes:
        """`lea rsi, [rip + line]; mov edx, length; jmp shared`."""
        lea = b"\x48\x8d\x35" + struct.pack("<i", line - (at + 7))
        return lea + b"\xba" + struct.pack("<I", length) + b"\xe9" + struct.pack("<i", shared - (at + 17))

    @classmethod
    def shared(cls, answer: Answer, at: int, flag: int) -> bytes:
        write = b"\xbf" + struct.pack("<I", _STDERR) + cls._call(cls._write)  # mov edi, 2
        if answer.status is None:
            return write + cls._abort()
        # mov byte [rip + flag], 1, which ends 16 bytes after `at`
        write = b"\xc6\x05" + struct.pack("<i", flag - (at + 16)) + b"\x01" + write
        # cmp byte [rip + flag], 0; jne behind the writing
        test = b"\x80\x3d" + struct.pack("<i", flag - (at + 7)) + b"\x00\x75" + bytes([len(write)])
        return test + write + cls.finish(answer.status)

    @staticmethod
    def finish(status: int) -> bytes:
        """`mov eax, imm32`, which clears the upper half, or `mov rax, simm32`; `ret`."""
        if status >= 0:
            return struct.pack("<BIB", 0xB8, status, 0xC3)
        return b"\x48\xc7\xc0" + struct.pack("<i", status) + b"\xc3"

    @classmethod
    def _abort(cls) -> bytes:
        """tgkill(getpid(), gettid(), SIGABRT), and exit_group where that is blocked or a handler returned."""
        return b"".join(
            (
                cls._call(cls._getpid), b"\x89\xc7",  # mov edi, eax
                cls._call(cls._gettid), b"\x89\xc6",  # mov esi, eax
                b"\xba" + struct.pack("<I", _SIGABRT), cls._call(cls._tgkill),  # mov edx
                b"\xbf" + struct.pack("<I", _ABORTED), cls._call(cls._exit_group),  # mov edi
            )
        )  # fmt: skip

    @staticmethod
    def _call(number: int) -> bytes:
        """`mov eax, number; syscall`."""
        return b"\xb8" + struct.pack("<I", number) + b"\x0f\x05"


class _Aarch64:
    """The line is in x1, its length in x2, as write(2) wants them."""

    entry_size = 16
    _write, _getpid, _gettid, _tgkill, _exit_group = 64, 172, 178, 131, 94
    _ret = 0xD65F_03C0

    @classmethod
    def text(cls, at: int, text: int) -> bytes:
        """`adrp x0, text; add x0, x0, :lo12:text; ret; udf #0`."""
        return _words(*_address(0, at, text), cls._ret, 0)

    @staticmethod
    def entry(at: int, line: int, length: int, *, shared: int) -> bytes:
        """`adrp x1, line; add x1, x1, :lo12:line; movz w2, #length; b shared`."""
        return _words(*_address(1, at, line), _movz(2, length), 0x1400_0000 | ((shared - (at + 12)) >> 2 & 0x3FF_FFFF))

    @classmethod
    def shared(cls, answer: Answer, at: int, flag: int) -> bytes:
        write = [_movz(0, _STDERR), *cls._call(cls._write)]
        if answer.status is None:
            return _words(*write, *cls._abort())
        # movz w10, #1; strb w10, [x9]
        write = [_movz(10, 1), 0x3900_0000 | 9 << 5 | 10, *write]
        # x9 = flag; ldrb w10, [x9]; cbnz w10, behind the writing
        test = [*_address(9, at, flag), 0x3940_0000 | 9 << 5 | 10, 0x3500_0000 | (len(write) + 1) << 5 | 10]
        return _words(*test, *write) + cls.finish(answer.status)

    @classmethod
    def finish(cls, status: int) -> bytes:
        """`movz w0, #imm16`, which clears the upper half, or `movn x0, #imm16`; `ret`."""
        return _words(_movz(0, status) if status >= 0 else 0x9280_0000 | ~status << 5, cls._ret)

    @classmethod
    def _abort(cls) -> list[int]:
        """As on x86-64. A result is in w0; it is kept in w9, `mov w9, w0`, and `mov w1, w0; mov w0, w9`."""
        return [
            *cls._call(cls._getpid), 0x2A00_03E9, *cls._call(cls._gettid), 0x2A00_03E1, 0x2A09_03E0,
            _movz(2, _SIGABRT), *cls._call(cls._tgkill), _movz(0, _ABORTED), *cls._call(cls._exit_group),
        ]  # fmt: skip

    @staticmethod
    def _call(number: int) -> list[int]:
        """`movz w8, #number; svc #0`."""
        return [_movz(8, number), 0xD400_0001]


def _words(*words: int) -> bytes:
    return struct.pack(f"<{len(words)}I", *words)


def _movz(register: int, value: int) -> int:
    return 0x5280_0000 | value << 5 | register


def _address(register: int, at: int, target: int) -> tuple[int, int]:
    """`adrp; add`: the target's page relative to that of the instruction at `at`, and the place in the page."""
    pages = ((target >> 12) - (at >> 12)) & 0x1F_FFFF
    adrp = 0x9000_0000 | (pages & 3) << 29 | (pages >> 2) << 5 | register
    return adrp, 0x9100_0000 | (target & 0xFFF) << 10 | register << 5 | register
