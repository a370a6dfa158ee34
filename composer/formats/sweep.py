"""Where the instructions of x86-64 code begin, by the disassembler capstone.

Code is swept from one end to the other, and again from every known entry that the sweep missed: data between functions
may hide the first instructions of the next. Measured: 4 million instructions a second, against 2 million for
capstone's Python interface, which makes text of each; and other threads run meanwhile. So libcapstone's C interface is
called, whose layout (`cs_insn` of capstone.h) is that of its version 5.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from composer.errors import HostError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Signed = NDArray[np.int64]

_X86, _MODE_64, _VERSION = 3, 8, 5
_ROW = np.dtype(
    {"names": ["address", "size"], "formats": ["<u8", "<u2"], "offsets": [8, 16], "itemsize": 248},
)
#: capstone keeps 248 bytes for each instruction of a window.
_WINDOW = 1 << 16
_LONGEST = 16

_VEX_3, _VEX_2, _EVEX = 0xC4, 0xC5, 0x62
_PREFIX = {_VEX_3: 3, _VEX_2: 2, _EVEX: 4}
# Opcodes of map 1 with an immediate byte; in map 3 all have one, in the others none.
_IMMEDIATE = frozenset({0x70, 0x71, 0x72, 0x73, 0xC2, 0xC4, 0xC5, 0xC6})


class Swept(NamedTuple):
    """The offsets at which instructions begin, ascending, and how many bytes are none."""

    starts: Signed
    undecoded: int


def sweep(code: Bytes, entries: Signed) -> Swept:
    """The instructions of `code`, which begins with one; `entries` are ascending offsets at which others must begin.

    HostError without capstone 5.
    """
    starts, undecoded = _linear(code)
    missed = entries[~np.isin(entries, starts)]
    if not len(missed):
        return Swept(starts, undecoded)
    bounds = np.append(entries, len(code))
    ends = bounds[np.searchsorted(bounds, missed, "right")]
    dropped = np.zeros(len(starts), np.bool_)
    again = []
    for start, end in zip(missed.tolist(), ends.tolist(), strict=True):
        dropped[slice(*np.searchsorted(starts, (start, end)))] = True
        found, _ = _linear(code[start:end])
        again.append(found + start)
    return Swept(np.sort(np.concatenate([starts[~dropped], *again])), undecoded)


def _linear(code: Bytes) -> Swept:
    parts: list[Signed] = []
    undecoded = at = 0
    code = np.ascontiguousarray(code)
    with_library = _Disassembler(code)
    try:
        while at < len(code):
            found, end = with_library.window(at)
            if len(found):
                parts.append(found)
                at = end
                continue
            # Newer than this capstone: BF16, FP16, AMX and AVX-VNNI have the lengths that their prefix tells.
            length = vector_length(code, at)
            if length:
                parts.append(np.array([at], np.int64))
            undecoded += not length
            at += length or 1
    finally:
        with_library.close()
    return Swept(np.concatenate(parts) if parts else np.empty(0, np.int64), undecoded)


class _Disassembler:
    """libcapstone for the bytes of one array."""

    def __init__(self, code: Bytes) -> None:
        self._library = _library()
        self._code = code
        self._handle = ctypes.c_size_t()
        fault = self._library.cs_open(_X86, _MODE_64, ctypes.byref(self._handle))
        if fault:
            raise HostError("capstone cannot disassemble x86-64", where="capstone", why=f"error {fault}")

    def window(self, at: int) -> tuple[Signed, int]:
        """The instructions from `at` on until one is unknown or the window ends, and the offset behind them."""
        size = min(_WINDOW, len(self._code) - at)
        rows = ctypes.c_void_p()
        count = self._library.cs_disasm(
            self._handle, ctypes.c_void_p(self._code.ctypes.data + at), ctypes.c_size_t(size), ctypes.c_uint64(at),
            ctypes.c_size_t(0), ctypes.byref(rows),
        )  # fmt: skip
        if not count:
            return np.empty(0, np.int64), at
        try:
            table = np.frombuffer((ctypes.c_char * (_ROW.itemsize * count)).from_address(rows.value or 0), _ROW)
            starts, sizes = table["address"].astype(np.int64), table["size"].astype(np.int64)
        finally:
            self._library.cs_free(rows, ctypes.c_size_t(count))
        kept = len(starts)
        if at + size < len(self._code):  # what is cut off by the window's end is not what it looks like
            kept = int(np.searchsorted(starts, at + size - _LONGEST)) or kept
        return starts[:kept], int(starts[kept - 1] + sizes[kept - 1])

    def close(self) -> None:
        """Free the handle."""
        self._library.cs_close(ctypes.byref(self._handle))


@functools.cache
def _library() -> ctypes.CDLL:
    fix = "Install it: pip install 'capstone>=5.0.9,<6'."
    spec = importlib.util.find_spec("capstone")
    if spec is None or not spec.origin:
        raise HostError("the disassembler capstone is not installed", where="capstone", fix=fix)
    path = f"{spec.origin.rpartition('/')[0]}/lib/libcapstone.so"
    try:
        library = ctypes.CDLL(path)
    except OSError as fault:
        raise HostError("cannot be loaded", where=path, why=str(fault), fix=fix) from fault
    major = library.cs_version(None, None) >> 8
    if major != _VERSION:
        raise HostError(f"capstone {major} has another interface than {_VERSION}", where=path, fix=fix)
    library.cs_disasm.restype = ctypes.c_size_t
    library.cs_free.restype = None
    return library


def vector_length(code: Bytes, at: int) -> int:
    """Bytes of the VEX or EVEX instruction at an offset; 0 when there is none, or it is cut off.

    Source: Intel's manual, volume 2, 2.3 (VEX), 2.7 (EVEX) and 2.1 (ModRM, SIB).
    """
    data = code[at : at + _LONGEST].tobytes()
    prefix = _PREFIX.get(data[0], 0) if data else 0
    if not prefix or len(data) < prefix + 2:
        return 0
    opcode, modrm = data[prefix], data[prefix + 1]
    table = 1 if data[0] == _VEX_2 else data[1] & (0x1F if data[0] == _VEX_3 else 7)
    if not 1 <= table <= 6 or table == 4 or (data[0] == _EVEX and not _sound_evex(data)):
        return 0
    length = prefix + sum(_operand_sizes(data[prefix + 1 :], modrm))
    length += 1 + (table == 3 or (table == 1 and opcode in _IMMEDIATE))
    return length if length <= len(data) else 0


def _sound_evex(data: bytes) -> bool:
    """The bits that are fixed."""
    return not data[1] & 8 and bool(data[2] & 4)


def _operand_sizes(operand: bytes, modrm: int) -> Iterator[int]:
    """Bytes of ModRM, of SIB and of the displacement."""
    yield 1
    mod, rm = modrm >> 6, modrm & 7
    if mod == 3:
        return
    has_sib = rm == 4
    yield has_sib
    base = operand[1] & 7 if has_sib and len(operand) > 1 else rm
    if mod == 1:
        yield 1
    elif mod == 2 or base == 5:
        yield 4
