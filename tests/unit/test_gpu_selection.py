"""The keep-rules, one by one, on containers written as names."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from composer.model.gpu import Selection, compiles, runs, select, select_relinkable


class Image(NamedTuple):
    kind: str
    sm: int
    variant: str = ""


def entries(names: str) -> list[Image]:
    return [Image(one[:3], int(one[3:].rstrip("af") or 0), one[3:].lstrip("0123456789")) for one in names.split()]


def kept(names: str, *sms: int, keep_ptx: bool = False) -> str:
    chosen = select(entries(names), Selection(sms=sms, keep_ptx=keep_ptx))
    return " ".join(one for index, one in enumerate(names.split()) if index in chosen)


@pytest.mark.parametrize(
    ("names", "sm", "expected"),
    [
        # The highest that runs, in any order, with all of its variants.
        ("elf80 elf86 elf90 ptx90", 86, "elf86"),
        ("elf86 elf80", 89, "elf86"),
        ("elf80 elf86", 80, "elf80"),
        ("elf90 elf90a elf90", 90, "elf90 elf90a elf90"),
        # Another major version never runs, and PTX takes over: the highest that is not above.
        ("elf80 elf86 ptx80 ptx86 ptx90", 90, "ptx90"),
        ("elf80 elf86 ptx80 ptx86 ptx100", 90, "ptx86"),
        ("elf75 elf70 ptx52", 75, "elf75"),
        ("elf70", 75, "elf70"),
        ("elf80", 90, ""),
        ("elf90", 89, ""),
        ("ptx90", 89, ""),
        ("", 90, ""),
        # `a` is only itself, `f` its family, upwards.
        ("elf90a", 90, "elf90a"),
        ("elf100 elf100a", 103, "elf100"),
        ("elf100a", 103, ""),
        ("elf100f", 103, "elf100f"),
        ("elf100 elf100a elf100f", 100, "elf100 elf100a elf100f"),
        ("elf100 elf100a elf100f", 103, "elf100 elf100f"),
        ("elf103f elf100", 100, "elf100"),
        ("elf120f elf121a", 121, "elf121a"),
        ("elf120a ptx120", 121, "ptx120"),
        ("ptx90a", 100, ""),
        ("ptx90a ptx80", 90, "ptx90a"),
        ("ptx100f ptx90", 103, "ptx100f"),
        ("ptx100f ptx90", 120, "ptx90"),
        # Tegra runs its own code and nobody else's; PTX is not bound to it.
        ("elf80 elf87 elf86", 87, "elf87"),
        ("elf80 elf86", 87, ""),
        ("elf80 elf87", 89, "elf80"),
        ("elf72", 75, ""),
        ("ptx80 elf80", 87, "ptx80"),
        # One chip, two names.
        ("elf101 elf100", 110, "elf101"),
        ("elf110 elf110f", 101, "elf110 elf110f"),
        ("elf100 elf100f ptx100", 110, "ptx100"),
        # LTO-IR besides what runs; unknown kinds always.
        ("lto80 lto90 lto100 elf90", 90, "lto90 elf90"),
        ("lto75", 90, "lto75"),
        ("new1 elf80", 90, "new1"),
    ],
)
def test_one_target(names: str, sm: int, expected: str) -> None:
    assert kept(names, sm) == expected


def test_all_targets() -> None:
    names = "elf50 ptx120 lto75 new3"
    assert kept(names) == names


def test_several_targets_are_a_union() -> None:
    assert kept("elf80 elf86 elf90 elf90a ptx90", 80, 90, 100) == "elf80 elf90 elf90a ptx90"


def test_keep_ptx_adds_what_the_target_and_later_gpus_compile() -> None:
    names = "elf90 ptx70 ptx80 ptx90 ptx100"
    assert kept(names, 90) == "elf90"
    assert kept(names, 90, keep_ptx=True) == "elf90 ptx90 ptx100"
    assert kept(names, 80, 90, keep_ptx=True) == "elf90 ptx80 ptx90 ptx100"


def test_keep_ptx_keeps_for_later_gpus_what_is_for_more_than_one() -> None:
    assert kept("elf90 ptx80 ptx90a ptx100f ptx120a", 90, keep_ptx=True) == "elf90 ptx80 ptx90a"


def test_runs_and_compiles() -> None:
    assert runs(entries("elf86"), 89)
    assert not runs(entries("elf89 ptx80"), 86)
    assert compiles(entries("elf89 ptx80"), 86)
    assert not compiles(entries("ptx90 elf86"), 86)


def relinkable(names: str, linked: list[str], *sms: int, keep_ptx: bool = False) -> str:
    chosen = select_relinkable(entries(names), [entries(one) for one in linked], Selection(sms=sms, keep_ptx=keep_ptx))
    return " ".join(one for index, one in enumerate(names.split()) if index in chosen)


def test_objects_to_relink_go_where_the_linked_code_runs() -> None:
    assert relinkable("elf80 elf90 ptx90", ["elf80 elf90"], 90) == ""
    assert relinkable("elf80 elf90 ptx90 new1", ["elf80 elf90", "elf90a"], 90) == "new1"


def test_objects_to_relink_stay_where_one_linked_container_lacks_the_target() -> None:
    assert relinkable("elf80 elf90 ptx90", ["elf80 elf90", "elf80"], 90) == "elf90"
    assert relinkable("elf80 ptx80", ["elf80"], 90) == "ptx80"


def test_objects_to_relink_are_judged_per_target() -> None:
    assert relinkable("elf80 elf90 ptx90", ["elf90"], 80, 90) == "elf80"


def test_objects_to_relink_without_linked_code() -> None:
    assert relinkable("elf80 elf90", [], 90) == "elf90"


def test_objects_to_relink_for_all() -> None:
    assert relinkable("elf80 ptx90", ["elf90"]) == "elf80 ptx90"


def test_objects_to_relink_keep_ptx() -> None:
    assert relinkable("elf90 ptx80 ptx90", ["elf90"], 90, keep_ptx=True) == "ptx90"
