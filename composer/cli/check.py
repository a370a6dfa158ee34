"""`compose check`: what a host, a bundle and a launch on it say to every rule, before anything is started."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from composer.cli import render
from composer.errors import VerifyError
from composer.model.finding import Finding
from composer.model.profile import Profile
from composer.proofs.rules import Outcome
from composer.runtime.host.detect import detect
from composer.steps.advise import (
    PHASES,
    Advice,
    Command,
    Request,
    advise,
    find_profile,
    load_profiles,
    load_rules,
    of_profile,
    open_for,
    parse_given,
    read_host,
    split_command,
)

_SEVERITIES = ("error", "warning", "note")
_SECRETS = frozenset({"TOKEN", "KEY", "SECRET", "PASSWORD"})
HOST_OPTION = click.option("--host", "host_file", type=click.Path(path_type=Path), metavar="FILE",
                           help="Another host: what `compose detect --json` said there.")  # fmt: skip
BUNDLE_OPTION = click.option("--bundle", type=click.Path(path_type=Path), metavar="BUNDLE|FOLDER",
                             help="The stack, its command line and its variables.")  # fmt: skip


@click.command("check")
@BUNDLE_OPTION
@HOST_OPTION
@click.option("--no-host", is_flag=True, help="Judge no host.")
@click.option("--profile", "profile_name", metavar="NAME", help="A launch profile; words after -- are added to it.")
@click.option("--env", "-e", "assignments", multiple=True, metavar="NAME=VALUE", help="A variable of the launch.")
@click.option("--environ", is_flag=True, help="And all variables of this process.")
@click.option("--set", "-s", "given", multiple=True, metavar="FIELD=VALUE",
              help="A fact that is not found by itself: topo.links_max=PHB.")  # fmt: skip
@click.option("--phase", "phases", multiple=True, type=click.Choice(PHASES), help="Only these rules. Default: all.")
@click.option("--unknown", "show_unknown", is_flag=True, help="List the rules whose facts are not known, too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[-- [NAME=VALUE...] [python -m MODULE] FLAG...]")
def check(*, bundle: Path | None, host_file: Path | None, no_host: bool, given: Sequence[str], phases: Sequence[str],
          show_unknown: bool, as_json: bool, **launch: Any) -> None:  # noqa: ANN401  # fmt: skip
    """Judge a host, a bundle and a launch by every rule: ok, violated, or unknown where a fact is missing.

    Exit status 9 if a rule whose breach is an error is violated, or a flag would be refused.
    """
    command = _command(**launch)
    request = Request(
        stack=open_for(bundle, command) if bundle else None,
        host=None if no_host else read_host(host_file) if host_file else detect(),
        here=not no_host and host_file is None, command=command, given=parse_given(given), phases=phases,
    )  # fmt: skip
    advice = advise(load_rules(), request)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(as_data(advice))))
    else:
        show(advice, show_unknown=show_unknown)
    refuse(advice.errors)


def _command(*, profile_name: str | None, assignments: Sequence[str], environ: bool, words: Sequence[str],
             debug: bool) -> Command | None:  # noqa: ARG001  # fmt: skip
    """The launch that the options and words describe; None where they describe none."""
    typed = split_command([*assignments, *words], os.environ if environ else {})
    if profile_name:
        return of_profile(find_profile(profile_name, load_profiles()), typed)
    return typed if words or assignments or environ else None


def refuse(errors: int) -> None:
    """VerifyError for errors, so that a script stops."""
    if errors:
        raise VerifyError(f"{render.counted(errors, 'error')}", where="check", fix="Follow the fixes above.")


def as_data(advice: Advice) -> Mapping[str, Any]:
    """What `--json` prints of an advice."""
    rules = [
        {"id": one.rule.id, "severity": one.rule.severity, "phase": one.rule.phase, "verdict": one.verdict,
         "applies": one.applies, "message": one.rule.message, "fix": one.rule.fix, "evidence": one.evidence,
         "missing": one.missing}
        for one in advice.outcomes
    ]  # fmt: skip
    facts = {name: value for name, value in advice.values.items() if name != "argv" and not _is_secret(name)}
    return {"errors": advice.errors, "findings": advice.findings, "rules": rules, "facts": facts}


def _is_secret(field: str) -> bool:
    """Whether the name of a flag or variable says that its value is nobody's business: HF_TOKEN, --api-key."""
    return not _SECRETS.isdisjoint(re.split(r"[._-]", field.upper()))


def show(advice: Advice, *, show_unknown: bool) -> None:
    """Findings and violated rules, the worst first, and what is unknown on request."""
    table = render.table("severity", "what", "evidence", "why", "fix")
    for row in _rows(advice.findings, advice.outcomes):
        table.add_row(*row)
    if table.row_count:
        render.console().print(table)
    if show_unknown:
        _show_unknown(advice.outcomes)
    counts = Counter(one.verdict for one in advice.outcomes)
    idle = sum(one.applies is False for one in advice.outcomes)
    click.echo(f"{len(advice.outcomes)} rules: {counts['ok']} ok ({idle} of them do not apply), "
               f"{counts['violated']} violated, {counts['unknown']} unknown; "
               f"{render.counted(len(advice.findings), 'finding')} about flags and variables")  # fmt: skip


def _rows(findings: Sequence[Finding], outcomes: Sequence[Outcome]) -> Iterator[Sequence[str]]:
    for severity in _SEVERITIES:
        for finding in findings:
            if finding.severity == severity:
                yield severity, finding.subject, finding.evidence, finding.id, finding.fix or ""
        for one in outcomes:
            if one.rule.severity == severity and one.verdict == "violated":
                yield severity, one.rule.id, "\n".join(one.evidence), one.rule.message, one.rule.fix


def _show_unknown(outcomes: Sequence[Outcome]) -> None:
    table = render.table("severity", "unknown rule", "not known", "fix if violated")
    for severity in _SEVERITIES:
        for one in outcomes:
            if one.rule.severity == severity and one.verdict == "unknown":
                table.add_row(severity, one.rule.id, ", ".join(one.missing), one.rule.fix)
    if table.row_count:
        render.console().print(table)


def judge_profile(profile: Profile, request: Request) -> Advice:
    """The advice on a profile: on the host it was made for, unless there is one."""
    made_for: dict[str, Any] = {}
    if request.host is None:
        made_for = {"topo.gpus": profile.gpus} if profile.gpus else {}
        made_for |= {"host.sm": profile.sm[0]} if profile.sm else {}
    return advise(load_rules(), request.of(of_profile(profile), made_for))
