"""`compose lanes`: the shipped recipes by the names that a command line has for them."""

from __future__ import annotations

from typing import Any

import click
import msgspec

from composer.cli import render
from composer.steps.load import BUILDER, LoadedRecipe, load_recipes


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def lanes(*, as_json: bool, debug: bool) -> None:  # noqa: ARG001
    """List the lanes: version sets of stacks, what each is for, and which locks it has."""
    rows = [_facts(alias, loaded) for alias, loaded in load_recipes().items()]
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(rows)).decode())
        return
    table = render.table("lane", "also as", "CUDA", "Python", "machine", "SM", "locked for", "from source")
    for row in rows:
        locked = ", ".join(f"{one['python']}" for one in row["locks"] if one["present"])
        table.add_row(row["name"], row["alias"], row["cuda"], ", ".join(row["pythons"]), ", ".join(row["machines"]),
                      " ".join(map(str, row["sm"])), locked or "nothing", ", ".join(row["from_source"]))  # fmt: skip
    render.console().print(table)
    click.echo(f"With {BUILDER} behind its name, what a lane says how to build comes from source.")


def _facts(alias: str, loaded: LoadedRecipe) -> dict[str, Any]:
    recipe = loaded.recipe
    return {
        "name": f"{recipe.name}:{recipe.version}", "alias": alias, "summary": recipe.summary, "cuda": recipe.cuda,
        "pythons": recipe.pythons, "machines": recipe.machines, "sm": recipe.sm,
        "from_source": [one.name for one in recipe.component if one.build],
        "locks": [
            {"python": python, "machine": machine, "path": path.name, "present": path.is_file()}
            for machine in recipe.machines for python in recipe.pythons
            for path in [loaded.lock_path(python, machine)]
        ],
    }  # fmt: skip
