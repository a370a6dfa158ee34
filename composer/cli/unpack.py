"""`compose unpack`, `rollback` and `prune`: bundles on the host that runs them, one or several side by side."""

from __future__ import annotations

from pathlib import Path

import click

from composer.cli import options, render
from composer.cli.progress import drawn
from composer.errors import RecipeError
from composer.steps import releases
from composer.steps.bundle import open_bundle
from composer.steps.unpack import unpack as run_unpack

_SUFFIX = ".tar.zst"


@click.command()
@click.argument("bundle", type=options.PATH)
@click.argument("dest", type=options.PATH, required=False)
@click.option(
    "--releases",
    "root",
    type=options.PATH,
    metavar="DIR",
    help="Keep several: unpack into DIR/releases/NAME-FINGERPRINT and switch DIR/current to it.",
)
@options.JOBS
@click.option("--any-host", is_flag=True, help="Though this host is older than the bundle needs, or has another GPU.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def unpack(*, bundle: Path, dest: Path | None, root: Path | None, jobs: int, any_host: bool,
           debug: bool) -> None:  # noqa: ARG001  # fmt: skip
    """Unpack a bundle in parallel, checking every byte, into DEST: a new folder.

    Without DEST it is named as the bundle and lies beside it. `tar --zstd -xf` does it too, without the checks.
    """
    if dest and root:
        raise RecipeError("DEST and --releases contradict each other", fix="Give one of them.")
    opened = open_bundle(bundle)
    with drawn() as listener:
        if root:
            placed, fresh = releases.add(opened, root.absolute(), jobs=jobs, listener=listener, any_host=any_host), True
        else:
            placed = (dest or bundle.with_name(_folder_name(bundle))).absolute()
            fresh = run_unpack(opened, placed, jobs=jobs, listener=listener, any_host=any_host)
    click.echo(f"{'unpacked into' if fresh else 'already unpacked in'} {placed}")
    if root:
        click.echo(f"{root / 'current'} leads to it")


def _folder_name(bundle: Path) -> str:
    if not bundle.name.endswith(_SUFFIX) or bundle.name == _SUFFIX:
        raise RecipeError(f"not named *{_SUFFIX}, so where to unpack it must be said", where=str(bundle),
                          fix="Give the folder after the bundle.")  # fmt: skip
    return bundle.name.removesuffix(_SUFFIX)


@click.command()
@click.argument("root", type=options.PATH, metavar="DIR")
@click.option("--to", "name", metavar="RELEASE", help="This one. Default: the previous one.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def rollback(*, root: Path, name: str | None, debug: bool) -> None:  # noqa: ARG001
    """Switch DIR/current back to the previous release; a second time, forth again."""
    click.echo(f"{root / 'current'} leads to {releases.rollback(root.absolute(), name)}")


@click.command()
@click.argument("root", type=options.PATH, metavar="DIR")
@click.option(
    "--keep",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="How many stay: the current one, the previous one, then the newest.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be removed.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def prune(*, root: Path, keep: int, dry_run: bool, debug: bool) -> None:  # noqa: ARG001
    """Remove old releases from DIR; never the current one, nor one that a running process uses."""
    pruned = releases.prune(root.absolute(), keep=keep, dry_run=dry_run)
    for name in pruned.removed:
        click.echo(f"{'would remove' if dry_run else 'removed'} {name}")
    for name, process in pruned.used.items():
        click.echo(f"kept {name}: used by process {process.pid} ({process.command})")
    if not pruned.removed and not pruned.used:
        click.echo(f"nothing to remove: {render.counted(keep, 'release')} may stay")
