"""`compose estimate`: what a build will take, on this machine or an imagined one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import click
import msgspec

from composer.cli import options
from composer.cli.progress import drawn
from composer.cli.render import console, notes, size, table
from composer.errors import RecipeError
from composer.model.estimate import Estimate, Machine, Record, Step, spoken_time
from composer.model.recipe import Recipe
from composer.steps.estimate import PlanEstimate, Site, estimate_plan
from composer.steps.load import BUILDER, plain_name
from composer.steps.outline import Request, outline
from composer.steps.sourcing import TORCH
from composer.store import Store

UNKNOWN = "no record"


class _Cores(click.ParamType[Machine]):
    """`64:256`: cores, and GB (10^9 bytes) of memory."""

    name = "machine"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Machine:  # noqa: ANN401
        """The machine, or click's own error."""
        found = re.fullmatch(r"([1-9]\d{0,4}):([1-9]\d{0,5})", str(value).strip())
        if found is None:
            self.fail(f"{value!r} is not a number of cores and GB of memory such as 64:256", param, ctx)
        return Machine(cores=int(found[1]), memory=int(found[2]) * 10**9)


@click.command()
@options.with_options(options.TARGET, options.SHAPE, options.WORK)
@click.option("--on", "machine", type=_Cores(), metavar="CORES:GB",
              help="For a machine with so many cores and so much memory, on which nothing is at hand.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def estimate(*, machine: Machine | None, as_json: bool, **kwargs: Any) -> None:  # noqa: ANN401
    """Estimate what `compose build` with the same options will take: CPU time, wall time, memory, disk and download.

    From builds that this machine has recorded, else from those that composer brings along. Nothing is downloaded.
    """
    store, request = Store(), options.request(kwargs)
    with drawn(quiet=as_json) as listener:
        decided = outline(_as_wheels(request) if machine else request, store)
        source = _asked(request, decided.recipe) if machine else ()
        _check(decided.recipe, source)
        site = Site(
            settings=options.settings(kwargs), options=options.shape(kwargs), machine=machine, source=source,
            output=kwargs["output"].absolute() / f"{decided.name}.tar.zst",
            jobs=request.jobs,
        )  # fmt: skip
        plan = estimate_plan(decided, store, site, listener)
    if as_json:
        click.echo(msgspec.json.encode(_facts(plan)))
    else:
        _show(plan, "on a machine with" if machine else "on this machine, with")


def _asked(request: Request, recipe: Recipe) -> tuple[str, ...]:
    """What the user wants built from source."""
    every = [one.name for one in recipe.component if one.build] if (request.recipe or "").endswith(BUILDER) else []
    return tuple(dict.fromkeys([*request.no_binary, *([TORCH] if request.torch == "source" else []), *every]))


def _as_wheels(request: Request) -> Request:
    """The request with wheels alone: what this machine can build says nothing of another one."""
    torch = "wheel" if request.torch in ("auto", "source") else request.torch
    recipe = request.recipe and plain_name(request.recipe)
    return replace(request, recipe=recipe, torch=torch, no_binary=(), budget=0.0)


def _check(recipe: Recipe, names: Sequence[str]) -> None:
    known = [one.name for one in recipe.component if one.build]
    RecipeError.collect([
        RecipeError(f"{recipe.name} does not say how {name!r} is built",
                    where="--torch" if name == TORCH else "--no-binary",
                    fix=f"It can be for: {', '.join(known) or 'none of its components'}.")
        for name in names if name not in known
    ])  # fmt: skip


def _show(plan: PlanEstimate, where: str) -> None:
    whole, machine = plan.estimate, plan.estimate.machine
    free = f", {size(machine.disk)} of disk free" if machine.disk is not None else ""
    click.echo(f"{plan.name}\n  {where} {machine.cores} cores, {size(machine.memory)} of memory{free}")
    rows_shown = table("step", "#CPU time", "#wall time", "#jobs", "#memory", "#disk", "from")
    sources = _numbered(whole.steps)
    for step in whole.steps:
        rows_shown.add_row(step.work.what, *_cells(step), _from(step, sources))
    rows_shown.add_section()
    sign = "> " if whole.at_least else ""
    rows_shown.add_row("all", sign + spoken_time(whole.cpu_seconds), sign + spoken_time(whole.seconds), "",
                  _bytes(whole.memory or None), _bytes(whole.disk), "")  # fmt: skip
    console().print(rows_shown)
    for line in _conclusions(whole):
        click.echo(line)
    for record, number in sources:
        click.echo(f"[{number}] {_source(record)}")
    notes(plan.estimate.lacks, [])
    for note in plan.notes:
        click.echo(f"note:     {note}")


def _cells(step: Step) -> tuple[str, ...]:
    """CPU time, wall time, jobs, memory, disk."""
    if step.work.done == 1.0:
        return "built before", "", "", "", ""
    sign = "> " if step.at_least else ""
    times = (UNKNOWN if one is None else sign + spoken_time(one) for one in (step.cpu_seconds, step.seconds))
    return *times, str(step.jobs), _bytes(step.memory), _bytes(step.disk)


def _bytes(count: int | None) -> str:
    return UNKNOWN if count is None else size(count)


def _numbered(steps: Iterable[Step]) -> list[tuple[Record, int]]:
    """What the figures come from, and what else is recorded, each with its number."""
    found: list[Record] = []
    for step in steps:
        found += [one for one in (*step.records, *step.also) if one not in found]
    return [(record, number) for number, record in enumerate(found, 1)]


def _from(step: Step, sources: Sequence[tuple[Record, int]]) -> str:
    """`scaled [1], reported [2]`; what does not count here in brackets of its own."""
    used = [f"{record.basis} [{number}]" for record, number in sources if record in step.records]
    also = [f"[{number}]" for record, number in sources if record in step.also]
    part = [f"{step.work.done:.0%} done"] if 0 < step.work.done < 1 else []
    return ", ".join([*part, *used, *([f"see also {' '.join(also)}"] if also else [])])


def _conclusions(whole: Estimate) -> Iterator[str]:
    if whole.download:
        yield f"{size(whole.download)} to download before, which stay on the disk; the time depends on the network"
    if whole.longest and whole.seconds:
        yield f"most of the time: {whole.longest.work.what}, {(whole.longest.seconds or 0) / whole.seconds:.0%}"


def _source(record: Record) -> str:
    when = f", {record.date}" if record.date else ""
    missing = f"; {record.at_least}" if record.at_least else ""
    return f"{record.basis}: {record.how} ({record.by}{when}){missing}"


def _facts(plan: PlanEstimate) -> dict[str, Any]:
    whole = plan.estimate
    return {
        "name": plan.name, "machine": asdict(whole.machine), "download": whole.download,
        "steps": [_step_facts(step) for step in whole.steps],
        "total": {"cpu_seconds": whole.cpu_seconds, "seconds": whole.seconds, "memory": whole.memory,
                  "disk": whole.disk, "at_least": whole.at_least},
        "longest": whole.longest.work.what if whole.longest else None, "lacks": whole.lacks, "notes": plan.notes,
    }  # fmt: skip


def _step_facts(step: Step) -> dict[str, Any]:
    return {
        "step": step.work.what, "jobs": step.jobs, "done": step.work.done, "cpu_seconds": step.cpu_seconds,
        "seconds": step.seconds, "memory": step.memory, "disk": step.disk, "basis": step.basis,
        "at_least": step.at_least, "records": step.records, "also": step.also,
    }  # fmt: skip
