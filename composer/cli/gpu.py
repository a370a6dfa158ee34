"""`compose gpu-code`: what GPU code libraries hold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from composer.cli import render
from composer.model.gpu import Selection
from composer.model.target import parse_sms
from composer.steps.gpu_code import Images, Library, Selected, list_gpu_code
from composer.steps.load import load_targets

_KINDS = {"elf": "sm_{sm}{variant}", "ptx": "ptx {sm}{variant}", "lto": "lto {sm}{variant}", "other": "unknown {sm}"}


@click.command("gpu-code")
@click.argument("path", type=click.Path(path_type=Path), metavar="FILE|WHEEL|BUNDLE|FOLDER")
@click.option("--sm", default="all", help="GPU architectures: 90, or 80,90. Tells what slimming to them would keep.")
@click.option("--keep-ptx", is_flag=True, help="With --sm: as if PTX for later GPUs were kept.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def gpu_code(*, path: Path, sm: str, keep_ptx: bool, as_json: bool, debug: bool) -> None:  # noqa: ARG001
    """List the GPU code in libraries by architecture: binaries (sm_90), PTX and LTO-IR, in MB."""
    selection = Selection(sms=parse_sms(sm, load_targets()), keep_ptx=keep_ptx)
    libraries = list_gpu_code(path, selection)
    if as_json:
        click.echo(msgspec.json.encode(list(libraries)))
        return
    total = 0
    for one in libraries:
        _show(one)
        total += 1
    if not total:
        click.echo("no GPU code")


def _show(one: Library) -> None:
    stored = sum(row.size for row in one.images)
    sections = ", ".join(f"{count} containers in {name}" for name, count in one.containers.items())
    click.echo(f"{one.path}: {render.size(one.size)}, GPU code {render.size(stored)}{sections and ': ' + sections}")
    _show_images(one.images)
    for name, size in one.elsewhere.items():
        click.echo(f"  {render.size(size)} more in {name}, which is never touched")
    if one.pinned:
        click.echo(f"  {one.pinned} containers cannot move")
    for doubt in one.doubts:
        click.echo(f"  would be left alone: {doubt}")
    if one.selected:
        _show_selected(one.selected)


def _show_images(images: Sequence[Images]) -> None:
    """A line per architecture: how many images, MB, and MB by compression."""
    rows: defaultdict[str, list[Images]] = defaultdict(list)
    for image in images:
        rows[_KINDS[image.kind].format(sm=image.sm, variant=image.variant)].append(image)
    if rows:
        click.echo(f"  {'code':<12}{'images':>8}{'MB':>9}  stored as")
    for label, parts in rows.items():
        forms = ", ".join(f"{part.compression.replace('none', 'raw')} {part.size / 1e6:.1f}" for part in parts)
        count, size = sum(part.count for part in parts), sum(part.size for part in parts)
        click.echo(f"  {label:<12}{count:>8}{size / 1e6:>9.1f}  {forms}")


def _show_selected(selected: Selected) -> None:
    click.echo(f"  keeps {render.size(selected.kept)}, drops {render.size(selected.dropped)}")
    for sm, count in selected.without.items():
        if count:
            click.echo(f"  sm_{sm}: {count} have nothing for it")
        if selected.compiled[sm]:
            click.echo(f"  sm_{sm}: {selected.compiled[sm]} are compiled from PTX when they are loaded")
