"""Launch profiles: known commands for a model on some GPUs, as data.

A profile is what works on its stack. Where that is not what its reference wrote, `changes` say what it wrote and why
it was changed, so that the reference's own command can be had and checked, too.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final, Literal

import msgspec

from composer.errors import RecipeError
from composer.model._strict import Record, convert
from composer.model.rule import RuleBook

SCHEMA: Final = 1
#: Where profiles and rules are in a bundle, below its prefix.
PROFILES_PATH: Final = "share/compose/profiles.json"
RULES_PATH: Final = "share/compose/rules.json"
SERVER: Final = "sglang.launch_server"
FlagValue = bool | int | float | str | list[str | int] | dict[str, Any]

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9.-]*")
_FLAG: Final = re.compile(r"[a-z][a-z0-9-]*")
_VARIABLE: Final = re.compile(r"[A-Z_][A-Z0-9_]*")
#: What a host has to do with; the others are over once a bundle is made.
_HOST_PHASES: Final = ("select", "install", "host", "launch", "k8s")


class Change(Record, frozen=True, kw_only=True):
    """Where a profile differs from its reference: in a flag, a variable or the model, by `name`.

    was: what the reference has, absent if nothing. now: what the profile has, absent if nothing.
    """

    name: str
    why: str
    was: FlagValue | None = None
    now: FlagValue | None = None


class Profile(Record, frozen=True, kw_only=True):
    """A command for a model.

    kind: `command` starts a server as it stands, `fragment` is to be added to another, `tool` runs something else.
    model: a repository's name; none in a fragment that fits several. module: what Python runs.
    stack: the recipe that serves it, and versions of it; another name is a fork that no recipe composes.
    gpus, sm: what it was made for; no `sm` for any. flags: without their hyphens, in order.
    """

    name: str
    kind: Literal["command", "fragment", "tool"]
    title: str
    reference: str
    stack: str = "sglang"
    versions: tuple[str, ...] = ()
    model: str | None = None
    module: str = SERVER
    gpus: int | None = None
    sm: tuple[int, ...] = ()
    expected: str | None = None
    notes: str | None = None
    flags: Mapping[str, FlagValue] = {}
    environment: Mapping[str, str] = {}
    changes: tuple[Change, ...] = ()

    def argv(self) -> list[str]:
        """The words of the command line, with the model's first."""
        return [*(("--model-path", self.model) if self.model else ()), *flag_words(self.flags)]

    def as_referenced(self) -> Profile:
        """The profile as its reference wrote it: every change undone. Flags that were dropped come last."""
        flags, environment, model = dict(self.flags), dict(self.environment), self.model
        for change in self.changes:
            if change.name == "model":
                model = str(change.was)
            elif change.name.startswith("--"):
                _undo(flags, change.name[2:], change.was)
            else:
                _undo(environment, change.name, change.was)
        return msgspec.structs.replace(self, flags=flags, environment=environment, model=model, changes=())

    def serves(self, stack: str, version: str, sms: Collection[int]) -> bool:
        """Whether it is for a stack of this version, and a GPU of one of these SMs; none of them is any."""
        if self.stack != stack or (self.versions and version not in self.versions):
            return False
        return not sms or not self.sm or not set(self.sm).isdisjoint(sms)


class _ProfileFile(Record, frozen=True, kw_only=True):
    schema: int
    reference: str
    profile: tuple[dict[str, Any], ...]
    sm: tuple[int, ...] = ()
    versions: tuple[str, ...] = ()


def flag_words(flags: Mapping[str, FlagValue]) -> list[str]:
    """Flags as words: true is a switch, a list several values, and a table JSON."""
    words: list[str] = []
    for name, value in flags.items():
        words.append(f"--{name}")
        if isinstance(value, list):
            words += map(str, value)
        elif value is not True:
            words.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return words


def parse_profiles(files: Mapping[str, Mapping[str, Any]]) -> dict[str, Profile]:
    """All profiles by name, from the TOML data of their files, by file name.

    A file's `reference`, `sm` and `versions` are those of its profiles that have none of their own.
    RecipeError lists every fault with its path: `sm120.toml: profile[2] (glm5).flags.tp`.
    """
    faults: list[RecipeError] = []
    profiles: dict[str, Profile] = {}
    for filename, data in files.items():
        file = convert(data, _ProfileFile, filename)
        if file.schema != SCHEMA:
            faults.append(RecipeError(f"schema {file.schema} is not {SCHEMA}", where=f"{filename}: schema",
                                      fix="Use the version of compose that this file was written for."))  # fmt: skip
        shared = {"reference": file.reference, "sm": file.sm, "versions": file.versions}
        for index, row in enumerate(file.profile):
            where = f"{filename}: profile[{index}]"
            one = convert({**shared, **row}, Profile, where)
            faults += _faults(one, f"{where} ({one.name})")
            if one.name in profiles:
                faults.append(RecipeError("this name is taken", where=f"{where}.name", fix="Give each its own."))
            profiles[one.name] = one
    RecipeError.collect(faults)
    return profiles


def render_profiles(profiles: Mapping[str, Profile], *, stack: str, version: str, sms: Sequence[int]) -> bytes:
    """`share/compose/profiles.json` of a bundle: those for its stack and its SMs. Equal input makes equal bytes.

    `sm` is a number; of a bundle for several SMs it is the list of them, and a profile that is not for all says for
    which. No `sms` are those of any bundle, and `sm` is null.
    """
    rows = {
        one.name: {
            "title": one.title, "kind": one.kind, "model": one.model, "module": one.module, "gpus": one.gpus,
            "expected": one.expected, "notes": one.notes, "flags": flag_words(one.flags), "env": dict(one.environment),
            **({"sm": one.sm} if one.sm and not set(sms) <= set(one.sm) else {}),
        }
        for one in profiles.values() if one.serves(stack, version, sms)
    }  # fmt: skip
    shown = sms if len(sms) > 1 else next(iter(sms), None)
    return _json({"schema": SCHEMA, "stack": f"{stack} {version}", "sm": shown, "profiles": rows})


def render_rules(book: RuleBook) -> bytes:
    """`share/compose/rules.json` of a bundle: the rules that a host and a launch have to do with, and their tables."""
    rows = [
        {"id": one.id, "severity": one.severity, "phase": one.phase, "message": one.message, "fix": one.fix,
         "when": [[x.field, x.operator, x.value] for x in one.when],
         "must": [[x.field, x.operator, x.value] for x in one.must]}
        for one in book.rules if one.phase in _HOST_PHASES
    ]  # fmt: skip
    return _json({"schema": SCHEMA, "tables": msgspec.to_builtins(book.tables), "rules": rows})


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def _undo(values: dict[str, Any], name: str, was: FlagValue | None) -> None:
    if was is None:
        values.pop(name, None)
    else:
        values[name] = was


def _faults(profile: Profile, where: str) -> Iterator[RecipeError]:
    if not _NAME.fullmatch(profile.name):
        yield RecipeError(f"{profile.name!r} is no name", where=f"{where}.name", fix="Use a-z, 0-9, - and full stops.")
    if profile.kind == "command" and not profile.model:
        yield RecipeError("a command needs a model", where=f"{where}.model", fix="Name it, or make it a fragment.")
    for name, value in profile.flags.items():
        if not _FLAG.fullmatch(name):
            yield RecipeError("is no flag", where=f"{where}.flags.{name}", fix="Write it without its hyphens: tp-size.")
        if value is False:
            yield RecipeError("a switch cannot be off", where=f"{where}.flags.{name}", fix="Leave it out.")
    for name in profile.environment:
        if not _VARIABLE.fullmatch(name):
            yield RecipeError("is no variable", where=f"{where}.environment.{name}", fix="Use A-Z, 0-9 and _.")
    for index, change in enumerate(profile.changes):
        if _present(profile, change.name) != change.now:
            yield RecipeError("is not what the profile has", where=f"{where}.changes[{index}].now ({change.name})",
                              why=f"{_present(profile, change.name)!r} is there, {change.now!r} here",
                              fix="Write what the profile has now, or nothing if it has none.")  # fmt: skip


def _present(profile: Profile, name: str) -> FlagValue | None:
    if name == "model":
        return profile.model
    values: Mapping[str, FlagValue] = profile.flags if name.startswith("--") else profile.environment
    return values.get(name.removeprefix("--"))


def nearest(name: str, known: Sequence[str]) -> str:
    """How to go on after a name that is not known."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(sorted(known)) or 'none'}."
