"""`compose delta` and `compose apply`: what makes a bundle out of an older one, and making it."""

from __future__ import annotations

from pathlib import Path

import click

from composer.cli import options, render
from composer.cli.progress import drawn
from composer.steps.delta import apply_delta, apply_script, make_delta


def _print_script(context: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        click.echo(apply_script(), nl=False)
        context.exit()


@click.command("delta")
@click.argument("old", type=options.PATH)
@click.argument("new", type=options.PATH)
@click.option("--output", "-o", type=options.PATH, required=True, metavar="DELTA", help="The file to write.")
@click.option("--script", is_flag=True, is_eager=True, expose_value=False, callback=_print_script,
              help="Print the shell script that applies deltas on hosts without compose, and stop.")  # fmt: skip
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def delta(*, old: Path, new: Path, output: Path, debug: bool) -> None:  # noqa: ARG001
    """Write what the bundle NEW has and the bundle OLD has not: who has OLD needs no more to make NEW."""
    with drawn() as listener:
        made = make_delta(old, new, output.absolute(), listener=listener)
    length = output.stat().st_size
    click.echo(
        f"delta:  {output}, {render.size(length)}: {length / made.new.size:.1%} of {made.new.name}\n"
        f"needs:  {made.old.name}, sha256 {made.old.sha256}\n"
        f"makes:  {made.new.name}, sha256 {made.new.sha256}\n"
        f"on the host:\n"
        f"  compose apply {old.name} {output.name} -o {new.name}"
    )


@click.command("apply")
@click.argument("old", type=options.PATH)
@click.argument("delta", type=options.PATH)
@click.option("--output", "-o", type=options.PATH, required=True, metavar="NEW", help="The bundle to write.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def apply(*, old: Path, delta: Path, output: Path, debug: bool) -> None:  # noqa: ARG001
    """Make a bundle out of the bundle OLD and a delta, with its checksum file: the very bytes that were built."""
    with drawn() as listener:
        made = apply_delta(old, delta, output.absolute(), listener=listener)
    click.echo(f"{output}: {made.name}, {render.size(made.size)}\n  sha256: {made.sha256}")
