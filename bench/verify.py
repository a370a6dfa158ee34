"""`compose verify` of an unpacked bundle, against reading and hashing its files with sha256sum; bench/README.md."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

from measure import COMPOSE, environ, machine_facts, measured, read_into_page_cache, scratch_folder, today

import composer
from composer._fs import write_atomic
from composer.errors import ComposerError
from composer.model.manifest import Manifest
from composer.steps.tree import manifest_of

ROOT = Path(__file__).resolve().parents[1]


def contestants(prefix: Path) -> dict[str, list[str]]:
    """The commands, by name; each uses all cores."""
    jobs = str(len(os.sched_getaffinity(0)))
    verify = [sys.executable, "-c", COMPOSE, "verify", str(prefix), "-j", jobs]
    hashing = f'find "$0" -type f -print0 | xargs -0 -P {jobs} -n 500 sha256sum'
    return {
        "sha256sum": ["sh", "-c", hashing, str(prefix)], "verify --no-imports": [*verify, "--no-imports"],
        "verify": verify,
    }  # fmt: skip


def compare(prefix: Path, rounds: int, work: Path | None) -> dict[str, list[dict[str, object]]]:
    """What each contestant took, in turns, with all files in the page cache."""
    read_into_page_cache(path for path in prefix.rglob("*") if path.is_file() and not path.is_symlink())
    found: dict[str, list[dict[str, object]]] = {}
    with scratch_folder(work) as folder:
        for _ in range(rounds):
            for name, argv in contestants(prefix).items():
                used = measured(argv, env=environ(), log=folder / "log")
                found.setdefault(name, []).append(used.as_dict())
    return found


def main() -> None:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prefix", type=Path, help="a folder that a bundle was unpacked into")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for logs")
    parser.add_argument("--output", type=Path, default=ROOT / f"bench/results/{today()}-verify.json")
    asked = parser.parse_args()
    try:
        manifest, machine = manifest_of(asked.prefix), machine_facts()
        runs = compare(asked.prefix, asked.rounds, asked.work)
    except ComposerError as fault:
        sys.exit(f"error: {fault}")
    medians = {name: statistics.median(float(str(one["seconds"])) for one in used) for name, used in runs.items()}
    ratios = {name: round(seconds / medians["sha256sum"], 2) for name, seconds in medians.items()}
    for name, ratio in ratios.items():
        print(f"{name:20} {medians[name]:7.1f} s  {ratio:5.2f}")
    result = {"composer": composer.__version__, "machine": machine, "bundle": facts(manifest), "ratios": ratios,
              "runs": runs}  # fmt: skip
    write_atomic(asked.output, json.dumps(result, indent=1).encode() + b"\n")


def facts(manifest: Manifest) -> dict[str, object]:
    """Which bundle, and how much of it."""
    return {"name": manifest.name, "fingerprint": manifest.fingerprint, "files": len(manifest.entries()),
            "bytes": sum(layer.size for layer in manifest.layers)}  # fmt: skip


if __name__ == "__main__":
    main()
