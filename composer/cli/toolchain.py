"""`compose toolchain`: the compilers for CUDA sources."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from composer.cli import render
from composer.cli.progress import drawn
from composer.errors import HostError, RecipeError
from composer.steps.fetch import export_wheelhouse
from composer.steps.host_compiler import find_host_compiler
from composer.steps.toolchain import (
    Candidate,
    Choice,
    candidates,
    ensure_toolchain,
    environ_of,
    find_candidate,
    load_toolchains,
)
from composer.steps.toolkit import Unusable
from composer.steps.toolkit_wheels import fetch_wheels, renew_toolchain_lock
from composer.store import Store

_PATH = click.Path(path_type=Path)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_DEBUG = click.option("--debug", is_flag=True, help="Show tracebacks.")


@click.group()
def toolchain() -> None:
    """Find, make and prove the compilers for CUDA sources."""


@toolchain.command("list")
@_JSON
@_DEBUG
def list_(*, as_json: bool, debug: bool) -> None:  # noqa: ARG001
    """List the toolchains that are known or installed, and what they emit."""
    known, unusable = candidates(Store(), platform.machine())
    if as_json:
        click.echo(msgspec.json.encode({
            "toolchains": [_facts(one) for one in known],
            "unusable": [{"root": str(one.root), "origin": one.origin, "reason": one.reason} for one in unusable],
        }))  # fmt: skip
        return
    _show_list(known, unusable)


@toolchain.command()
@click.argument("name")
@_JSON
@_DEBUG
def show(*, name: str, as_json: bool, debug: bool) -> None:  # noqa: ARG001
    """Show a toolchain by its name or folder: paths, versions, and the environment of a build with it."""
    one = find_candidate(name, Store())
    compiler, environ, why = "", {}, ""
    try:
        found = find_host_compiler(one.limits, os.environ)
        compiler, environ = str(found), environ_of(one.root, one.root / "bin" / "nvcc", found)
    except HostError as fault:
        why = f"{fault.what}: {fault.where}: {fault.why}"
    facts = _facts(one) | {"host_compiler": compiler or None, "environ": environ, "packages": _packages(one)}
    if as_json:
        click.echo(msgspec.json.encode(facts))
        return
    _show(one, compiler or why)
    for key, value in environ.items():
        click.echo(f"  {key}={value}")
    for package in _packages(one):
        click.echo(f"  {package['name']} {package['version']}, {render.size(package['size'])}")


@toolchain.command()
@click.argument("name")
@click.option("--offline", is_flag=True, help="Ask no index; use the store and --wheelhouse.")
@click.option("--wheelhouse", "wheelhouses", type=_PATH, multiple=True, help="A folder of wheels to use first.")
@click.option("--output", "-o", type=_PATH, help="Also put its wheels into this folder, for --wheelhouse elsewhere.")
@_JSON
@_DEBUG
def ensure(*, name: str, offline: bool, wheelhouses: Sequence[Path], output: Path | None, as_json: bool,
           debug: bool) -> None:  # noqa: ARG001  # fmt: skip
    """Make a toolchain usable and prove it by compiling a kernel. What was done once is not done again."""
    store = Store()
    one = find_candidate(name, store)
    choice = Choice(candidate=one, host_compiler=find_host_compiler(one.limits, os.environ))
    with drawn(quiet=as_json) as listener:
        made = ensure_toolchain(choice, store, offline=offline, wheelhouses=wheelhouses, listener=listener)
        if output and one.wheels:
            fetched = fetch_wheels(one.wheels, store, offline=offline, wheelhouses=wheelhouses, listener=listener)
            export_wheelhouse(one.wheels.artifacts, fetched, output)
    if as_json:
        facts = _facts(find_candidate(name, store))
        click.echo(msgspec.json.encode(facts | {"host_compiler": str(made.host_compiler), "environ": made.environ()}))
        return
    click.echo(f"{made.name} compiles with {made.host_compiler}\n  CUDA_HOME={made.root}")


@toolchain.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@_DEBUG
def lock(*, names: Sequence[str], debug: bool) -> None:  # noqa: ARG001
    """Resolve pinned toolchains again, for every machine, and write their pylock files."""
    known = load_toolchains().toolchain
    for name in names or known:
        if name not in known:
            raise RecipeError(f"no pinned toolchain {name!r}", fix=f"Known: {', '.join(known)}.")
        for machine in ("x86_64", "aarch64"):
            render.locked(*renew_toolchain_lock(name, known[name], machine))


def _facts(one: Candidate) -> dict[str, Any]:
    return {
        "name": one.name, "cuda": one.cuda, "version": one.version, "sms": one.sms, "origin": one.origin,
        "state": _state(one), "root": str(one.root), "host_compilers": str(one.limits), "libraries": one.libraries,
        "size": _size(one),
    }  # fmt: skip


def _state(one: Candidate) -> str:
    if one.wheels is None:
        return "installed"
    return "ensured" if one.made else "to download"


def _size(one: Candidate) -> int:
    """Bytes of its wheels."""
    return sum(artifact.size for artifact in one.wheels.artifacts) if one.wheels else 0


def _packages(one: Candidate) -> list[dict[str, Any]]:
    names = set(one.wheels.packages) if one.wheels else set()
    locked = one.wheels.lock.packages if one.wheels else ()
    return [
        {"name": package.name, "version": package.version, "size": sum(wheel.size for wheel in package.artifacts)}
        for package in locked if package.name in names
    ]  # fmt: skip


def _show_list(known: Sequence[Candidate], unusable: Sequence[Unusable]) -> None:
    for one in known:
        note = f", {render.size(_size(one))} of wheels" if _size(one) and not one.made else ""
        where = one.root if one.made else one.origin
        click.echo(f"{one.name}: {_state(one)}{note}; nvcc {one.version}; {where}")
        click.echo(f"  sm: {' '.join(map(str, one.sms))}; takes {one.limits}")
    for bad in unusable:
        click.echo(f"not usable: {bad.root} ({bad.origin}): {bad.reason}")
    if not known:
        click.echo("no toolchain is known for this machine")


def _show(one: Candidate, compiler: str) -> None:
    click.echo(
        f"{one.name}\n  state:         {_state(one)}\n  origin:        {one.origin}\n  CUDA:          {one.cuda}\n"
        f"  nvcc:          {one.version}, {one.root / 'bin' / 'nvcc'}\n"
        f"  emits:         {', '.join(f'sm_{sm}' for sm in one.sms)}\n"
        f"  libraries:     {'yes' if one.libraries else 'no: for sources that call none'}\n"
        f"  takes:         {one.limits}\n  host compiler: {compiler}"
    )
