"""`compose wheel`: one distribution of a recipe, built from source."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from composer._fs import atomic_file, host_errors
from composer.cli import options, render
from composer.cli.progress import drawn
from composer.cli.remote import REMOTE, store_with, told
from composer.errors import HostError, RecipeError
from composer.interpreter import choose_python
from composer.model.recipe import Component, Recipe
from composer.model.target import Target, Targets, parse_isa, parse_sms
from composer.steps.load import load_recipe, load_targets
from composer.steps.locks import LockOptions, Mode
from composer.steps.source import Job, Request, Result, build_wheel, find_built, prepare_build
from composer.store import Store

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("name")
@click.option("--recipe", default="sglang", show_default=True, help="A shipped recipe, or the path of one.")
@click.option("--sm", required=True, help="GPU architectures: 90, 80,9.0, or all that the component is built for.")
@click.option("--isa", required=True, help="CPU instruction set: avx2, avx512, ...")
@click.option("--python", metavar="VERSION", help="Minor version. Default: the recipe's order.")
@click.option("--output", "-o", type=_PATH, help="Also put the wheel into this folder.")
@click.option("--offline", is_flag=True, help="Ask no index; use the store and --wheelhouse.")
@click.option("--wheelhouse", "wheelhouses", type=_PATH, multiple=True, help="A folder of files to use first.")
@click.option("--locked", is_flag=True, help="Fail when the recipe changed after the build was locked.")
@click.option("--frozen", is_flag=True, help="Use the lock of the build as it is.")
@click.option("--jobs", "-j", type=click.IntRange(1),
              help="Compilers at a time, at most. Default: MAX_JOBS, or by cores and memory.")  # fmt: skip
@options.with_options(REMOTE)
@click.option("--dry-run", is_flag=True, help="Show what it would be built from, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print what it was built from as JSON.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def wheel(*, name: str, recipe: str, sm: str, isa: str, python: str | None, output: Path | None, offline: bool,
          wheelhouses: Sequence[Path], locked: bool, frozen: bool, jobs: int | None, remote_url: str | None,
          remote_key: Path | None, dry_run: bool, as_json: bool, debug: bool) -> None:  # noqa: ARG001  # fmt: skip
    """Build the wheel of one component with [component.build] from source, into the store, and print where it is.

    A build that was interrupted goes on from where it was; one with the same inputs is not built again.
    """
    if locked and frozen:
        raise RecipeError("--locked and --frozen contradict each other", fix="Give one of them.")
    mode: Mode = "locked" if locked else "frozen" if frozen else "auto"
    request = _request(name, recipe, sm, isa, python, LockOptions(mode=mode, offline=offline), wheelhouses, jobs)
    if dry_run:
        _plan(prepare_build(request, Store()))
        return
    with drawn(quiet=as_json) as listener:
        store = store_with(remote_url, remote_key, listener)
        result = build_wheel(request, store, listener)
        traffic = store.finish()
    if not as_json:
        told(traffic)
    path = _exported(result, output) if output else result.path
    _show(result, path, as_json=as_json)


def _request(name: str, recipe: str, sm: str, isa: str, python: str | None, options: LockOptions,
             wheelhouses: Sequence[Path], jobs: int | None) -> Request:  # fmt: skip
    targets = load_targets()
    known = parse_isa(isa, targets)
    machine = targets.isa[known].machine
    loaded = load_recipe(recipe, (), machine)
    if machine != platform.machine():
        raise HostError(f"a {platform.machine()} machine cannot build for {machine}", where="--isa",
                        fix=f"Build it on {machine}.")  # fmt: skip
    if python is not None and python not in loaded.recipe.pythons:
        raise RecipeError(f"{loaded.recipe.name} is not offered for Python {python}", where="--python",
                          fix=f"Offered: {', '.join(loaded.recipe.pythons)}.")  # fmt: skip
    if name not in [one.name for one in loaded.recipe.component]:
        raise RecipeError(f"no component {name!r}", where=loaded.path.name,
                          fix="Give the normalised name of a distribution with [component.build].")  # fmt: skip
    chosen = choose_python((python,) if python else loaded.recipe.pythons)
    component = loaded.recipe.component_of(name)
    sms = _sms(sm, component, loaded.recipe, targets)
    target = Target(sms=sms, isa=known, cuda=loaded.recipe.cuda, python=chosen.minor, machine=machine)
    return Request(loaded=loaded, component=component, target=target, python=chosen,
                   flags=targets.isa[known].flags, lock=options, wheelhouses=wheelhouses, jobs=jobs)  # fmt: skip


def _sms(text: str, component: Component, recipe: Recipe, targets: Targets) -> tuple[int, ...]:
    """One architecture or several; `all` is what the component says it is, or else what the stack serves."""
    named = component.build.all if component.build else ()
    return parse_sms(text, targets) or named or recipe.sm


def _plan(job: Job) -> None:
    """What decides about the wheel, and how far this machine would go at a time."""
    known = find_built(job)
    facts = {"key": job.key, "version": str(job.request.version), "built": str(known.path) if known else None,
             "jobs": job.jobs, "log": str(job.log), **job.inputs}  # fmt: skip
    click.echo(msgspec.json.format(msgspec.json.encode(facts)).decode())


def _exported(result: Result, folder: Path) -> Path:
    path = folder.absolute() / result.wheel.filename
    with host_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as out, result.path.open("rb") as wheel:
        shutil.copyfileobj(wheel, out)
    return path


def _show(result: Result, path: Path, *, as_json: bool) -> None:
    wheel = result.wheel
    if as_json:
        facts = {"path": str(path), "cached": result.cached, **msgspec.to_builtins(wheel)}
        click.echo(msgspec.json.format(msgspec.json.encode(facts)).decode())
        return
    how = "built before" if result.cached else f"built in {wheel.seconds:.0f} s with {wheel.jobs} jobs"
    click.echo(f"{path}\n  {render.size(wheel.size)}, sha256 {wheel.sha256}, {how}")
