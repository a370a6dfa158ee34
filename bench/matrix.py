"""Bundles for many targets, one after another into one store: what each adds in bytes and time; bench/README.md."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import (
    COMPOSE,
    Usage,
    environ,
    link_files,
    machine_facts,
    measured,
    read_into_page_cache,
    scratch_folder,
    today,
)

import composer
from composer._fs import write_atomic
from composer.errors import ComposerError
from composer.steps.build import Settings, fetch_all
from composer.steps.locks import LockOptions
from composer.steps.outline import Request, outline
from composer.store import Store

ROOT = Path(__file__).resolve().parents[1]
#: What layers are in a store.
_STORED = ("layer", "blob")


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """One target. size: bytes of its bundle. stored: bytes of all layers in the store after it. layers: made for it.

    again: the same command once more.
    """

    name: str
    size: int
    stored: int
    layers: int
    usage: Usage
    again: Usage

    @property
    def cpu(self) -> float:
        """Seconds of processors."""
        return self.usage.user + self.usage.system


def _measure(asked: argparse.Namespace, folder: Path) -> Iterator[Made]:
    store = folder / "store"
    for sm in asked.sm.split(","):
        request = Request(recipe=asked.recipe, sm=sm, isa=asked.isa, lock=LockOptions(offline=True))
        fetched = fetch_all(outline(request, Store()), Store(), Settings(jobs=2, offline=True), lambda _: None)
        link_files(Store().root, store, (path for path in fetched.paths.values() if not _there(path, store)))
        read_into_page_cache(fetched.paths.values())
        argv = [sys.executable, "-c", COMPOSE, "matrix", "--recipe", asked.recipe, "--sm", sm, "--isa", asked.isa,
                "--offline", "--json", "--no-imports", "-o", folder / "out", *asked.more]  # fmt: skip
        runs = [measured(argv, env=environ(WHEEL_COMPOSER_STORE=str(store)), log=folder / f"log{number}")
                for number in range(2)]  # fmt: skip
        (target,) = json.loads((folder / "log0").read_text().splitlines()[-1])["report"]["targets"]
        Path(target["path"]).unlink()  # the next one needs its room
        yield Made(name=target["name"], size=target["bytes"], stored=_stored(store),
                   layers=target["columns"]["layers"]["steps"], usage=runs[0], again=runs[1])  # fmt: skip
        print(target["name"], file=sys.stderr, flush=True)


def _there(path: Path, store: Path) -> bool:
    return (store / path.relative_to(Store().root)).exists()


def _stored(store: Path) -> int:
    return sum(path.stat().st_size for kind in _STORED for path in (store / "objects" / kind).rglob("*.zst"))


def _table(made: Sequence[Made]) -> Iterator[str]:
    yield (f"{'':<58}{'MB':>9}{'stored MB':>11}{'added':>9}{'layers':>8}{'s':>8}{'of 1st':>8}{'CPU s':>8}{'of 1st':>8}"
           f"{'again s':>9}")  # fmt: skip
    first, before = made[0], 0
    for one in made:
        yield (f"{one.name[:57]:<58}{one.size / 1e6:>9.1f}{one.stored / 1e6:>11.1f}{(one.stored - before) / 1e6:>9.1f}"
               f"{one.layers:>8}{one.usage.seconds:>8.1f}{one.usage.seconds / first.usage.seconds:>8.2f}"
               f"{one.cpu:>8.1f}{one.cpu / first.cpu:>8.2f}{one.again.seconds:>9.1f}")  # fmt: skip
        before = one.stored
    tarballs = sum(one.size for one in made)
    yield f"tarballs: {tarballs / 1e6:.0f} MB, layers in the store: {before / 1e6:.0f} MB ({before / tarballs:.0%})"


def _report(asked: argparse.Namespace, made: Sequence[Made], machine: dict[str, Any]) -> dict[str, Any]:
    first = made[0]
    return {
        "benchmark": "matrix", "date": today(), "composer": composer.__version__, "machine": machine,
        "options": {"recipe": asked.recipe, "sm": asked.sm, "isa": asked.isa, "more": asked.more},
        "tarballs_bytes": sum(one.size for one in made), "stored_bytes": made[-1].stored,
        "targets": [
            {"name": one.name, "bytes": one.size, "stored_after_bytes": one.stored, "layers_made": one.layers,
             "seconds_over_first": round(one.usage.seconds / first.usage.seconds, 3),
             "cpu_over_first": round(one.cpu / first.cpu, 3), "usage": one.usage.as_dict(),
             "again": one.again.as_dict()}
            for one in made
        ],
    }  # fmt: skip


def _bench(asked: argparse.Namespace) -> None:
    machine = machine_facts()
    with scratch_folder(asked.work) as folder:
        made = list(_measure(asked, folder))
    machine["load_after"] = round(os.getloadavg()[0], 2)
    write_atomic(asked.output, json.dumps(_report(asked, made, machine), indent=1).encode() + b"\n")
    print("\n".join([*_table(made), str(asked.output)]))


def main() -> None:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(prog="scripts/bench matrix", description=__doc__)
    parser.add_argument("--recipe", default="sglang", help="a shipped recipe, or the path of one")
    parser.add_argument("--sm", default="80,86,89,90,100,120", help="in this order; the first pays for what all share")
    parser.add_argument("--isa", default="avx512")
    parser.add_argument("--work", type=Path, help="a folder for scratch (default: the store)")
    parser.add_argument("--output", type=Path, default=ROOT / f"bench/results/{today()}-matrix.json")
    parser.add_argument("more", nargs="*", help="after --, more options of `compose matrix`")
    try:
        _bench(parser.parse_args())
    except ComposerError as fault:
        sys.exit(f"error: {fault}")


if __name__ == "__main__":
    main()
