"""Which AArch64 instruction words need more than Armv8.0: SVE, SVE2, BF16, I8MM, DotProd, FP16 and LSE.

A row is (mask, value): a word belongs to it when `word & mask == value`. Source: Arm's Architecture Reference Manual,
C4.1. Rows of SVE2 are what SVE's groups gained; those of other features win over them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ROWS: dict[str, Sequence[tuple[int, int]]] = {
    "dotprod": (
        (0xBF20FC00, 0x0E009400), (0xBF20FC00, 0x2E009400), (0xBF00F400, 0x0F00E000), (0xBF00F400, 0x2F00E000),
    ),
    "i8mm": (
        (0xFFE0FC00, 0x4E80A400), (0xFFE0FC00, 0x6E80A400), (0xFFE0FC00, 0x4E80AC00), (0xBFE0FC00, 0x0E809C00),
        (0xBFC0F400, 0x0F80F000), (0xBFC0F400, 0x0F00F000),
        (0xFF20FC00, 0x45009800), (0xFFE0FC00, 0x44807800), (0xFFE0F800, 0x44A01800),
    ),
    "bf16": (
        (0xBFE0FC00, 0x2E40FC00), (0xBFC0F400, 0x0F40F000), (0xFFE0FC00, 0x6E40EC00), (0xBFE0FC00, 0x2EC0FC00),
        (0xBFC0F400, 0x0FC0F000), (0xBFFFFC00, 0x0EA16800), (0xFFFFFC00, 0x1E634000),
        (0xFFE0FC00, 0x64608000), (0xFFE0FC00, 0x64604000), (0xFFE0FC00, 0x6460E400), (0xFFE0F800, 0x64E08000),
        (0xFFE0F000, 0x64E04000), (0xFFFFE000, 0x658AA000), (0xFFFFE000, 0x648AA000),
    ),
    "fp16": (
        (0xBF60C400, 0x0E400400), (0xBF60C400, 0x2E400400), (0xBF7E0C00, 0x0E780800), (0xBF7E0C00, 0x2E780800),
        (0xFF60C400, 0x5E400400), (0xFF60C400, 0x7E400400), (0xFF7E0C00, 0x5E780800), (0xFF7E0C00, 0x7E780800),
        (0x9FC0B400, 0x0F001000), (0x9FC0F400, 0x0F009000), (0xBF7FFC00, 0x0E30C800), (0xBF7FFC00, 0x0E30F800),
        (0xFF20FC00, 0x1EE00800), (0xFFE00C00, 0x1EE00800), (0xFFE00C00, 0x1EE00C00), (0xFFE00C00, 0x1EE00400),
        (0xFFE01C00, 0x1EE01000), (0xFFE0FC00, 0x1EE02000), (0xFFC00000, 0x1FC00000), (0x7FE0FC00, 0x1EE00000),
        (0xFFFE7C00, 0x1EE04000), (0xFFFC7C00, 0x1EE44000), (0xFF7FFC00, 0x5E30C800), (0xFF7FFC00, 0x5E30F800),
        (0xFF7FFC00, 0x5E30D800), (0x7FE00000, 0x1EC00000), (0xBFE0E400, 0x2E40C400), (0xBFE0EC00, 0x2E40E400),
        (0xBFC09400, 0x2F401000), (0xDFF0FC00, 0x5F10FC00), (0xDFF0FC00, 0x5F10E400), (0x9FF0FC00, 0x0F10FC00),
        (0x9FF0FC00, 0x0F10E400), (0xFFC0B400, 0x5F001000), (0xDFC0F400, 0x5F009000), (0xBFF8FC00, 0x0F00FC00),
    ),
    "lse": (
        (0x3F200C00, 0x38200000), (0x3FA07C00, 0x08A07C00), (0xBFA07C00, 0x08207C00),
    ),
}  # fmt: skip

#: SVE2: first what it is, then what SVE has among it.
_SVE2: Sequence[tuple[int, int]] = (
    (0xFF000000, 0x44000000), (0xFF000000, 0x45000000), (0xFF20F800, 0x04203800), (0xFF20FC00, 0x04203400),
    (0xFF20F000, 0x04206000), (0xFF20F800, 0x04207000), (0xFF20F800, 0x05202800), (0xFFE0E000, 0x05600000),
    (0xFF3FE000, 0x052D8000), (0xFF20E400, 0x25200000), (0xFF20FC00, 0x25203000), (0xFF38E000, 0x64108000),
    (0xFF3CE000, 0x6408A000), (0xFFF9E000, 0x6518A000), (0xFFE0D000, 0x64A04000), (0xFFE0D800, 0x64A08000),
    (0xFE60C000, 0x84008000), (0xFE60A000, 0xC4008000), (0xFE20E000, 0xE4002000), (0xFFFFE000, 0x650AA000),
    (0xFF3EE000, 0x04068000), (0xFF3EE000, 0x040C8000), (0xFF3FE000, 0x040F8000),
)  # fmt: skip
_SVE: Sequence[tuple[int, int]] = (
    (0xFF20F800, 0x44000000), (0xFF20F800, 0x44200000),
)  # fmt: skip


# MRS of an identification register, which Linux emulates for programs.
_MRS_ID = 0xD5380000


def count_words(code: NDArray[np.uint8]) -> Counter[str]:
    """The AArch64 instructions in `code` by kind; `sve` holds `sve2` and what other features add to SVE."""
    words = code[: len(code) // 4 * 4].view("<u4")
    counts = Counter(instructions=len(words))
    taken = np.zeros(len(words), np.bool_)
    for name, rows in _ROWS.items():
        found = _any(words, rows)
        counts[name] = int(found.sum())
        taken |= found
    is_sve = words & np.uint32(0x1E000000) == np.uint32(0x04000000)
    counts["cpuid"] = int((words & np.uint32(0xFFFFF000) == np.uint32(_MRS_ID)).sum())
    counts["sve"] = int(is_sve.sum())
    counts["sve2"] = int((_any(words, _SVE2) & ~_any(words, _SVE) & ~taken).sum())
    return counts


def _any(words: NDArray[np.uint32], rows: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    found = np.zeros(len(words), np.bool_)
    for mask, value in rows:
        found |= words & np.uint32(mask) == np.uint32(value)
    return found
