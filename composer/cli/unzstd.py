"""`compose unzstd`: the program that decompresses bundles where there is none."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from pathlib import Path

import click

from composer._fs import host_errors, write_atomic
from composer.cli import options
from composer.cli.progress import drawn
from composer.steps.decompressor import TRIPLES, make_decompressor
from composer.store import Store


@click.command()
@click.option("--output", "-o", type=options.PATH, default=Path("unzstd"), show_default=True, help="The program.")
@click.option(
    "--machine",
    type=click.Choice(list(TRIPLES)),
    default=platform.machine,
    help="What it runs on. Default: as this machine.",
)
@click.option("--offline", is_flag=True, help="Ask no index; use the store and --wheelhouse.")
@click.option("--wheelhouse", "wheelhouses", type=options.PATH, multiple=True, help="A folder of files to use first.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def unzstd(*, output: Path, machine: str, offline: bool, wheelhouses: Sequence[Path],
           debug: bool) -> None:  # noqa: ARG001  # fmt: skip
    """Make a small static program for hosts that have tar but no zstd: `tar -I ./unzstd -xf BUNDLE`.

    It is compiled from zstd's sources, once, with pinned inputs: the same bytes come out each time.
    """
    with drawn() as listener:
        made = make_decompressor(machine, Store(), offline=offline, wheelhouses=wheelhouses, listener=listener)
    with host_errors(made):
        data = made.read_bytes()
    write_atomic(output.absolute(), data, mode=0o755)
    click.echo(f"{output}\n  {len(data):,} bytes, sha256 {hashlib.sha256(data).hexdigest()}, {machine}")
    click.echo(f"On the host: tar -I ./{output.name} -xf BUNDLE.tar.zst -C DIR")
