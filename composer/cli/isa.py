"""`compose isa`: which CPU instructions libraries use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from composer.errors import VerifyError
from composer.model.isa import FEATURES, Judgement
from composer.model.target import Targets, parse_isa
from composer.steps.isa import Library, judge_libraries, list_instructions
from composer.steps.load import load_targets

_ROLES = {"canary": "never chooses", "dispatch": "may choose at run time", "plain": ""}
_ENCODINGS = ("vex", "evex", "ymm", "zmm")


@click.command("isa")
@click.argument("path", type=click.Path(path_type=Path), metavar="FILE|WHEEL|BUNDLE|FOLDER")
@click.option("--isa", "name", metavar="NAME", help="Tell whether it was built for this one: avx2, avx512, ...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def isa(*, path: Path, name: str | None, as_json: bool, debug: bool) -> None:  # noqa: ARG001
    """Count the CPU instructions of libraries by kind, and prove what they were built for."""
    targets = load_targets()
    chosen = parse_isa(name, targets) if name else None
    libraries = []
    for one in list_instructions(path):
        libraries.append(one)
        if not as_json:
            _show(one)
    judgement = judge_libraries(libraries, targets.isa[chosen]) if chosen else None
    if as_json:
        click.echo(msgspec.json.encode({"libraries": libraries, "isa": chosen, "judgement": judgement}))
    elif not libraries:
        click.echo("no code for x86-64 or AArch64")
    if judgement and chosen:
        _conclude(judgement, chosen, path, targets, as_json=as_json)


def _show(one: Library) -> None:
    if one.fault:
        click.echo(f"{one.path}: {one.fault}")
        return
    role = _ROLES[one.role] and f", {_ROLES[one.role]}"
    undecoded = f", {one.undecoded:,} bytes are none" if one.undecoded else ""
    click.echo(f"{one.path}: {one.machine}, {one.instructions:,} instructions{undecoded}{role}")
    for kinds in (_ENCODINGS, FEATURES[one.machine]):
        parts = _parts(one, kinds)
        if parts:
            click.echo(f"  {parts}")
    if one.build_flags:
        click.echo(f"  built with {one.build_flags}")


def _parts(one: Library, kinds: Sequence[str]) -> str:
    return ", ".join(f"{kind} {one.counts[kind]:,}" for kind in kinds if one.counts.get(kind))


def _conclude(judgement: Judgement, name: str, path: Path, targets: Targets, *, as_json: bool) -> None:
    """Print the verdict; VerifyError when the tree needs more than a CPU of this instruction set has."""
    if judgement.excess:
        lines = [f"{one}: {', '.join(features)}" for one, features in judgement.excess.items()]
        fix = f"Choose an instruction set that has them; {name} is that of {targets.isa[name].cpus}."
        raise VerifyError(f"needs more than {name}", where=str(path), why="\n".join(lines), fix=fix)
    if not as_json:
        click.echo(f"{name}: {judgement.verdict}")
        for one in judgement.witnesses:
            click.echo(f"  {one}")
