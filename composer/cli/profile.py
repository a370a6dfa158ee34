"""`compose profile`: the launch profiles, what they hold, and whether a stack takes them."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from composer.cli import render
from composer.cli.check import BUNDLE_OPTION, HOST_OPTION, as_data, judge_profile, refuse, show
from composer.model.profile import Profile
from composer.steps.advise import Advice, Command, Request, find_profile, load_profiles, open_for, read_host

_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_DEBUG = click.option("--debug", is_flag=True, help="Show tracebacks.")
_REFERENCE = click.option("--reference", is_flag=True, help="As its reference wrote it, before our corrections.")


@click.group("profile")
def profile() -> None:
    """Launch profiles: known commands for a model on some GPUs."""


@profile.command("list")
@click.option("--sm", type=int, help="Only those for this GPU architecture.")
@_JSON
@_DEBUG
def list_profiles(*, sm: int | None, as_json: bool, debug: bool) -> None:  # noqa: ARG001
    """List the profiles."""
    found = [one for one in load_profiles().values() if sm is None or not one.sm or sm in one.sm]
    if as_json:
        click.echo(msgspec.json.encode(found))
        return
    table = render.table("profile", "kind", "model", "#GPUs", "SM", "stack", "corrected")
    for one in found:
        stack = " ".join((one.stack, *one.versions))
        table.add_row(one.name, one.kind, one.model or "any", str(one.gpus or ""), ", ".join(map(str, one.sm)) or "any",
                      stack, str(len(one.changes) or ""))  # fmt: skip
    render.console().print(table)


@profile.command("show")
@click.argument("name")
@_REFERENCE
@_JSON
@_DEBUG
def show_profile(*, name: str, reference: bool, as_json: bool, debug: bool) -> None:  # noqa: ARG001
    """Show a profile as a command, and what was changed in it."""
    chosen = _chosen(name, reference=reference)
    if as_json:
        click.echo(msgspec.json.encode({"argv": chosen.argv(), **msgspec.to_builtins(chosen)}))
        return
    click.echo(f"{chosen.name}: {chosen.title}\n  reference: {chosen.reference}")
    for label, text in (("expected", chosen.expected), ("notes", chosen.notes)):
        if text:
            click.echo(f"  {label}: {text}")
    for change in chosen.changes:
        click.echo(f"  changed: {change.name}: {_shown(change.was)} -> {_shown(change.now)}: {change.why}")
    click.echo(f"\n{_command_line(chosen)}")


@profile.command("check")
@click.argument("names", nargs=-1)
@BUNDLE_OPTION
@HOST_OPTION
@_REFERENCE
@_JSON
@_DEBUG
def check_profiles(*, names: Sequence[str], bundle: Path | None, host_file: Path | None, reference: bool,
                   as_json: bool, debug: bool) -> None:  # noqa: ARG001  # fmt: skip
    """Judge profiles by the rules for launches, and by the command line of a bundle's stack. Default: all.

    Without --host, on the GPUs that each was made for. Those of other stacks are judged only when named. Exit status 9
    if one would be refused.
    """
    chosen = [_chosen(name, reference=reference) for name in names or _of_shipped_stacks()]
    stack = open_for(bundle, Command()) if bundle else None
    request = Request(stack=stack, host=read_host(host_file) if host_file else None, phases=("launch",))
    found = [(one, judge_profile(one, request)) for one in chosen]
    if as_json:
        data = {one.name: as_data(advice) for one, advice in found}
        click.echo(msgspec.json.format(msgspec.json.encode(data)))
    else:
        _show_all(found, one_by_one=bool(names))
    refuse(sum(advice.errors for _, advice in found))


def _of_shipped_stacks() -> list[str]:
    return [one.name for one in load_profiles().values() if one.stack == "sglang"]


def _chosen(name: str, *, reference: bool) -> Profile:
    found = find_profile(name, load_profiles())
    return found.as_referenced() if reference else found


def _show_all(found: Iterable[tuple[Profile, Advice]], *, one_by_one: bool) -> None:
    table = render.table("profile", "#errors", "#warnings", "#unknown", "the first error")
    for one, advice in found:
        if one_by_one:
            click.echo(f"{one.name}:")
            show(advice, show_unknown=False)
        violated = [row.rule.severity for row in advice.outcomes if row.verdict == "violated"]
        counts = Counter([*violated, *(finding.severity for finding in advice.findings)])
        unknown = sum(row.verdict == "unknown" for row in advice.outcomes)
        table.add_row(one.name, str(counts["error"]), str(counts["warning"]), str(unknown), _first_error(advice))
    if not one_by_one:
        render.console().print(table)


def _first_error(advice: Advice) -> str:
    texts = [f"{one.subject}: {one.evidence}" for one in advice.findings if one.severity == "error"]
    texts += [f"{one.rule.id}: {one.rule.message}" for one in advice.outcomes
              if one.verdict == "violated" and one.rule.severity == "error"]  # fmt: skip
    return texts[0] if texts else ""


def _shown(value: Any) -> str:  # noqa: ANN401
    return "nothing" if value is None else "set" if value is True else str(value)


def _command_line(chosen: Profile) -> str:
    words = [f"{name}={shlex.quote(value)}" for name, value in chosen.environment.items()]
    words += ["python", "-m", chosen.module]
    groups: list[str] = [" ".join(words)]
    for word in chosen.argv():
        if word.startswith("--"):
            groups.append(word)
        else:
            groups[-1] += f" {shlex.quote(word)}"
    return " \\\n    ".join(groups)
