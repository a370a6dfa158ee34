"""`compose slim`: smaller wheels, without a recipe or a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from composer.cli import render
from composer.cli.progress import drawn
from composer.model.target import parse_sms
from composer.steps.load import load_targets
from composer.steps.slim_wheel import Request, SlimmedWheel, slim_wheel
from composer.store import Store

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("wheels", type=_PATH, nargs=-1, required=True, metavar="WHEEL...")
@click.option("--sm", required=True, help="GPU architectures to keep: 90, or 80,90; all cuts debug symbols only.")
@click.option("--output", "-o", type=_PATH, required=True, help="Folder of the new wheels.")
@click.option("--keep-ptx", is_flag=True, help="Keep the newest PTX, from which the driver compiles for later GPUs.")
@click.option("--keep-debug", is_flag=True, help="Keep symbols for debuggers.")
@click.option("--accept-license-modification", "accept", is_flag=True,
              help="Also wheels whose licence forbids modification. The new ones must not be passed on.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the ledger of every new wheel as JSON.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def slim(*, wheels: Sequence[Path], sm: str, output: Path, keep_ptx: bool, keep_debug: bool, accept: bool,
         as_json: bool, debug: bool) -> None:  # noqa: ARG001  # fmt: skip
    """Cut code for other GPUs, and debug symbols, out of wheels: new wheels with a local version label.

    Every new object is proven to hold what it must and to load; the originals stay as they are.
    """
    request = Request(sms=parse_sms(sm, load_targets()), keep_ptx=keep_ptx, debug=not keep_debug, accept=accept)
    done: list[SlimmedWheel] = []
    try:
        with drawn(quiet=as_json) as listener, Store().scratch() as scratch:
            for wheel in wheels:
                done.append(slim_wheel(wheel, output, request, scratch, listener))
    finally:  # also those before a bad one
        _tell(done, as_json=as_json)


def _tell(done: Sequence[SlimmedWheel], *, as_json: bool) -> None:
    if as_json:
        click.echo(msgspec.json.encode([{"path": str(one.path), **msgspec.to_builtins(one.ledger)} for one in done]))
        return
    for one in done:
        _show(one)


def _show(one: SlimmedWheel) -> None:
    click.echo(f"{one.path}: {render.size(one.original_size)} -> {render.size(one.size)}")
    for file in one.ledger.files:
        click.echo(f"  {file.path}: {file.detail}")
    for gone in one.ledger.left_out:
        click.echo(f"  {render.counted(gone.files, 'file')}, {render.size(gone.size)} left out ({gone.reason})")
    for path, why in one.ledger.left_alone.items():
        click.echo(f"  {path}: {why}")
    if not (one.ledger.files or one.ledger.left_out):
        click.echo("  nothing could be cut")
    if not one.ledger.redistributable:
        click.echo("  must not be passed on: its licence does not allow modification")
