"""`compose diff`: what differs between two bundles."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import click
import msgspec
from rich.markup import escape

from composer.cli import options, render
from composer.model.diff import Comparison, Difference, DistributionDifference, FileDifference, Side
from composer.steps.diff import diff_bundles

_DIFFERENT = 1
# Characters of two texts that are shown beside each other.
_ONE_LINE = 140
_SIGNS = {"added": "+", "removed": "-"}


@click.command("diff")
@click.argument("old", type=options.PATH, metavar="OLD")
@click.argument("new", type=options.PATH, metavar="NEW")
@click.option("--files", "with_files", is_flag=True, help="List every file that differs.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def diff(*, old: Path, new: Path, with_files: bool, as_json: bool, debug: bool) -> None:  # noqa: ARG001
    """Compare two bundles: files, or the folders they were unpacked into.

    Exit status: 0 when they are the same, 1 when they differ.
    """
    before, after, found = diff_bundles(old, new)
    if as_json:
        shown = found if with_files else replace(found, files=())
        click.echo(msgspec.json.encode({
            "same": found.is_same, "old": {"name": before.name, "fingerprint": before.fingerprint},
            "new": {"name": after.name, "fingerprint": after.fingerprint}, **asdict(shown),
        }))  # fmt: skip
    elif found.is_same:
        click.echo(f"{_plain(before.name)}: the same, fingerprint {_plain(before.fingerprint)}")
    else:
        _show(found, with_files=with_files)
    if not found.is_same:
        sys.exit(_DIFFERENT)


def _show(found: Comparison, *, with_files: bool) -> None:
    for line in (line for one in found.facts for line in _difference(one)):
        click.echo(line)
    if found.distributions:
        _table(found.distributions)
    edited = [one for one in found.distributions if one.edits and one.old and one.new]
    if edited:
        click.echo("edits:")
    for one in edited:
        click.echo(f"  {_plain(one.name)}")
        for line in (line for edit in one.edits for line in _difference(edit)):
            click.echo(f"    {line}")
    for line in _sums(found):
        click.echo(line)
    for file in found.files if with_files else ():
        click.echo(_file(file))


def _table(distributions: Sequence[DistributionDifference]) -> None:
    rows = render.table("distribution", "old", "new", "#old MB", "#new MB", "#shared MB", "#edits", "#files + - ~")
    for one in distributions:
        files = f"{one.added} {one.removed} {one.changed}"
        rows.add_row(escape(_plain(one.name)), _version(one.old), _version(one.new), _mb(one.old), _mb(one.new),
                     f"{one.shared / 1e6:.1f}" if one.new else "", str(len(one.edits)), files)  # fmt: skip
    render.console().print(rows)


def _version(side: Side | None) -> str:
    return escape(_plain(side.version)) if side else ""


def _mb(side: Side | None) -> str:
    return f"{side.compressed / 1e6:.1f}" if side else ""


def _difference(one: Difference) -> Iterator[str]:
    subject = _plain(f"{one.kind} {one.subject}".rstrip())
    if one.old is None or one.new is None:
        text = one.new if one.old is None else one.old
        yield f"{'+' if one.old is None else '-'} {subject}{f': {_plain(text)}' if text else ''}"
    elif len(one.old + one.new) <= _ONE_LINE and "->" not in one.old:
        yield f"{subject}: {_plain(one.old)} -> {_plain(one.new)}"
    else:
        yield from (f"{subject}:", f"  - {_plain(one.old)}", f"  + {_plain(one.new)}")


def _sums(found: Comparison) -> Iterator[str]:
    shared = found.shared
    part = f" ({shared.bytes / shared.of_bytes:.1%})" if shared.of_bytes else ""
    yield (f"layers: {shared.layers} of {shared.of_layers} are in both; "
           f"{render.size(shared.bytes)} of {render.size(shared.of_bytes)} are shared{part}")  # fmt: skip
    added = [one for one in found.files if one.what == "added"]
    removed = [one for one in found.files if one.what == "removed"]
    changed = [one for one in found.files if one.what not in ("added", "removed")]
    yield (f"files:  {len(added)} added ({_bytes(added, 'new')}), {len(removed)} removed ({_bytes(removed, 'old')}), "
           f"{len(changed)} changed ({_bytes(changed, 'old')} -> {_bytes(changed, 'new')})")  # fmt: skip


def _bytes(files: Sequence[FileDifference], side: str) -> str:
    return render.size(sum(getattr(one, side) or 0 for one in files))


def _file(one: FileDifference) -> str:
    sizes = " -> ".join(str(size) for size in (one.old, one.new) if size is not None)
    return f"{_SIGNS.get(one.what, '~')} {_plain(one.path)} ({one.what}, {sizes} bytes)"


def _plain(text: str) -> str:
    """The text without what a terminal would obey: a manifest may come from anywhere."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)
