"""`compose matrix`: bundles for many targets at once, drawn as a table of what is done for which."""

from __future__ import annotations

import contextlib
import itertools
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.live import Live
from rich.table import Table

from composer.cli import options, render
from composer.cli.remote import REMOTE, store_with, told
from composer.errors import ComposerError
from composer.events import Event
from composer.steps.decompressor import offer_decompressor
from composer.steps.load import load_targets
from composer.steps.matrix import Ask, Change, Site, aims, compose_matrix, memory_for_steps
from composer.steps.matrix_report import Board, Cell, Report, TargetReport
from composer.steps.matrix_step import Order
from composer.store import Store

#: Steps that are many and short: a line for each would bury the others.
_SMALL = ("survey", "objects")
#: What each target has its own of.
_EACH = {"recipe": None, "sm": None, "gpus": (), "isa": None, "variant": None}
#: Seconds between two drawings of the table.
_PAUSE = 0.2


class _Names(click.ParamType[tuple[str, ...]]):
    """`80,86`: names with commas between them."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:  # noqa: ANN401
        """The names, each once."""
        if isinstance(value, tuple):
            return value
        names = tuple(dict.fromkeys(one.strip() for one in value.split(",") if one.strip()))
        return names or self.fail("names none", param, ctx)


class _Shard(click.ParamType[tuple[int, int]]):
    """`i/n`."""

    name = "shard"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:  # noqa: ANN401
        """The part, from 1, and how many there are."""
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"(\d{1,4})/(\d{1,4})", value)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            self.fail(f"{value!r} is not a part such as 1/4", param, ctx)
        return int(found[1]), int(found[2])


@click.command("matrix")
@click.option("--recipe", "recipes", multiple=True,
              help="A shipped recipe, or the path of one. May be given more than once. Default: sglang.")  # fmt: skip
@click.option("--sm", "sms", type=_Names(), multiple=True,
              help="GPU architectures: 80,90,120, or all; 80+90 is one bundle for both.")  # fmt: skip
@click.option("--gpu", "gpus", type=_Names(), multiple=True, metavar="NAMES",
              help="The same by names of GPUs: H100,'RTX 5090'.")  # fmt: skip
@click.option("--isa", "isas", type=_Names(), multiple=True, help="CPU instruction sets: avx2,avx512.")
@click.option("--variant", "variants", type=_Names(), multiple=True, metavar="NAMES",
              help="Targets by their whole names: sglang-python312-cuda12_8-sm90-avx512.")  # fmt: skip
@options.with_options(options.STACK, options.SHAPE, options.WORK, REMOTE)
@click.option("--imports/--no-imports", default=True, show_default=True,
              help="Import the recipe's modules from each finished bundle, which is unpacked for that.")  # fmt: skip
@options.UNZSTD
@click.option("--keep-going", "-k", is_flag=True, help="When a step fails, go on with what does not need it.")
@click.option("--shard", type=_Shard(), default="1/1", metavar="I/N",
              help="Only every N-th target, from the I-th on: one of N jobs of a CI matrix.")  # fmt: skip
@click.option("--memory", type=click.FloatRange(0, min_open=True), metavar="GB",
              help="What all steps here may take together. Default: nine tenths of the memory.")  # fmt: skip
@click.option("--on", metavar="dask://HOST:PORT", help="Run steps on the workers of this dask.distributed cluster.")
@click.option("--json", "as_json", is_flag=True, help="Print every change, and then the report, as JSON, one a line.")
def matrix(*, recipes: tuple[str, ...], shard: tuple[int, int], as_json: bool, remote_url: str | None,
           remote_key: Path | None, **kwargs: Any) -> None:  # noqa: ANN401  # fmt: skip
    """Build bundles for every SM or GPU with every instruction set of every recipe, and for every variant.

    What they share is made once.
    """
    named = {name: tuple(itertools.chain(*kwargs.pop(name))) for name in ("sms", "gpus", "isas", "variants")}
    store = store_with(remote_url, remote_key)
    order = Order(
        request=options.request({**kwargs, **_EACH}), options=options.shape(kwargs),
        settings=options.settings(kwargs), output=kwargs["output"].absolute(), remote=remote_url,
        remote_key=remote_key.absolute() if remote_key else None,
    )  # fmt: skip
    aimed = aims(Ask(order=order, recipes=recipes, shard=shard, **named))
    site = Site(cores=options.threads(kwargs), on=kwargs["on"], keep_going=kwargs["keep_going"],
                memory=int(kwargs["memory"] * 1e9) if kwargs["memory"] else memory_for_steps())  # fmt: skip
    with _drawn(as_json=as_json) as view:
        report = compose_matrix(aimed, store, site, view.told, view.heard)
        if kwargs["unpacker"]:
            _offer(report, order, store, view)
    _show(report, as_json=as_json)
    _raise_failed(report)


def _offer(report: Report, order: Order, store: Store, view: _Lines | _Json | _Grid) -> None:
    """Put what unpacks the bundles beside them, for each machine that they are for, and say so."""
    isas = load_targets().isa
    for machine in sorted({isas[one.isa].machine for one in report.targets if one.path and Path(one.path).is_file()}):
        found = offer_decompressor(machine, order.output, store, offline=order.settings.offline,
                                   wheelhouses=order.settings.wheelhouses, listener=view.heard)  # fmt: skip
        text = found.lacking and f"not made, for hosts without zstd: {found.lacking}"
        view.heard(Event(step="unzstd", subject=found.path.name, note=text or "for hosts without a zstd program"))


def _raise_failed(report: Report) -> None:
    """Leave with the exit code of the first target that failed. What was refused did not fail."""
    failed = [one for one in report.targets if one.fate == "failed"]
    if failed:
        asked = [one for one in report.targets if one.fate != "refused"]
        fault = ComposerError(f"{len(failed)} of {len(asked)} targets failed", where="matrix", why=failed[0].reason,
                              fix="Run the same command again: what is done stays done.")  # fmt: skip
        fault.exit_code = failed[0].exit_code
        raise fault


# --- while it runs ----------------------------------------------------------------------------------------------------


class _Lines:
    """One line for every step that is worth it, on standard error."""

    def told(self, change: Change, _board: Board) -> None:
        """Print the change if it says something."""
        if text := _line(change):
            print(text, file=sys.stderr, flush=True)  # noqa: T201

    def heard(self, event: Event) -> None:
        """Print what is worth a line; how far a step is, is not."""
        if event.note:
            print(f"{event.subject}: {event.note}", file=sys.stderr, flush=True)  # noqa: T201


class _Json:
    """One JSON object for every change, on standard output."""

    def told(self, change: Change, _board: Board) -> None:
        """Print the change."""
        if change.kind != "tick":
            click.echo(msgspec.json.encode({"change": change}))

    def heard(self, event: Event) -> None:
        """Print what is worth a change of its own."""
        if event.note:
            note = Change(kind="note", step=event.step, subject=event.subject, text=event.note)
            click.echo(msgspec.json.encode({"change": note}))


class _Grid:
    """The table, on a terminal. It is drawn by the thread that changes the board."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._drawn = 0.0
        self._latest = ""

    def told(self, change: Change, board: Board) -> None:
        """Draw the table, if it was not drawn just now; print what should stay."""
        if change.kind in ("refused", "failed", "note", "target"):
            self._live.console.print(_line(change), highlight=False)
        now = time.monotonic()
        if now - self._drawn > _PAUSE:
            self._drawn = now
            self._live.update(_table(board, now, self._latest), refresh=True)

    def heard(self, event: Event) -> None:
        """Remember how far the latest download or layer is."""
        if event.note:
            self._live.console.print(f"{event.subject}: {event.note}", highlight=False)
        if event.total and not event.finished:
            self._latest = f"{event.step} {event.subject}: {render.size(event.done)} of {render.size(event.total)}"


@contextlib.contextmanager
def _drawn(*, as_json: bool) -> Iterator[_Lines | _Json | _Grid]:
    screen = Console(stderr=True)
    if as_json:
        yield _Json()
    elif screen.is_terminal:
        with Live(console=screen, auto_refresh=False, transient=True) as live:
            yield _Grid(live)
    else:
        yield _Lines()


def _line(change: Change) -> str:
    """What a change is in words; nothing for what is not worth a line."""
    names = ", ".join(change.targets)
    if change.kind == "refused":
        return f"refused {names}: {change.text}"
    if change.kind == "target":
        return f"{change.text} {names} after {change.seconds:.1f} s, {render.size(change.bytes)}"
    if change.kind == "failed":
        return f"failed {change.step} {change.subject} (for {names}): {change.text}"
    if change.kind == "done" and change.step not in _SMALL:
        made = f", {render.size(change.bytes)}" if change.bytes else ""
        return f"{change.step} {change.subject}: {change.seconds:.1f} s{made}"
    return change.text if change.kind == "note" else ""


def _table(board: Board, now: float, latest: str) -> Table:
    columns = board.used()
    shown = render.table("target", *columns)
    shown.caption = latest
    for number, row in enumerate(board.rows):
        if row.fate != "refused":
            shown.add_row(row.name, *(_cell(board.cell(number, column), now) for column in columns))
    return shown


def _cell(cell: Cell, now: float) -> str:
    """`14/98 12 s 1.2 GB`; what another target pays for is only counted."""
    if not cell.total:
        return ""
    if cell.broken:
        return f"{cell.done}/{cell.total} failed"
    if cell.done == cell.total and cell.done == cell.shared:
        return "shared"
    if cell.done == cell.total and cell.done == cell.shared + cell.known:
        return "known"
    seconds = cell.seconds + (now - cell.begun if cell.begun is not None else 0.0)
    parts = [f"{cell.done}/{cell.total}" if cell.total > 1 or cell.done < cell.total else ""]
    parts += [f"{seconds:.0f} s" if seconds else "", render.size(cell.size) if cell.size else ""]
    return " ".join(filter(None, parts))


# --- what came of it --------------------------------------------------------------------------------------------------


def _show(report: Report, *, as_json: bool) -> None:
    if as_json:
        click.echo(msgspec.json.encode({"report": report}))
        return
    render.console().print(_summary(report.targets))
    for one in report.targets:
        if one.fate in ("refused", "given up"):
            click.echo(f"{one.fate}: {one.name}: {one.reason}")
    click.echo(f"{_tally(report)} in {report.seconds:.1f} s, {report.cpu:.1f} s of processors")
    if report.bundles:
        saved = 100 * (1 - report.stored / report.bundles)
        click.echo(f"layers: {render.size(report.bundles)} in all bundles, {render.size(report.stored)} stored, "
                   f"as what they share is there once ({saved:.0f} % less)")  # fmt: skip
    later = [one.relative for one in report.targets if one.relative is not None][1:]
    if later:
        click.echo(f"CPU time of each later target: {_share(min(later))} to {_share(max(later))} of the first's")
    told(report.remote)


def _summary(targets: Sequence[TargetReport]) -> Table:
    shown = render.table(
        "target", "state", "#MB", "#layers made", "#shared", "#CPU s", "#of first", "#after s", "sha256"
    )
    for one in targets:
        layers = one.columns.get("layers")
        made = (str(layers.steps), str(layers.shared + layers.known)) if layers else ("", "")
        shown.add_row(one.name, one.fate, f"{one.bytes / 1e6:.1f}" if one.bytes else "", *made, f"{one.cpu:.1f}",
                      "" if one.relative is None else _share(one.relative),
                      f"{one.after:.1f}" if one.after else "", one.sha256[:12])  # fmt: skip
    return shown


def _share(part: float) -> str:
    return f"{100 * part:.0f} %"


def _tally(report: Report) -> str:
    fates = [one.fate for one in report.targets]
    return ", ".join(f"{fates.count(fate)} {fate}" for fate in dict.fromkeys(fates)) or "no targets"
