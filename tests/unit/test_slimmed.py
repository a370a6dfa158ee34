"""The proof's own statement of what a driver could pick."""

from __future__ import annotations

import re

import pytest

from composer.proofs._slim_code import pickable
from composer.proofs._slim_reader import Entry


def entries(words: str) -> list[Entry]:
    """Images from words such as `elf90a ptx80 lto75 other0`."""
    found = []
    for at, word in enumerate(words.split()):
        parts = re.fullmatch(r"(elf|ptx|lto|other)(\d+)([af]?)", word)
        assert parts
        kind, sm, variant = parts.groups()
        found.append(Entry(kind=kind, sm=int(sm), variant=variant, start=64 * at, end=64 * at + 64))  # type: ignore[arg-type]
    return found


def picked(words: str, *sms: int, keep_ptx: bool = False) -> str:
    at = pickable(entries(words), sms, keep_ptx=keep_ptx)
    return " ".join(word for index, word in enumerate(words.split()) if index in at)


@pytest.mark.parametrize(
    ("words", "sm", "expected"),
    [
        ("elf80 elf86 elf90", 80, "elf80"),
        ("elf80 elf86 elf90", 89, "elf86"),
        ("elf80 elf86 elf89", 89, "elf89"),
        ("elf80 elf80 elf75", 86, "elf80 elf80"),
        ("elf70", 75, "elf70"),
        ("elf80", 90, ""),
        # `a` runs on exactly its SM, beside the plain one; `f` on its family from there on.
        ("elf90 elf90a", 90, "elf90 elf90a"),
        ("elf100 elf100a", 103, "elf100"),
        ("elf100f elf100a elf103a", 103, "elf103a"),
        ("elf100f elf100a", 103, "elf100f"),
        ("elf100f", 120, ""),
        ("elf103f", 100, ""),
        ("elf120 elf120f elf121a", 121, "elf121a"),
        # Tegra runs what is made for it, and nothing else does.
        ("elf80 elf86", 87, ""),
        ("elf86 elf87", 87, "elf87"),
        ("elf87 elf86", 89, "elf86"),
        ("elf70 elf72", 75, "elf70"),
        ("elf100 elf103", 110, ""),
        ("elf101 elf110a", 110, "elf101 elf110a"),
        ("elf100 elf101", 103, "elf100"),
        # Without machine code, PTX of the highest SM that the GPU can compile.
        ("elf80 ptx90", 90, "ptx90"),
        ("elf90 ptx90", 90, "elf90"),
        ("ptx50 ptx80 ptx100", 90, "ptx80"),
        ("ptx80 ptx90a", 100, "ptx80"),
        ("ptx80 ptx90a", 90, "ptx90a"),
        ("ptx80 ptx100f", 103, "ptx100f"),
        ("ptx80 ptx100f", 120, "ptx80"),
        ("ptx100", 90, ""),
        ("ptx87 ptx80", 90, "ptx87"),
        ("ptx100 ptx101", 103, "ptx100"),
        ("ptx100 ptx101", 110, "ptx101"),
        # LTO-IR beside both, and what nobody knows always.
        ("lto75 lto80 lto100 elf90", 90, "lto80 elf90"),
        ("lto80 lto90a", 100, "lto80"),
        ("lto80 lto100f", 103, "lto100f"),
        ("other0 elf80 other200", 90, "other0 other200"),
        ("", 90, ""),
    ],
)
def test_what_one_gpu_could_pick(words: str, sm: int, expected: str) -> None:
    assert picked(words, sm) == expected


def test_several_gpus_need_what_each_of_them_needs() -> None:
    assert picked("elf80 elf90 elf90a elf100 ptx120", 86, 90, 121) == "elf80 elf90 elf90a ptx120"


def test_no_gpus_mean_all() -> None:
    assert picked("elf80 ptx50 lto75 other0") == "elf80 ptx50 lto75 other0"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("elf90 ptx50 ptx80", "elf90 ptx80"),
        ("elf90 ptx90a ptx80", "elf90 ptx90a ptx80"),
        ("elf90 ptx90 ptx120 ptx120f", "elf90 ptx90 ptx120"),
        ("elf80 elf90", "elf90"),
    ],
)
def test_later_gpus_need_ptx(words: str, expected: str) -> None:
    assert picked(words, 90, keep_ptx=True) == expected
