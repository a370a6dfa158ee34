"""One piece of work on one library, in a process of its own: `slim_worker.py WORK SOURCE INTO EDIT`.

WORK: `read`, `sha256` and `copy` are the yardsticks, of the whole file; `decide` finds out what to cut; `slim` also
writes the new file; `proven` also proves it and lets the loader map it, as a build does. EDIT: a SlimEdit in JSON.
Prints wall and CPU seconds, of the loader's process too, as JSON; starting Python is not among them.
"""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
from measure import read_into_page_cache

from composer.formats.slim import Slimmed, slim
from composer.model.gpu import Selection
from composer.model.plan import SlimEdit
from composer.steps.slim import slim_object
from composer.steps.survey import mapped


def _read(source: Path, _into: Path, _edit: SlimEdit) -> None:
    read_into_page_cache([source])


def _sha256(source: Path, _into: Path, _edit: SlimEdit) -> None:
    with source.open("rb") as stream:
        hashlib.file_digest(stream, "sha256")


def _copy(source: Path, into: Path, _edit: SlimEdit) -> None:
    with source.open("rb") as stream, into.open("wb") as out:
        shutil.copyfileobj(stream, out, 1 << 20)


def _decide(source: Path, _into: Path, edit: SlimEdit) -> None:
    with mapped(source) as view:
        slim(view, source.name, Selection(sms=tuple(edit.sms)), debug=edit.debug)


def _slim(source: Path, into: Path, edit: SlimEdit) -> None:
    with mapped(source) as view:
        done: Slimmed = slim(view, source.name, Selection(sms=tuple(edit.sms)), debug=edit.debug)
        with into.open("wb") as out:
            out.writelines(done.pieces())


def _proven(source: Path, into: Path, edit: SlimEdit) -> None:
    slim_object(source, into, source.name, edit)


WORKS: Mapping[str, Callable[[Path, Path, SlimEdit], None]] = {
    "read": _read, "sha256": _sha256, "copy": _copy, "decide": _decide, "slim": _slim, "proven": _proven,
}  # fmt: skip
YARDSTICKS = ("read", "sha256", "copy")


def main(work: str, source: str, into: str, edit: str) -> None:
    """Do it once and tell how long it took."""
    decoded = msgspec.json.decode(edit, type=SlimEdit)
    cpu, wall = _cpu(), time.perf_counter()
    WORKS[work](Path(source), Path(into), decoded)
    print(json.dumps({"wall": time.perf_counter() - wall, "cpu": _cpu() - cpu}))


def _cpu() -> float:
    used = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


if __name__ == "__main__":
    main(*sys.argv[1:])
