"""Look at the models of this bundle and of the Hugging Face cache, verify them, and add one from an archive, offline.

    compose-model list [--hub DIR] [--json]
    compose-model verify [MODEL ...] [--hub DIR] [--quick] [--json]
    compose-model add ARCHIVE [--hub DIR]

MODEL is ORG/NAME, as `list` shows it, or a folder; without one, all. ARCHIVE is what `compose model bundle` makes, or -
for standard input; one that is compressed needs the program `zstd`. DIR is laid out as a Hugging Face cache. Without
--hub models are added to the bundle's share/models/hub, and looked for there and in the cache.

Exit status: 0, 1 a model is not whole, 2 a command line that cannot be meant, 3 an archive that is refused or damaged,
4 something cannot be read or written here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from .. import PREFIX
from .archive import HUB, ArchiveError, add
from .hub import Model, models
from .place import Place
from .snapshot import faults

#: Exit statuses.
FAULTY, USAGE, REFUSED, FAILED = 1, 2, 3, 4
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_STEP = 10 << 30


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `compose-model`; returns its exit status."""
    options = _parser().parse_args(arguments)
    bundled = Path(PREFIX, HUB)
    place = Place(prefix=Path(PREFIX), cache=None, environ=os.environ)
    hubs = [Path(options.hub)] if options.hub else [bundled, place.hub_cache]
    try:
        if options.verb == "add":
            return _add(options.archive, hubs[0])
        if options.verb == "list":
            return _list(hubs, as_json=options.json)
        return _verify(options.models, hubs, deep=not options.quick, as_json=options.json)
    except ArchiveError as fault:
        return _say(REFUSED, f"{options.archive}: {fault}", "Copy the archive again, or bundle the model again.")
    except OSError as fault:
        fix = "Choose a folder that you may write to with --hub, such as the Hugging Face cache."
        return _say(FAILED, f"{fault.filename or hubs[0]}: {fault.strerror or fault}", fix)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="compose-model", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="list|verify|add")
    shown, checked, added = (verbs.add_parser(name) for name in ("list", "verify", "add"))
    for verb in (shown, checked, added):
        verb.add_argument("--hub", metavar="DIR", help="a folder laid out as a Hugging Face cache")
    for verb in (shown, checked):
        verb.add_argument("--json", action="store_true", help="print JSON")
    checked.add_argument("models", nargs="*", metavar="MODEL", help="ORG/NAME or a folder; default: all")
    checked.add_argument("--quick", action="store_true", help="sizes and headers only, no digests")
    added.add_argument("archive", metavar="ARCHIVE", help="a model bundle, or - for standard input")
    return parser


def _say(status: int, what: str, fix: str) -> int:
    print(f"compose-model: {what}\n  fix: {fix}", file=sys.stderr)
    return status


def _list(hubs: Sequence[Path], *, as_json: bool) -> int:
    found = [(hub, model) for hub in hubs for model in models(hub)]
    if as_json:
        rows = [{**_row(model), "size": model.size, "whole": _is_whole(model)} for _, model in found]
        print(json.dumps(rows, indent=2))
        return 0
    for hub, model in found:
        state = "whole" if _is_whole(model) else "NOT WHOLE"
        main_ = "  main" if model.main else ""
        print(f"{model.name}  {model.revision[:12]}  {model.size / 1e9:.2f} GB  {state}{main_}  {hub}")
    if not found:
        print(f"no models in {', '.join(map(str, hubs))}", file=sys.stderr)
    return 0


def _row(model: Model) -> dict[str, Any]:
    return {"name": model.name, "revision": model.revision, "folder": str(model.folder), "main": model.main}


def _is_whole(model: Model) -> bool:
    return not any(one["severity"] == "error" for one in faults(str(model.folder), deep=False))


def _verify(asked: Sequence[str], hubs: Sequence[Path], *, deep: bool, as_json: bool) -> int:
    chosen, missing = _chosen(asked, hubs)
    if missing:
        return _say(USAGE, f"no model {missing[0]!r} in {', '.join(map(str, hubs))}", "See `compose-model list`.")
    rows = [{**_row(model), "findings": faults(str(model.folder), deep=deep)} for model in chosen]
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            _show(row)
    return FAULTY if any(one["severity"] == "error" for row in rows for one in row["findings"]) else 0


def _chosen(asked: Sequence[str], hubs: Sequence[Path]) -> tuple[list[Model], list[str]]:
    """(the models that are meant, what is asked for and is not there)."""
    present = [model for hub in hubs for model in models(hub)]
    if not asked:
        return present, []
    chosen, missing = [], []
    for one in asked:
        named = [model for model in present if model.name == one]
        if not named and os.path.isdir(one):  # noqa: PTH112  # takes any text
            named = [Model(one, "", Path(one), main=False)]
        chosen += named
        missing += [] if named else [one]
    return chosen, missing


def _show(row: dict[str, Any]) -> None:
    print(f"{row['name']}  {row['revision'][:12]}  {'whole' if not row['findings'] else ''}".rstrip())
    for one in row["findings"]:
        print(f"  {one['severity']}: {one['id']}: {one['subject']}: {one['evidence']}\n    fix: {one['fix']}")


def _add(archive: str, hub: Path) -> int:
    written = 0

    def progress(count: int) -> None:
        nonlocal written
        if written // _STEP != (written + count) // _STEP:
            print(f"{(written + count) / 1e9:.0f} GB", file=sys.stderr)
        written += count

    with opened(archive) as stream:
        added = add(stream, hub, progress=progress)
    print(f"{'added' if added.fresh else 'already there:'} {added.name} {added.revision[:12]}: {added.folder}")
    return 0


@contextlib.contextmanager
def opened(archive: str) -> Iterator[IO[bytes]]:
    """The plain bytes of an archive, or of standard input for `-`; `zstd` decompresses what is compressed.

    Raises OSError for a file or a program that is not to be had. ArchiveError says what zstd says, if it failed.
    """
    if archive == "-":
        with os.fdopen(0, "rb", buffering=0, closefd=False) as stream:
            yield stream
        return
    with Path(archive).open("rb", buffering=0) as stream:  # a child reads on from where this stands
        compressed = stream.read(len(_ZSTD_MAGIC)) == _ZSTD_MAGIC
        stream.seek(0)
        if not compressed:
            yield stream
            return
        with _decompressed(stream) as plain:
            yield plain


@contextlib.contextmanager
def _decompressed(stream: IO[bytes]) -> Iterator[IO[bytes]]:
    words = ["zstd", "-dc", "-q"]
    try:
        process = subprocess.Popen(words, stdin=stream, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except FileNotFoundError as fault:
        raise OSError(
            fault.errno, "not found, and the archive is compressed: decompress it elsewhere", "zstd"
        ) from fault
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            yield process.stdout
        except ArchiveError as fault:
            process.kill()
            said = process.stderr.read().decode("utf-8", "replace").strip()
            raise ArchiveError(f"{fault} ({said})" if said else str(fault)) from fault
        finally:
            process.kill()


if __name__ == "__main__":
    sys.exit(main())
