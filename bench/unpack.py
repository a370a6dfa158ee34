"""Unpack one bundle with `tar --zstd -xf` and with `compose unpack`, in turns, and compare: wall, user and system time.

    scripts/bench unpack BUNDLE [--folder DIR] [--rounds 3] [--jobs N ...] [--output FILE]

The bundle is read once before, so that both find it in the page cache. What was unpacked is removed between the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from measure import COMPOSE, machine_facts, read_into_page_cache

Times = dict[str, float]


def timed(words: Sequence[str | Path], folder: Path) -> Times:
    """Run a command that fills a folder; seconds of wall clock, and of CPU in user and system mode."""
    shutil.rmtree(folder, ignore_errors=True)
    if words[0] == "tar":
        folder.mkdir()
    before, started = os.times(), time.monotonic()
    subprocess.run([str(word) for word in words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall, after = time.monotonic() - started, os.times()
    shutil.rmtree(folder)
    return {"wall": wall, "user": after.children_user - before.children_user,
            "system": after.children_system - before.children_system}  # fmt: skip


def compare(bundle: Path, folder: Path, rounds: int, jobs: Sequence[int]) -> dict[str, list[Times]]:
    """The measurements of every way, by its name."""
    place = folder / "unpacked"
    ways: dict[str, list[str | Path]] = {"tar --zstd -xf": ["tar", "--zstd", "-xf", bundle, "-C", place]}
    for count in jobs:
        words = ["unpack", "--any-host", str(bundle), str(place), "-j", str(count)]
        ways[f"compose unpack -j {count}"] = [sys.executable, "-c", COMPOSE, *words]
    read_into_page_cache([bundle])
    found: dict[str, list[Times]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, command in ways.items():
            found[name].append(timed(command, place))
            print(name, {key: round(value, 1) for key, value in found[name][-1].items()}, file=sys.stderr, flush=True)
    return found


def show(found: dict[str, list[Times]]) -> None:
    """Print medians, and how they compare with the first way's."""
    first: Times = {}
    for name, runs in found.items():
        one = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        first = first or one
        cpu = (one["user"] + one["system"]) / (first["user"] + first["system"])
        print(f"{name:24} wall {one['wall']:6.1f} s ({first['wall'] / one['wall']:.2f} times as fast)  "
              f"user {one['user']:5.1f} s  system {one['system']:5.1f} s  CPU {cpu:.2f} of the first")  # fmt: skip


def main() -> None:
    """Measure and print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on which file system")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, nargs="+", default=[len(os.sched_getaffinity(0))])
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    machine = machine_facts()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        found = compare(asked.bundle.absolute(), Path(folder), asked.rounds, asked.jobs)
    show(found)
    if asked.output:
        asked.output.write_text(json.dumps({"machine": machine, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
