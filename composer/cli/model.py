"""`compose model`: pack a model for hosts without a network, and add one to an unpacked bundle."""

from __future__ import annotations

import os
from pathlib import Path

import click

from composer.cli import options, render
from composer.cli.progress import drawn
from composer.errors import RecipeError
from composer.steps.model import add_model, bundle_model, find_model, hub_of


@click.group()
def model() -> None:
    """Bring models to hosts without a network."""


@model.command("bundle")
@click.argument("source", metavar="FOLDER|ORG/NAME[@REVISION]")
@click.option(
    "--output",
    "-o",
    type=options.PATH,
    required=True,
    metavar="FILE",
    help="model.tar, which hosts read without any program, or model.tar.zst, a fifth smaller for BF16.",
)
@click.option("--name", default="", metavar="ORG/NAME", help="What the model is called, if its folder does not tell.")
@options.JOBS
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def bundle(*, source: str, output: Path, name: str, jobs: int, debug: bool) -> None:  # noqa: ARG001
    """Check a model of the local Hugging Face cache, or any folder with one, and pack it. Nothing is downloaded."""
    if not output.name.endswith((".tar", ".tar.zst")):
        raise RecipeError("a model bundle is named *.tar or *.tar.zst", where=str(output), fix="Rename it.")
    found = find_model(source, os.environ)
    with drawn() as listener:
        packed = bundle_model(found, output.absolute(), name=name, jobs=jobs, listener=listener)
    click.echo(f"{output}: {packed.name} {packed.revision[:12]}, {render.counted(packed.files, 'file')}, "
               f"{render.size(packed.size)}, packed in {render.size(output.stat().st_size)}")  # fmt: skip


@model.command("add")
@click.argument("archive", type=options.PATH)
@click.argument("prefix", type=options.PATH, required=False)
@click.option(
    "--hub",
    type=options.PATH,
    metavar="DIR",
    help="Instead of into PREFIX: into this folder, laid out as a Hugging Face cache.",
)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def add(*, archive: Path, prefix: Path | None, hub: Path | None, debug: bool) -> None:  # noqa: ARG001
    """Add a model bundle to an unpacked bundle, checking every byte: whole or not at all."""
    if (prefix is None) == (hub is None):
        raise RecipeError("where to add the model is not said, or twice", fix="Give PREFIX or --hub.")
    with drawn() as listener:
        added = add_model(archive, hub or hub_of(prefix or Path()), listener=listener)
    click.echo(f"{'added' if added.fresh else 'already there:'} {added.name} {added.revision[:12]}: {added.folder}")
