"""Compare files of fingerprint.py's lines with the first: exit status 1 if an operation differs.

An operation that does not repeat its own bits (cuSPARSE adds atomically) is judged by its error alone.

    python3 tests/gpu/compare.py UNMODIFIED.jsonl OTHER.jsonl ...
"""

import json
import sys
from pathlib import Path


def results(path):
    lines = (json.loads(line) for line in Path(path).read_text().splitlines() if line.startswith("{"))
    return {line.pop("operation"): line for line in lines}


def judged(wanted, found):
    if "fault" in wanted and "fault" in found:
        return "fails in both"
    loose = not wanted.get("repeatable", True) and "sha256" in found
    return "does not repeat its bits in either" if loose else "DIFFERS"


def main(reference, *others):
    wanted, differing = results(reference), 0
    for other in others:
        found = results(other)
        same = [
            name
            for name, one in wanted.items()
            if "sha256" in one and found.get(name, {}).get("sha256") == one["sha256"]
        ]
        print(f"{other}: {len(same)} of {len(wanted)} operations equal bit by bit")
        for name in sorted(wanted.keys() - set(same)):
            verdict = judged(wanted[name], found.get(name, {}))
            differing += verdict == "DIFFERS"
            print(f"  {name}: {verdict}: {wanted[name]} {found.get(name, 'nothing')}")
        differing += not same
    return bool(differing)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
