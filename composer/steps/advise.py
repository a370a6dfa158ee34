"""Gather what rules ask about, and give every verdict: a bundle, a host, and a launch on it.

What was not looked at stays unknown. A host may be this one or another, by the JSON that `compose detect --json` gave
there; what only the host itself can tell (free ports, kernel settings, files) is then unknown.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import msgspec

from composer._fs import host_errors
from composer.errors import RecipeError
from composer.model.finding import Finding
from composer.model.profile import SERVER, Profile, nearest, parse_profiles
from composer.model.rule import UNSET, RuleBook, Tables, Value, field_fault, is_value, parse_rules, parse_tables
from composer.proofs.launch import Launch, check_flags, check_variables, read_plainly
from composer.proofs.rules import Context, Outcome, judge
from composer.runtime.gpu import runs
from composer.steps.facts import OF_FILES, Values, here_values, host_values, launch_values, manifest_values
from composer.steps.load import data_root, load_targets
from composer.steps.stack import Stack, open_stack

PHASES: Final = ("build", "compose", "select", "install", "host", "launch", "k8s")
_ASSIGNMENT: Final = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_HOST_FIX: Final = "Run `compose detect --json` on that host (or bin/compose-detect of a bundle) and keep its output."


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A launch: what Python runs, its arguments and the variables that are set for it.

    fragment: something is to be added, so nothing in it is missing.
    """

    argv: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    module: str = SERVER
    fragment: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to judge: a bundle's stack, a host, a command, each if there is one.

    here: the host is this one, and can be asked more than its description says. given: facts that go before those that
    were found, and make the other fields of their group unset. phases: only rules of these; all if empty.
    """

    stack: Stack | None = None
    host: Mapping[str, Any] | None = None
    here: bool = False
    command: Command | None = None
    given: Mapping[str, Value | None] = field(default_factory=dict)
    phases: Sequence[str] = ()

    def of(self, command: Command, given: Mapping[str, Value | None]) -> Request:
        """The same for another command, with further facts."""
        return replace(self, command=command, given={**given, **self.given})


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """The verdicts on rules, what is wrong with flags and variables, and what all of it was judged by."""

    outcomes: Sequence[Outcome]
    findings: Sequence[Finding]
    values: Mapping[str, Value | None]

    @property
    def errors(self) -> int:
        """How many findings and violated rules are errors."""
        violated = [one.rule.severity for one in self.outcomes if one.verdict == "violated"]
        return [*violated, *(one.severity for one in self.findings)].count("error")


class _Gpu(msgspec.Struct):
    """The types of what is read of a GPU."""

    index: int
    uuid: str | None = None
    name: str | None = None
    sm: int | None = None
    memory_bytes: int | None = None


class _Cpu(msgspec.Struct):
    """The types of what is read of a CPU."""

    features: list[str] | None = None


class _Host(msgspec.Struct):
    """The types of what is read of a host's description; it may say more."""

    schema: int
    gpus: list[_Gpu]
    glibc: str | None = None
    l4t: str | None = None
    numa_nodes: int | None = None
    visible: list[int] = []
    driver: dict[str, str | None] | None = None
    cpu: _Cpu | None = None
    memory: dict[str, int | None] | None = None
    shm: dict[str, int | None] | None = None
    limits: dict[str, int | None] | None = None


def load_rules() -> RuleBook:
    """The shipped rules, in the order of their phases."""
    folder = data_root() / "recipes" / "rules"
    tables = parse_tables(_toml(folder / "tables.toml"), "tables.toml")
    return parse_rules({f"{phase}.toml": _toml(folder / f"{phase}.toml") for phase in PHASES}, tables)


def load_profiles() -> dict[str, Profile]:
    """The shipped profiles by name."""
    folder = data_root() / "recipes" / "profiles"
    return parse_profiles({path.name: _toml(path) for path in sorted(folder.glob("*.toml"))})


def find_profile(name: str, profiles: Mapping[str, Profile]) -> Profile:
    """A profile by name; RecipeError with the nearest name."""
    if name not in profiles:
        raise RecipeError(f"no profile {name!r}", where="profile", fix=nearest(name, [*profiles]))
    return profiles[name]


def read_host(path: Path) -> dict[str, Any]:
    """What `compose detect --json` said on another host. RecipeError for anything else."""
    with host_errors(path):
        data = path.read_bytes()
    try:
        host = msgspec.json.decode(data)
        described = msgspec.convert(host, _Host)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as fault:
        raise RecipeError("does not describe a host", where=str(path), why=str(fault), fix=_HOST_FIX) from fault
    if described.schema != 1:
        raise RecipeError(f"schema {described.schema} is not 1", where=str(path), fix=_HOST_FIX)
    found: dict[str, Any] = host
    return found


def split_command(words: Sequence[str], environment: Mapping[str, str]) -> Command:
    """A command as one would type it: `NAME=VALUE ... [PYTHON -m MODULE] FLAG ...`.

    RecipeError where words before the first flag are something else.
    """
    rest, variables = list(words), dict(environment)
    if rest and rest[0] == "env":
        rest.pop(0)
    while rest and (found := _ASSIGNMENT.fullmatch(rest[0])) and not rest[0].startswith("-"):
        variables[found[1]] = found[2]
        rest.pop(0)
    if len(rest) > 2 and rest[1] == "-m":
        return Command(argv=rest[3:], environment=variables, module=rest[2])
    if rest and not rest[0].startswith("-"):
        raise RecipeError(f"{rest[0]!r} is neither a variable nor a flag", where="after --",
                          fix="Give NAME=VALUE words, then `python -m MODULE` or nothing, then flags.")  # fmt: skip
    return Command(argv=rest, environment=variables)


def of_profile(profile: Profile, more: Command | None = None) -> Command:
    """The command of a profile, with flags and variables of another one after its own."""
    more = more or Command()
    return Command(
        argv=[*profile.argv(), *more.argv], environment={**profile.environment, **more.environment},
        module=profile.module, fragment=profile.kind == "fragment" and not more.argv,
    )  # fmt: skip


def parse_given(words: Sequence[str]) -> Values:
    """`FIELD=VALUE` words as fields: JSON where the value is JSON, else text. RecipeError names the field."""
    values: Values = {}
    for word in words:
        name, equals, text = word.partition("=")
        fault = field_fault(name) if equals else "is not FIELD=VALUE"
        if fault:
            raise RecipeError(fault, where=f"--set {word}", fix="Name a field as rules do: host.sm=120.")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        values[name] = value if is_value(value) or value is None else text
    return values


def advise(book: RuleBook, request: Request) -> Advice:
    """Every verdict on a bundle's stack, a host, and a command. VerifyError where the bundle cannot be read.

    A bundle for several architectures is judged for each that a GPU of the host makes use of, or for all where there is
    no telling; of a rule's verdicts the worst counts.
    """
    values: Values = {}
    findings: Sequence[Finding] = ()
    command, unknown = request.command, {"build", "k8s"} if request.command else {*UNSET}
    if command:
        launch = _launch(command, request.stack)
        findings = [*launch.findings, *_variables(command, request.stack, book.tables)]
        values |= launch_values(command.argv, command.environment, launch.values, book.tables)
        unknown |= {name for name in OF_FILES if name not in values}
    if request.here:
        values |= here_values(values)
    unknown -= {field.partition(".")[0] for field in request.given}
    contexts = [Context(values=values | more | dict(request.given), unknown=frozenset(unknown))
                for more in _used(request, list(_targets(request)))]  # fmt: skip
    verdicts = zip(*(judge(book, one, phases=request.phases) for one in contexts), strict=True)
    return Advice(outcomes=[_worst(one) for one in verdicts], findings=findings, values=_merged(contexts))


def _targets(request: Request) -> Iterator[Values]:
    """What bundle and host tell, for each architecture of the bundle; once where there is none."""
    environment = request.command.environment if request.command else {}
    for sm in request.stack.manifest.sms if request.stack else (None,):
        found: Values = {}
        if request.stack and sm is not None:
            found |= manifest_values(request.stack.manifest, load_targets(), sm)
            methods = request.stack.quant_methods
            found |= {"stack.quant_methods": methods} if methods else {}
        if request.host:
            found |= host_values(request.host, sm, environment)
        yield found


def _used(request: Request, tried: list[Values]) -> list[Values]:
    """Those of a GPU's own architecture, or else of one whose code it runs; all where that is not known, or none is."""
    pairs = [(one, one.get("target.sm"), request.given.get("host.sm", one.get("host.sm"))) for one in tried]
    known = [(one, built, has) for one, built, has in pairs if isinstance(built, int) and isinstance(has, int)]
    exact = [one for one, built, has in known if built == has]
    return exact or [one for one, built, has in known if runs(has, built, ptx=False)] or tried


def _worst(outcomes: Sequence[Outcome]) -> Outcome:
    order = ("ok", "unknown", "violated")
    return max(outcomes, key=lambda one: (order.index(one.verdict), one.applies is not False))


def _merged(contexts: Sequence[Context]) -> Mapping[str, Value | None]:
    """The facts of all contexts; what differs is a list."""
    first, *others = (one.values for one in contexts)
    differing = [name for name, value in first.items() if any(one.get(name) != value for one in others)]
    return {**first, **{name: [str(one.values.get(name)) for one in contexts] for name in differing}}


def open_for(path: Path, command: Command | None) -> Stack:
    """The stack of a bundle, with the sources of what a command runs, if there is one. Errors as of `open_stack`."""
    return open_stack(path, command.module.partition(".")[0] if command else None)


def _launch(command: Command, stack: Stack | None) -> Launch:
    if stack is None:
        return Launch(values=read_plainly(command.argv))
    flags = stack.flags(command.module)
    if command.fragment:
        flags = tuple(replace(flag, required=False) for flag in flags)
    return check_flags(command.argv, flags)


def _variables(command: Command, stack: Stack | None, tables: Tables) -> list[Finding]:
    if stack is None:
        return []
    package = command.module.partition(".")[0]
    return check_variables(command.environment, stack.readers(command.environment, tables.owners, package))


def _toml(path: Path) -> dict[str, Any]:
    with host_errors(path):
        data = path.read_bytes()
    try:
        return tomllib.loads(data.decode())
    except ValueError as fault:
        raise RecipeError("not TOML", where=path.name, why=str(fault)) from fault
