"""`compose targets`: what can be composed, by which recipe, and why the rest cannot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import click
import msgspec

from composer.cli import render
from composer.errors import RecipeError
from composer.model.recipe import Recipe
from composer.model.target import Targets, parse_gpus, sm_text
from composer.model.variant import parse_variants
from composer.model.verdict import Offer, Row, Verdict, judge, matrix, names
from composer.steps.load import load_named, load_recipes, load_targets


@click.command("targets")
@click.argument("variants", nargs=-1, metavar="[VARIANT]...")
@click.option("--gpu", "gpus", multiple=True, metavar="NAME", help="Only this GPU: H100, 'RTX 5090'; repeatable.")
@click.option("--recipe", metavar="NAME|PATH", help="Only this recipe. Default: all that are shipped.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def targets(*, variants: tuple[str, ...], gpus: tuple[str, ...], recipe: str | None, as_json: bool,
            debug: bool) -> None:  # noqa: ARG001  # fmt: skip
    """Show every GPU architecture, which CUDA emits code for it, the driver it needs, and which recipe composes it.

    With the names of variants, such as sglang-python312-cuda12_8-sm90-avx512, tell for each whether it can be composed,
    and why not. Exit status: 0, or 2 when one cannot.
    """
    known = load_targets()
    loaded = {one.spelling: one for one in load_named(recipe)} if recipe else load_recipes()
    recipes = {name: one.recipe for name, one in loaded.items()}
    if variants:
        _judge(variants, recipes, known, as_json=as_json)
        return
    rows = matrix(recipes, known, parse_gpus(gpus, known))
    if as_json:
        _print_json(_data(rows, known))
    else:
        _show(rows, known)
        if not gpus:
            _show_instructions(known)


def _judge(variants: Sequence[str], recipes: Mapping[str, Recipe], known: Targets, *, as_json: bool) -> None:
    """Print a verdict on each name; RecipeError when one cannot be composed."""
    verdicts = [judge(one, recipes, known) for one in parse_variants(variants, known, names(recipes, known))]
    if as_json:
        _print_json([_verdict(one) for one in verdicts])
    else:
        for verdict in verdicts:
            _show_verdict(verdict)
    refused = sum(not one.plannable for one in verdicts)
    if refused:
        raise RecipeError(f"{refused} of {render.counted(len(verdicts), 'variant')} cannot be composed")


def _print_json(data: object) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(data)).decode())


def _verdict(one: Verdict) -> dict[str, Any]:
    return {
        "name": one.variant.name, "plannable": one.plannable, "recipe": one.recipe or None, "sm": one.sms,
        "reasons": [_fault(fault) for fault in one.reasons],
        "left_out": {str(sm): [_fault(fault) for fault in faults] for sm, faults in one.left_out.items()},
    }  # fmt: skip


def _fault(fault: RecipeError) -> dict[str, str | None]:
    return {"what": fault.what, "where": fault.where, "why": fault.why, "fix": fault.fix}


def _show_verdict(one: Verdict) -> None:
    if one.plannable:
        click.echo(f"{one.variant.name}: {sm_text(one.sms)}, with --recipe {one.recipe}")
    else:
        click.echo(f"{one.variant.name}: cannot be composed")
    for fault in one.reasons:
        click.echo(f"  {fault.what}: {fault.why}" if fault.why else f"  {fault.what}")
    for sm, faults in one.left_out.items():
        click.echo(f"  without SM {sm}: {_reasons(faults)}")


def _reasons(faults: Iterable[RecipeError]) -> str:
    return "; ".join(fault.why or fault.what for fault in faults)


def _data(rows: Sequence[Row], known: Targets) -> dict[str, Any]:
    return {
        "sm": [_row_data(row, known) for row in rows],
        "isa": known.isa,
        "cuda": {cuda: {"emits": one.emits, "driver": known.driver.compatible.get(cuda.partition(".")[0]),
                        "driver_native": known.driver.native.get(cuda)} for cuda, one in known.cuda.items()},
    }  # fmt: skip


def _row_data(row: Row, known: Targets) -> dict[str, Any]:
    about = known.sm[str(row.sm)]
    return {
        "sm": row.sm, "name": about.name, "gpus": [row.gpu.name] if row.gpu else about.gpus,
        "own_cpu": about.own_cpu, "codes": row.codes,
        "driver": row.drivers,
        "recipes": [{"recipe": one.recipe, "name": one.name, "version": one.version, "cuda": one.cuda,
                     "machines": one.machines, "reasons": [_fault(fault) for fault in one.reasons]}
                    for one in row.offers],
    }  # fmt: skip


def _show(rows: Sequence[Row], known: Targets) -> None:
    releases, majors = list(known.cuda), sorted({cuda.partition(".")[0] for cuda in known.cuda})
    table = render.table("#SM", "GPUs", *(f"CUDA\n{cuda}" for cuda in releases),
                         *(f"#driver\nCUDA {major}" for major in majors), "recipes")  # fmt: skip
    for row in rows:
        codes = (row.codes[cuda][-1] if row.codes[cuda] else "-" for cuda in releases)
        drivers = (row.drivers.get(major, "-") for major in majors)
        table.add_row(str(row.sm), _gpus(row, known), *codes, *drivers, "\n".join(_offers(row.offers)))
    render.console().print(table)
    for line in _legend(known):
        click.echo(line)


def _show_instructions(known: Targets) -> None:
    table = render.table("ISA", "machine", "CPUs", "compiler flags")
    for name, isa in known.isa.items():
        table.add_row(name, isa.machine, isa.cpus, " ".join(isa.flags))
    render.console().print(table)


def _gpus(row: Row, known: Targets) -> str:
    about = known.sm[str(row.sm)]
    names = [row.gpu.name] if row.gpu else about.gpus
    return ", ".join(f"{name}*" if name in about.own_cpu else name for name in names)


def _offers(offers: Sequence[Offer]) -> Iterator[str]:
    """The recipes that compose an architecture, or else why none does."""
    served = [one for one in offers if one.machines]
    if served:
        yield ", ".join(f"{one.recipe} ({', '.join(one.machines)})" for one in served)
        return
    for one in offers:
        yield f"not {one.recipe}: {_reasons(one.reasons)}"


def _legend(known: Targets) -> Iterator[str]:
    native = ", ".join(f"{branch} for {cuda}" for cuda, branch in known.driver.native.items() if cuda in known.cuda)
    yield "*: with an Arm CPU of its own. 90a: code for that GPU alone; 100f: for its family."
    yield f"Driver: the oldest branch. Where it compiles PTX, it must be of that CUDA, too: {native}."
