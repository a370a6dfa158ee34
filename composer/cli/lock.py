"""`compose lock`: resolve recipes, and write locks beside them."""

from __future__ import annotations

import click

from composer.cli import render
from composer.steps.load import load_named
from composer.steps.locks import LockOptions, renew_lock
from composer.steps.outline import DEFAULT_RECIPE
from composer.steps.source_lock import renew_build_locks


@click.command()
@click.argument("recipe", default=DEFAULT_RECIPE)
@click.option("--overlay", "overlays", multiple=True, metavar="NAME|PATH",
              help="Resolve with this overlay; one that asks for other versions has a lock of its own.")  # fmt: skip
@click.option("--python", "pythons", multiple=True, help="Only these minor versions. Default: all of the recipe.")
@click.option("--upgrade", multiple=True, metavar="NAME", help="Let these move; everything else keeps its version.")
@click.option("--cooldown", type=click.IntRange(0), metavar="DAYS", help="Take no release younger than this.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def lock(*, recipe: str, overlays: tuple[str, ...], pythons: tuple[str, ...], upgrade: tuple[str, ...],
         cooldown: int | None, debug: bool) -> None:  # noqa: ARG001  # fmt: skip
    """Resolve a recipe for its targets and write pylock files (PEP 751) beside it."""
    for loaded in load_named(recipe, overlays):
        for machine in loaded.recipe.machines:
            for python in pythons or loaded.recipe.pythons:
                made = renew_lock(loaded, python, machine, LockOptions(upgrade=upgrade, cooldown=cooldown))
                render.locked(made, loaded.lock_path(python, machine))
                # What builds require is the recipe's, with any overlay.
                for path, build_lock in () if overlays else renew_build_locks(loaded, python, machine):
                    render.locked(build_lock, path)
