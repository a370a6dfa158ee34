"""The commands of `compose`."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

import composer
from composer.cli import render
from composer.cli.duration import Duration
from composer.cli.gpu import gpu_code
from composer.cli.isa import isa
from composer.cli.progress import drawn
from composer.cli.slim import slim
from composer.cli.toolchain import toolchain
from composer.cli.wheel import wheel
from composer.errors import RecipeError, VerifyError
from composer.steps.build import Settings, at_hand, build_sources, fetch_all, prepare, sources, summarise
from composer.steps.build import build as run_build
from composer.steps.bundle import open_bundle
from composer.steps.fetch import export_wheelhouse
from composer.steps.load import load_recipe
from composer.steps.locks import LockOptions, Mode, renew_lock
from composer.steps.outline import Outline, Request, outline
from composer.steps.plan import LEVELS, SLIM, Options
from composer.steps.unpack import unpack as run_unpack
from composer.steps.verify import verify as run_verify
from composer.store import Store

F = TypeVar("F", bound=Callable[..., Any])

_PATH = click.Path(path_type=Path)
_TARGET_OPTIONS = (
    click.option("--recipe", default="sglang", show_default=True, help="A shipped recipe, or the path of one."),
    click.option("--sm", required=True, help="GPU architecture: 90, sm90 or 9.0."),
    click.option("--isa", required=True, help="CPU instruction set: avx2, avx512, ..."),
    click.option("--python", metavar="VERSION|PATH|host[:VERSION]",
                 help="Minor version, path of a CPython to bundle, or none: the host's. Default: the recipe's order."),
    click.option("--overlay", "overlays", multiple=True, metavar="NAME|PATH",
                 help="Change the recipe: `lean` leaves out what serving text models never calls."),
    click.option("--torch", metavar="auto|wheel|source|PATH", default="auto", show_default=True,
                 help="How PyTorch is had: auto builds it if that is possible here within the budget."),
    click.option("--torch-budget", "budget", type=Duration(), default="1h", show_default=True,
                 help="How long a build may take that was not asked for by name: 90m, 2h, 0 for none."),
    click.option("--no-binary", multiple=True, metavar="NAME",
                 help="Build this component from source, instead of taking its wheel."),
)  # fmt: skip
_WORK_OPTIONS = (
    click.option("--offline", is_flag=True, help="Ask no index; use the store and --wheelhouse."),
    click.option("--wheelhouse", "wheelhouses", type=_PATH, multiple=True, help="A folder of wheels to use first."),
    click.option("--locked", is_flag=True, help="Fail when the recipe changed after it was locked."),
    click.option("--frozen", is_flag=True, help="Use the lock as it is, without a look at the recipe."),
    click.option("--jobs", "-j", type=click.IntRange(1), default=lambda: len(os.sched_getaffinity(0)),
                 help="Threads. Default: the cores this process may use."),
    click.option("--debug", is_flag=True, help="Show tracebacks."),
)  # fmt: skip
_SHAPE_OPTIONS = (
    click.option("--compress", type=click.Choice(list(LEVELS)), default="default", show_default=True,
                 help="fast: zstd 3; default: zstd 9; max: zstd 19. All match over 64 MiB."),
    click.option("--bytecode/--no-bytecode", default=True, show_default=True, help="Compile modules ahead of time."),
    click.option("--slim", type=click.Choice(SLIM), default=SLIM[0], show_default=True,
                 help="Cut code for other GPUs from libraries: those whose licence allows it, all, or none."),
    click.option("--keep-ptx", is_flag=True, help="Keep the newest PTX, which the driver compiles for later GPUs."),
    click.option("--accept-license-modification", "accept_licence_modification", is_flag=True,
                 help="With --slim all: modify what may only be passed on unmodified. The bundle stays in your house."),
    click.option("--output", "-o", type=_PATH, default=Path("dist"), show_default=True, help="Folder of the bundle."),
)  # fmt: skip


def _with(*groups: tuple[Callable[[F], F], ...]) -> Callable[[F], F]:
    """Several groups of options as one decorator."""

    def decorate(function: F) -> F:
        options = [option for group in groups for option in group]
        return functools.reduce(lambda done, option: option(done), reversed(options), function)

    return decorate


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(composer.__version__, prog_name="compose")
def compose() -> None:
    """Compose CUDA wheels into one relocatable bundle for one GPU architecture and one CPU instruction set."""


compose.add_command(gpu_code)


def _lock_options(kwargs: dict[str, Any]) -> LockOptions:
    if kwargs["locked"] and kwargs["frozen"]:
        raise RecipeError("--locked and --frozen contradict each other", fix="Give one of them.")
    mode: Mode = "locked" if kwargs["locked"] else "frozen" if kwargs["frozen"] else "auto"
    return LockOptions(mode=mode, offline=kwargs["offline"])


def _outline(store: Store, kwargs: dict[str, Any]) -> Outline:
    request = Request(
        recipe=kwargs["recipe"], sm=kwargs["sm"], isa=kwargs["isa"], python=kwargs["python"], torch=kwargs["torch"],
        no_binary=kwargs["no_binary"], budget=kwargs["budget"], lock=_lock_options(kwargs),
        wheelhouses=kwargs["wheelhouses"], private=kwargs.get("slim") == "all",
        overlays=kwargs["overlays"],
    )  # fmt: skip
    return outline(request, store)


def _settings(kwargs: dict[str, Any]) -> Settings:
    return Settings(jobs=kwargs["jobs"], offline=kwargs["offline"], wheelhouses=kwargs["wheelhouses"])


def _options(kwargs: dict[str, Any]) -> Options:
    return Options(**{one.name: kwargs[one.name] for one in fields(Options)})


def _bundle_path(decided: Outline, folder: Path) -> Path:
    return folder.absolute() / f"{decided.name}.tar.zst"


@compose.command()
@_with(_TARGET_OPTIONS, _SHAPE_OPTIONS, _WORK_OPTIONS)
@click.option("--dry-run", is_flag=True, help="Show the plan and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan, and then the result, as JSON.")
def build(*, dry_run: bool, as_json: bool, **kwargs: Any) -> None:  # noqa: ANN401
    """Build a bundle: NAME.tar.zst and NAME.tar.zst.sha256."""
    started = time.monotonic()
    store, settings, options = Store(), _settings(kwargs), _options(kwargs)
    with drawn(quiet=as_json) as listener:
        decided = _outline(store, kwargs)
        output = _bundle_path(decided, kwargs["output"])
        if dry_run and not at_hand(decided, store, settings):
            render.outline(decided, output, store, as_json=as_json)
            return
        prepared = prepare(decided, store, replace(settings, offline=settings.offline or dry_run), options, listener)
        render.plan(summarise(prepared, output), as_json=as_json)
        if dry_run:
            return
        built = run_build(prepared, store, settings, output, listener)
    render.built(built, time.monotonic() - started, as_json=as_json)


@compose.command()
@_with(_TARGET_OPTIONS, _SHAPE_OPTIONS, _WORK_OPTIONS)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def plan(context: click.Context, /, **kwargs: Any) -> None:  # noqa: ANN401
    """Show what a build would do: `build --dry-run`. Nothing is downloaded."""
    context.invoke(build, dry_run=True, **kwargs)


@compose.command()
@click.argument("recipe", default="sglang")
@click.option("--python", "pythons", multiple=True, help="Only these minor versions. Default: all of the recipe.")
@click.option("--upgrade", multiple=True, metavar="NAME", help="Let these move; everything else keeps its version.")
@click.option("--cooldown", type=click.IntRange(0), metavar="DAYS", help="Take no release younger than this.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def lock(*, recipe: str, pythons: tuple[str, ...], upgrade: tuple[str, ...], cooldown: int | None,
         debug: bool) -> None:  # noqa: ARG001  # fmt: skip
    """Resolve a recipe for its targets and write pylock files (PEP 751) beside it."""
    loaded = load_recipe(recipe)
    for machine in loaded.recipe.machines:
        for python in pythons or loaded.recipe.pythons:
            made = renew_lock(loaded, python, machine, LockOptions(upgrade=upgrade, cooldown=cooldown))
            render.locked(made, loaded.lock_path(python, machine))


@compose.command()
@_with(_TARGET_OPTIONS, _WORK_OPTIONS)
@click.option("--output", "-o", type=_PATH, help="Also put every file into this folder, for --wheelhouse elsewhere.")
def fetch(*, output: Path | None, **kwargs: Any) -> None:  # noqa: ANN401
    """Download everything that a build needs."""
    store = Store()
    decided = _outline(store, kwargs)
    with drawn() as listener:
        more = build_sources(decided)
        fetched = fetch_all(decided, store, _settings(kwargs), listener, more)
    if output:
        artifacts = [artifact for package in (*sources(decided), *more) for artifact in package.artifacts]
        render.exported(export_wheelhouse(artifacts, fetched, output), output)
    render.fetched(fetched)


@compose.command()
@click.argument("bundle", type=_PATH)
@click.option("--imports/--no-imports", default=True, show_default=True, help="Import modules in a child process.")
@click.option("--jobs", "-j", type=click.IntRange(1), default=lambda: len(os.sched_getaffinity(0)))
@click.option("--json", "as_json", is_flag=True, help="Print findings as JSON.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def verify(*, bundle: Path, imports: bool, jobs: int, as_json: bool, debug: bool) -> None:  # noqa: ARG001
    """Check a bundle, or the folder it was unpacked into, against its manifest."""
    with drawn(quiet=as_json) as listener:
        manifest, findings = run_verify(bundle, Store(), imports=imports, jobs=jobs, listener=listener)
    render.findings(manifest, findings, as_json=as_json)
    errors = sum(one.severity == "error" for one in findings)
    if errors:
        raise VerifyError(f"{errors} faults", where=str(bundle), fix="See the findings above.")


@compose.command()
@click.argument("bundle", type=_PATH)
@click.option("--json", "as_json", is_flag=True, help="Print the manifest.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def inspect(*, bundle: Path, as_json: bool, debug: bool) -> None:  # noqa: ARG001
    """Show what a bundle holds and what was changed in it, without unpacking."""
    opened = open_bundle(bundle)
    if as_json:
        click.echo(msgspec.json.format(opened.manifest_json).decode())
    else:
        render.manifest(opened.manifest, bundle)


@compose.command()
@click.argument("bundle", type=_PATH)
@click.argument("prefix", type=_PATH)
@click.option("--jobs", "-j", type=click.IntRange(1), default=lambda: len(os.sched_getaffinity(0)))
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def unpack(*, bundle: Path, prefix: Path, jobs: int, debug: bool) -> None:  # noqa: ARG001
    """Unpack a bundle in parallel, checking every file. `tar --zstd -xf` does it too, without the checks."""
    with drawn() as listener:
        run_unpack(open_bundle(bundle), prefix.absolute(), jobs=jobs, listener=listener)
    click.echo(f"unpacked into {prefix}")


compose.add_command(isa)
compose.add_command(slim)
compose.add_command(toolchain)
compose.add_command(wheel)
