"""Prove that the METADATA of a stack is met by the stack, and say where the recipe decided against upstream's.

The first is what `pip check` asks inside a bundle, and more: an extra that a distribution asks of another counts, too.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from composer.formats.metadata import name_and_version, requires_dist
from composer.model.finding import Finding
from composer.model.layer import RequiresChange
from composer.model.marker import counts

Kind = Literal["dropped", "relaxed", "overridden"]

_EXTRA = re.compile(r"""\bextra == ["']([^"']+)|["']([^"']+)["'] == extra\b""")


class Declared(msgspec.Struct, frozen=True, kw_only=True):
    """What one distribution of a tree says of itself. path: of its METADATA; name: normalised; requires: as written."""

    path: str
    name: str
    version: str
    requires: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One Requires-Dist of upstream's that the recipe changed.

    name: of the project that it asks for; was, now: the line, without one when it was dropped. relaxed: `now` asks for
    less. extras: for which extras of the distribution it counts; applies: it does on this target, with the extras that
    the stack asks for. version: what the stack has of that project; met: that satisfies `was`.
    """

    distribution: str
    name: str
    was: str
    now: str | None
    kind: Kind
    reason: str
    extras: tuple[str, ...]
    applies: bool
    version: str | None
    met: bool


def read_declared(path: str, metadata: bytes) -> Declared:
    """The facts of one METADATA; WheelError when it is malformed."""
    name, version = name_and_version(metadata)
    return Declared(path=path, name=name, version=str(version), requires=tuple(map(str, requires_dist(metadata))))


def check_requirements(stack: Iterable[Declared], environment: Mapping[str, str]) -> tuple[Finding, ...]:
    """One error for each Requires-Dist that counts and is not met, in a stable order: none is what `pip check` wants.

    environment: the marker variables (PEP 508) of the target, without `extra`.
    """
    by_name = {one.name: one for one in stack}
    wanted = _wanted_extras(by_name.values(), environment)
    return tuple(
        _unmet(one, line, by_name.get(_project(line)))
        for _, one in sorted(by_name.items())
        for line in dict.fromkeys(one.requires)
        if _counts(line, wanted[one.name], environment) and not _is_met(line, by_name)
    )


def ledger(
    stack: Iterable[Declared], changes: Mapping[str, Sequence[RequiresChange]], environment: Mapping[str, str]
) -> tuple[Row, ...]:
    """Every changed requirement, by distribution and project.

    stack: as it is, after the changes. changes: by the distribution in whose METADATA they were made.
    """
    by_name = {one.name: one for one in stack}
    before = [
        msgspec.structs.replace(one, requires=(*one.requires, *(each.was for each in changes.get(name, ()))))
        for name, one in by_name.items()
    ]
    wanted = _wanted_extras(before, environment)
    rows = (
        _row(name, change, wanted.get(name, frozenset({""})), by_name, environment)
        for name, made in changes.items()
        for change in {(each.was, each.now): each for each in made}.values()
    )
    return tuple(sorted(rows, key=lambda row: (row.distribution, row.name, row.was)))


def check_ledger(rows: Iterable[Row], paths: Mapping[str, str]) -> tuple[Finding, ...]:
    """A note for each change that counts on this target and that the stack does not happen to satisfy all the same.

    paths: of each distribution's METADATA, by name.
    """
    noted = (row for row in rows if row.applies and not row.met)
    return tuple(_note(row, paths.get(row.distribution, row.distribution)) for row in noted)


def left_out(rows: Iterable[Row]) -> dict[str, str]:
    """Projects that the stack does not have because the recipe dropped them, with the reason."""
    return {row.name: row.reason for row in rows if row.version is None}


@functools.lru_cache(maxsize=16_384)
def _parsed(line: str) -> Requirement:
    return Requirement(line)


def _project(line: str) -> str:
    return str(canonicalize_name(_parsed(line).name))


def _is_met(line: str, stack: Mapping[str, Declared]) -> bool:
    one = stack.get(_project(line))
    return one is not None and _parsed(line).specifier.contains(one.version, prereleases=True)


def _counts(line: str, extras: Iterable[str], environment: Mapping[str, str]) -> bool:
    return counts(_parsed(line), environment, extras)


def _wanted_extras(stack: Iterable[Declared], environment: Mapping[str, str]) -> dict[str, frozenset[str]]:
    """The extras that are asked of each distribution, with the empty one, which stands for none."""
    by_name = {one.name: one for one in stack}
    wanted = {name: {""} for name in by_name}
    todo = [(name, "") for name in by_name]
    while todo:
        name, extra = todo.pop()
        for line in by_name[name].requires:
            project = _project(line)
            if project not in wanted or not _counts(line, (extra,), environment):
                continue
            for asked in {str(canonicalize_name(one)) for one in _parsed(line).extras} - wanted[project]:
                wanted[project].add(asked)
                todo.append((project, asked))
    return {name: frozenset(extras) for name, extras in wanted.items()}


def _unmet(one: Declared, line: str, found: Declared | None) -> Finding:
    has = f"the bundle has {found.version}" if found else "the bundle does not have it"
    return Finding(
        id="ledger.unmet", severity="error", subject=one.path,
        evidence=f"{one.name} {one.version} requires {line}; {has}",
        fix=f"Give a component {_project(line)} with a version that fits, or a [[requires]] rule that says why not.",
    )  # fmt: skip


def _row(name: str, change: RequiresChange, extras: frozenset[str], stack: Mapping[str, Declared],
         environment: Mapping[str, str]) -> Row:  # fmt: skip
    project = _project(change.was)
    found = stack.get(project)
    return Row(
        distribution=name, name=project, was=change.was, now=change.now, kind=_kind(change), reason=change.reason,
        extras=tuple(_extras_of(change.was)), applies=_counts(change.was, extras, environment),
        version=found.version if found else None, met=_is_met(change.was, stack),
    )  # fmt: skip


def _kind(change: RequiresChange) -> Kind:
    if change.now is None:
        return "dropped"
    old, new = _parsed(change.was), _parsed(change.now)
    asks_less = set(new.specifier) <= set(old.specifier) and new.extras <= old.extras and new.url is None
    return "relaxed" if asks_less and _project(change.now) == _project(change.was) else "overridden"


def _extras_of(line: str) -> Iterator[str]:
    """The extras that a requirement's marker names; packaging gives a marker's parts only as its text."""
    for found in _EXTRA.finditer(str(_parsed(line).marker or "")):
        yield found[1] or found[2]


def _note(row: Row, path: str) -> Finding:
    has = f"the bundle has {row.version}" if row.version else "left out"
    return Finding(
        id="ledger.violated" if row.version else "ledger.dropped", severity="note", subject=path,
        evidence=f"{row.distribution} requires {row.was.partition(';')[0].strip()}; {has}: {row.reason}",
    )  # fmt: skip
