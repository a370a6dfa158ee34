"""What the opcode of a VEX or EVEX instruction tells: a table over encoding, opcode map, prefix, W and opcode.

A row is `map.prefix.W: opcodes` in hexadecimal, with `-` for any prefix or W and `a-b` for a range of opcodes; prefix 0
is none, 1 is 66, 2 is F3 and 3 is F2, as the prefixes encode it. Source: Intel's manual, volume 2, the opcode columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np

_VEX, _EVEX = 0, 1

_NAMES = (
    "avx2", "fma", "f16c", "bmi", "avxvnni", "amx", "avx512f", "avx512bw", "avx512dq", "avx512cd", "avx512vnni",
    "avx512bf16", "avx512fp16", "avx512other",
)  # fmt: skip
#: The bit of each feature. An instruction without any is plain AVX or AVX512F.
FEATURES = {name: 1 << index for index, name in enumerate(_NAMES)}

#: One element, whatever the length bits say; an operand is always 128 bits; an operand is a mask register.
SCALAR, LENGTHLESS, MASKS = 1 << 32, 1 << 33, 1 << 34
#: AVX2 when it is 256 bits long; AVX2 when its operand is a register, as AVX loads it from memory.
AVX2_256, AVX2_REGISTER = 1 << 35, 1 << 36
#: It may name no vector register: what it reads is in memory and what it writes is a mask.
NO_REGISTER = 1 << 37
#: What it writes is half as long as what it reads, so from memory only the half is a register.
NARROWING = 1 << 38

_FMA = "96-9f a6-af b6-bf"
_BW_DQ_MASKS = {
    "avx512bw": "1.0.1: 41 42 44-47 4a 4b 90 91 98 99 | 1.1.1: 41 42 44-47 4a 90 91 98 99 | 1.3.-: 92 93 | 3.1.-: 31 33"
                " | 1.0.0: 4b",
    "avx512dq": "1.1.0: 41 42 44-47 4a 90-93 98 99 | 1.0.0: 4a 99 | 3.1.0: 30 32",
    "avx512f": "1.0.0: 41 42 44-47 90-93 98 | 1.1.0: 4b | 3.1.1: 30 32",
}  # fmt: skip

_ROWS: dict[int, tuple[tuple[int, str], ...]] = {
    _VEX: (
        (FEATURES["avx2"], "2.1.-: 16 36 45-47 58 59 5a 78 79 8c 8e 90-93 | 3.1.-: 0-2 38 39 46"),
        (AVX2_256, "1.1.-: 60-6d 70-76 d1-d5 d7-df e0-e5 e8-ef f1-f6 f8-fe | 1.2.-: 70 | 1.3.-: 70"
                   " | 2.1.-: 0-b 1c-1e 20-25 28-2b 30-35 37-40 | 3.1.-: e f 42"),
        (AVX2_REGISTER, "2.1.-: 18 19"),
        (FEATURES["fma"], f"2.1.-: {_FMA}"),
        (FEATURES["f16c"], "2.1.-: 13 | 3.1.-: 1d"),
        (FEATURES["bmi"] | LENGTHLESS, "2.-.-: f2 f3 f5-f7 | 3.3.-: f0"),
        (FEATURES["avxvnni"], "2.-.-: 50-53"),
        (FEATURES["amx"] | LENGTHLESS, "2.-.-: 49 4b 5c 5e 6c"),
        *((FEATURES[name] | MASKS, text) for name, text in _BW_DQ_MASKS.items()),
        (LENGTHLESS, "1.0.-: 77"),
        (NARROWING, "1.1.-: 5a e6 | 1.3.-: e6"),
    ),
    _EVEX: (
        (FEATURES["avx512bw"], "1.1.-: 60 61 63-65 67-69 6b 71 74 75 c4 c5 d1 d5 d8-da dc-de e0 e1 e3-e5 e8-ea ec-ee f1"
                               " f5 f6 f8 f9 fc fd | 1.2.-: 70 | 1.3.-: 6f 70 7f | 2.1.-: 0 4 b 10-12 1c 1d 20 26 2b 30"
                               " 38 3a 3c 3e 66 78-7b | 2.1.1: 75 7d 8d | 2.2.-: 10 20 26 28-30 | 3.1.-: f 14 15 20 3e"
                               " 3f 42"),
        (FEATURES["avx512dq"], "1.0.-: 54-57 | 1.1.-: 54-57 78-7b | 1.2.1: 7a e6 | 1.3.1: 7a | 1.0.1: 5b | 2.1.1: 1a 40"
                               " 5a | 2.1.0: 19 1b 59 5b | 2.2.-: 38 39 | 3.1.-: 16 22 50 51 56 57 66 67"
                               " | 3.1.1: 18 19 38 39 | 3.1.0: 1a 1b 3a 3b"),
        (FEATURES["avx512cd"], "2.1.-: 44 c4 | 2.2.1: 2a | 2.2.0: 3a"),
        (FEATURES["avx512vnni"], "2.1.0: 50-53"),
        (FEATURES["avx512bf16"], "2.2.0: 52 72 | 2.3.0: 72"),
        (FEATURES["avx512fp16"], "5.-.-: 0-ff | 6.-.-: 0-ff | 3.0.-: 0-ff | 3.2.-: c2"),
        (FEATURES["avx512other"], "2.1.-: 54 55 62 63 70-73 83 8f b4 b5 c6-c8 ca cc cf dc-df | 2.1.0: 75 7d 8d | 2.3.-:"
                                  " 52 53 68 9a 9b aa ab | 3.1.-: 44 70-73 ce cf"),
        (FEATURES["fma"] | FEATURES["avx512f"], f"2.1.-: {_FMA}"),
        (SCALAR, "1.2.-: 10 11 2a 2c 2d 51 58-5a 5c-5f 78 79 7b c2 | 1.3.-: 10 11 2a 2c 2d 51 58-5a 5c-5f 78 79 7b c2"
                 " | 1.0.-: 2e 2f | 1.1.-: 2e 2f | 2.1.-: 2d 43 4d 4f 99 9b 9d 9f a9 ab ad af b9 bb bd bf cb cd"
                 " | 3.1.-: a b 27 51 55 57 67 | 3.0.-: a 27 57 67 | 3.2.-: c2 | 5.0.-: 1d 2e 2f | 5.3.-: 5a"
                 " | 5.2.-: 10 11 2a 2c 2d 51 58-5a 5c-5f 78 79 7b | 6.0.-: 13 | 6.2.-: 57 d7 | 6.3.-: 57 d7"
                 " | 6.1.-: 2d 43 4d 4f 99 9b 9d 9f a9 ab ad af b9 bb bd bf"),
        (LENGTHLESS, "1.0.-: 12 13 16 17 | 1.1.-: 12 13 16 17 6e 7e c4 c5 d6 | 1.2.-: 7e"
                     " | 3.1.-: 14-17 20-22 | 5.1.-: 6e 7e"),
        (NO_REGISTER, "3.-.-: 66"),
        (NARROWING, "1.0.1: 5b 78 79 | 1.1.1: 5a e6 | 1.3.1: 7a e6 | 2.2.0: 72 | 5.0.0: 5b | 5.1.0: 1d | 5.3.0: 7a"),
    ),
}  # fmt: skip


def _places(text: str) -> Iterator[tuple[int, int, int, int]]:
    """Every (map, prefix, W, opcode) of a row."""
    for part in text.split("|"):
        head, _, opcodes = part.partition(":")
        table, prefix, wide = head.strip().split(".")
        prefixes = range(4) if prefix == "-" else (int(prefix),)
        widths = range(2) if wide == "-" else (int(wide),)
        for word in opcodes.split():
            low, _, high = word.partition("-")
            numbers = range(int(low, 16), int(high or low, 16) + 1)
            yield from product((int(table),), prefixes, widths, numbers)


def _table() -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
    table = np.zeros((2, 8, 4, 2, 256), np.uint64)
    for encoding, rows in _ROWS.items():
        for bits, text in rows:
            for place in _places(text):
                table[(encoding, *place)] |= np.uint64(bits)
    return table


#: Bits by [VEX or EVEX, opcode map, prefix, W, opcode].
TABLE = _table()
