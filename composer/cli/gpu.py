"""`compose gpu-code`: what GPU code libraries hold."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
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
    """List the GPU code in libraries by architecture: binaries (sm_90), PTX and LTO-IR, in MB.

    Several libraries have a sum at the end: `compose gpu-code WHEEL --sm 90 | tail` for those in a hurry.
    """
    selection = Selection(sms=parse_sms(sm, load_targets()), keep_ptx=keep_ptx)
    libraries = list_gpu_code(path, selection)
    if as_json:
        click.echo(msgspec.json.encode(list(libraries)))
        return
    shown: list[Library] = []
    for one in libraries:
        _show(one)
        shown.append(one)
    if len(shown) > 1:
        _show_total(shown)
    if not shown:
        click.echo("no GPU code")


def _show(one: Library) -> None:
    stored = sum(row.size for row in one.images)
    sections = ", ".join(f"{render.counted(count, 'container')} in {name}" for name, count in one.containers.items())
    click.echo(f"{one.path}: {render.size(one.size)}, GPU code {render.size(stored)}{sections and ': ' + sections}")
    _show_images(one.images)
    for name, size in one.elsewhere.items():
        click.echo(f"  {render.size(size)} more in {name}, which is never touched")
    if one.pinned:
        click.echo(f"  {render.counted(one.pinned, 'container')} cannot move")
    for doubt in one.doubts:
        click.echo(f"  would be left alone: {doubt}")
    if one.selected:
        _show_selected(one.selected)


def _show_total(found: Sequence[Library]) -> None:
    """What all libraries hold together, and what slimming them all would do."""
    images = [image for one in found for image in one.images]
    stored = sum(image.size for image in images)
    click.echo(
        f"all {len(found)} libraries: {render.size(sum(one.size for one in found))}, GPU code {render.size(stored)}"
    )
    _show_images(images)
    if any(one.selected for one in found):
        dropped = sum(one.selected.dropped for one in found if one.selected and not one.doubts)
        click.echo(f"  keeps {render.size(stored - dropped)}, drops {render.size(dropped)}")
    if alone := sum(bool(one.doubts) for one in found):
        click.echo(f"  {alone} would be left alone")


def _show_images(images: Iterable[Images]) -> None:
    """A line per architecture: how many images, MB, and MB by compression."""
    counts: Counter[str] = Counter()
    sizes: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for image in sorted(images, key=lambda one: (one.kind, one.sm, one.variant, one.compression)):
        label = _KINDS[image.kind].format(sm=image.sm, variant=image.variant)
        counts[label] += image.count
        sizes[label][image.compression.replace("none", "raw")] += image.size
    if counts:
        click.echo(f"  {'code':<12}{'images':>8}{'MB':>9}  stored as")
    for label, count in counts.items():
        forms = ", ".join(f"{form} {size / 1e6:.1f}" for form, size in sizes[label].items())
        click.echo(f"  {label:<12}{count:>8}{sizes[label].total() / 1e6:>9.1f}  {forms}")


def _show_selected(selected: Selected) -> None:
    click.echo(f"  keeps {render.size(selected.kept)}, drops {render.size(selected.dropped)}")
    for sm, count in selected.without.items():
        if count:
            click.echo(f"  sm_{sm}: {count} have nothing for it")
        if selected.compiled[sm]:
            click.echo(f"  sm_{sm}: {selected.compiled[sm]} are compiled from PTX when they are loaded")
