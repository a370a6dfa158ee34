"""`compose explain`: who needs a library, who provides it, and by which rule of the loader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import msgspec

from composer.cli import options, render
from composer.errors import VerifyError
from composer.proofs.closure import LOADED_AT_START, dlopened, program_of
from composer.proofs.explain import Explanation, Need, explain
from composer.steps.tree import read_tree

_HOSTS = {
    "glibc": "part of the host's glibc",
    "driver": "part of the host's NVIDIA driver",
    "plugin": "the host's, where it has the fabric",
}


@click.command("explain")
@click.argument("name", metavar="LIBRARY")
@click.argument("path", type=click.Path(path_type=Path), metavar="BUNDLE|FOLDER")
@options.JOBS
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def explain_library(*, name: str, path: Path, jobs: int, as_json: bool, debug: bool) -> None:  # noqa: ARG001
    """Tell who in a bundle needs LIBRARY (a file name or SONAME), who provides it, and how the loader finds it."""
    manifest, tree = read_tree(path, jobs=jobs)
    found = explain(tree, name, program=program_of(tree, manifest.target["python"]), preloaded=LOADED_AT_START,
                    opened=dlopened(manifest.dlopen, tree.objects))  # fmt: skip
    if not found.known:
        similar = f"Did you mean {' or '.join(found.similar)}?" if found.similar else "Give a file name or SONAME."
        raise VerifyError(f"nothing needs or provides {name!r}", where=str(path), fix=similar)
    if as_json:
        click.echo(msgspec.json.encode(found))
        return
    for line in _lines(found):
        click.echo(line)


def _lines(found: Explanation) -> Iterator[str]:
    yield found.name
    if found.host:
        yield f"  {_HOSTS[found.host]}"
    if found.preloaded:
        yield "  loaded when Python starts: the host's, or the bundle's own where the host has none"
    for one in found.providers:
        others = [name for name in one.names if name != found.name]
        called = f", also called {', '.join(others)}" if others else ""
        yield f"  provided by {one.path}{called}, to {render.counted(one.serves, 'object')}"
    answered = {need.subject for need in found.needs if need.provider}
    for need in found.needs:
        yield f"  {'opened' if need.opened else 'needed'} by {need.subject}"
        yield f"    {_how(need, several=len(found.providers) > 1, answered=need.subject in answered)}"


def _how(need: Need, *, several: bool, answered: bool) -> str:
    """answered: the object gets the library when something else loads it."""
    text = _rule(need)
    if need.rule == "absent" and answered and not need.chain:
        text += " when it is loaded by itself"
    if need.provider and several:
        text += f": {need.provider}"
    if need.opened:
        text += f"; for {need.opened}"
    if need.chain:
        text += f"; when loaded by {' <- '.join(need.chain)}"
        text += f", and in {render.counted(need.ways - 1, 'other way')}" if need.ways > 1 else ""
    return text


def _rule(need: Need) -> str:
    where = "its RPATH" if need.owner == need.subject else f"the RPATH of {need.owner}"
    texts = {
        "rpath": f"found by {need.entry}, in {where}" if need.entry else "found by an RPATH",
        "runpath": f"found by {need.entry}, in its RUNPATH",
        "path": "found by its path",
        "loaded": f"loaded by then, for {need.owner}" if need.owner else "loaded by then",
        "preloaded": "loaded when Python started",
        "host": "left to the host",
        "absent": "not found",
        "unusable": "found, but no shared object",
    }
    return texts[need.rule]
