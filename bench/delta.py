"""Deltas between bundles: their sizes, and the time of making and applying them, beside a copy; bench/README.md."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import COMPOSE, Usage, environ, machine_facts, measured, read_into_page_cache, scratch_folder, today

import composer
from composer._fs import write_atomic
from composer.errors import ComposerError, HostError
from composer.steps.delta import apply_script
from composer.steps.diff import diff_bundles

ROOT = Path(__file__).resolve().parents[1]
#: What all times are divided by: the new bundle as a file that is on the disk.
_YARDSTICK = "copy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One comparison: sizes in bytes, and what each contestant took in each round."""

    new: Path
    size: int
    delta: int
    layers: int
    laps: Mapping[str, Sequence[Usage]]

    def seconds(self, name: str) -> float:
        """The median of the rounds."""
        return statistics.median(lap.seconds for lap in self.laps[name])


def _contestants(old: Path, new: Path, folder: Path) -> Iterator[tuple[str, list[str | Path], Path | None]]:
    """(name, command, file that must then be equal to `new`)."""
    delta, made, compose = folder / "delta", folder / "made", [sys.executable, "-c", COMPOSE]
    yield "copy", ["sh", "-c", 'cp "$0" "$1" && sync "$1"', new, made], made
    yield "sha256sum", ["sha256sum", new], None
    yield "compose delta", [*compose, "delta", old, new, "-o", delta], None
    yield "compose apply", [*compose, "apply", old, delta, "-o", made], made
    yield "sh apply.sh", ["sh", folder / "apply.sh", old, delta, made], made


def _measure(old: Path, new: Path, folder: Path, rounds: int) -> Pair:
    (folder / "apply.sh").write_text(apply_script())
    laps: dict[str, list[Usage]] = {}
    for _ in range(rounds):
        for name, argv, made in _contestants(old, new, folder):
            read_into_page_cache([old, new])
            laps.setdefault(name, []).append(measured(argv, env=environ(), log=folder / "log"))
            if made:
                _require_equal(made, new)
                made.unlink()
    shared = diff_bundles(old, new)[2].shared
    return Pair(new=new, size=new.stat().st_size, delta=(folder / "delta").stat().st_size,
                layers=shared.of_bytes - shared.bytes, laps=laps)  # fmt: skip


def _require_equal(made: Path, wanted: Path) -> None:
    with made.open("rb") as one, wanted.open("rb") as other:
        while (piece := one.read(1 << 20)) == other.read(1 << 20):
            if not piece:
                return
    raise HostError("is not the bundle that it should be", where=str(made))


def _table(pairs: Sequence[Pair]) -> Iterator[str]:
    names = list(pairs[0].laps)
    yield f"{'new bundle':<58}{'MB':>9}{'layers MB':>11}{'delta MB':>10}{'':>8}" + "".join(
        f"{one:>15}" for one in names
    )
    for pair in pairs:
        times = "".join(f"{f'{pair.seconds(name):.1f} s':>9}{_ratio(pair, name):>6.2f}" for name in names)
        yield (f"{pair.new.name[:57]:<58}{pair.size / 1e6:>9.1f}{pair.layers / 1e6:>11.1f}{pair.delta / 1e6:>10.1f}"
               f"{pair.delta / pair.size:>8.2%}{times}")  # fmt: skip


def _ratio(pair: Pair, name: str) -> float:
    return round(pair.seconds(name) / pair.seconds(_YARDSTICK), 2)


def _report(old: Path, pairs: Sequence[Pair], machine: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "benchmark": "delta", "date": today(), "composer": composer.__version__, "machine": machine,
        "old": {"name": old.name, "bytes": old.stat().st_size},
        "pairs": [
            {"new": one.new.name, "bytes": one.size, "changed_layers_bytes": one.layers, "delta_bytes": one.delta,
             "delta_over_new": round(one.delta / one.size, 5),
             "over_copy": {name: _ratio(one, name) for name in one.laps},
             "laps": {name: [lap.as_dict() for lap in laps] for name, laps in one.laps.items()}}
            for one in pairs
        ],
    }  # fmt: skip


def _bench(asked: argparse.Namespace) -> None:
    machine, pairs = machine_facts(), []
    with scratch_folder(asked.work) as folder:
        for new in asked.new:
            pairs.append(_measure(asked.old.absolute(), new.absolute(), folder, asked.rounds))
            print(pairs[-1].new.name, file=sys.stderr)
    machine["load_after"] = round(os.getloadavg()[0], 2)
    write_atomic(asked.output, json.dumps(_report(asked.old, pairs, machine), indent=1).encode() + b"\n")
    print("\n".join([*_table(pairs), str(asked.output)]))


def main() -> None:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(prog="scripts/bench delta", description=__doc__)
    parser.add_argument("old", type=Path, help="the bundle that is there")
    parser.add_argument("new", type=Path, nargs="+", help="bundles to get from it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="a folder for scratch (default: the store)")
    parser.add_argument("--output", type=Path, default=ROOT / f"bench/results/{today()}-delta.json")
    try:
        _bench(parser.parse_args())
    except ComposerError as fault:
        sys.exit(f"error: {fault}")


if __name__ == "__main__":
    main()
