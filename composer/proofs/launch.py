"""Prove a launch before it is tried: its flags by the program's own parser, its variables by who reads them.

The rules of argparse (CPython 3.10 to 3.13): an option is known by a unique prefix, `--name=value` is one word, a word
that starts with a hyphen is never a value unless it is a negative number or has a space in it. argparse stops at its
first fault; here all are found.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from composer.formats.server_flags import Flag, Variable
from composer.model.finding import Finding
from composer.model.rule import Value

_NEGATIVE: Final = re.compile(r"-\d+|-\d*\.\d+")
_HELP: Final = Flag(names=("-h", "--help"), nargs=0)
_TRUTH: Final = {"true": True, "1": True, "yes": True, "y": True, "false": False, "0": False, "no": False, "n": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A command line as its program reads it: the value of every flag that is given, under each of its names."""

    values: Mapping[str, Value]
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Readers:
    """Who reads which variables, as far as it was looked up.

    declared: variables with types. read: further names that some source or library holds. unread: names that none of
    the files of their owner holds. names: what a misspelt name may have been meant as. renamed: prefixes that the
    program replaces when it starts (`SGL_` by `SGLANG_`).
    """

    declared: Mapping[str, Variable] = field(default_factory=dict)
    read: frozenset[str] = frozenset()
    unread: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()
    renamed: Mapping[str, str] = field(default_factory=dict)


def check_flags(argv: Sequence[str], flags: Sequence[Flag]) -> Launch:
    """What a program with these flags makes of its arguments, and everything that it would refuse."""
    reader = _Reader(options=_options(flags))
    reader.read(argv)
    given = {name for spelling in reader.values for name in reader.options[spelling].names}
    for flag in flags:
        if flag.required and not given & {*flag.names}:
            reader.fault("flags.required", flag.names[0], "is required and not given", f"Add {flag.names[0]}.")
    values: dict[str, Value] = dict(reader.unknown)
    for spelling, value in reader.values.items():
        values |= dict.fromkeys(reader.options[spelling].names, value)
    return Launch(values=values, findings=tuple(reader.findings))


def read_plainly(argv: Sequence[str]) -> dict[str, Value]:
    """The flags of a command line whose program is unknown: a word after a flag that is no flag is its value."""
    values: dict[str, Value] = {}
    last = None
    for word in argv:
        name, equals, value = word.partition("=")
        if word.startswith("--") and len(word) > 2:
            values[name], last = (value, None) if equals else (True, name)
        elif last:
            values[last], last = word, None
    return values


def check_variables(environment: Mapping[str, str], readers: Readers) -> list[Finding]:
    """Variables that nobody reads, that have another name by now, and values that their reader cannot read."""
    return [found for name in sorted(environment) for found in _variable(name, environment[name], readers)]


def _variable(name: str, value: str, readers: Readers) -> Iterator[Finding]:
    new = current_name(name, readers.renamed)
    if new in readers.unread:
        near = difflib.get_close_matches(new, sorted(readers.names - {new}), n=1, cutoff=0.75)
        yield Finding(id="environment.unread", severity="warning", subject=name, evidence="nothing reads it",
                      fix=f"Did you mean {near[0]}?" if near else "Drop it.")  # fmt: skip
        return
    if new != name and (new in readers.read or new in readers.declared):
        yield Finding(id="environment.renamed", severity="note", subject=name, fix=f"Write {new}.",
                      evidence=f"the program takes it for {new} and warns")  # fmt: skip
    variable = readers.declared.get(new)
    if variable and not _readable(value, variable.type):
        yield Finding(
            id="environment.value", severity="warning", subject=name, fix=_value_fix(variable),
            evidence=f"{value!r} is no {variable.type.lower()}: the default {variable.default} is taken",
        )  # fmt: skip


def current_name(name: str, prefixes: Mapping[str, str]) -> str:
    """A variable's name after the program has replaced a prefix of it."""
    return next((new + name.removeprefix(old) for old, new in prefixes.items() if name.startswith(old)), name)


def _readable(value: str, kind: str) -> bool:
    try:
        if kind == "Bool":
            return value.lower() in _TRUTH
        if kind == "Int":
            int(value)
        elif kind == "Float":
            float(value)
    except ValueError:
        return False
    return True


def _value_fix(variable: Variable) -> str:
    texts = {"Bool": f"Set it to one of {', '.join(_TRUTH)}.", "Int": "Set it to a whole number."}
    return texts.get(variable.type, "Set it to a number.")


def _options(flags: Sequence[Flag]) -> dict[str, Flag]:
    return {name: flag for flag in (_HELP, *flags) for name in flag.names}


@dataclass(slots=True)
class _Reader:
    """One pass over the words of a command line."""

    options: Mapping[str, Flag]
    values: dict[str, Value] = field(default_factory=dict)
    unknown: dict[str, Value] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def fault(self, kind: str, subject: str, evidence: str, fix: str | None = None) -> None:
        self.findings.append(Finding(id=kind, severity="error", subject=subject, evidence=evidence, fix=fix))

    def read(self, argv: Sequence[str]) -> None:
        rest = list(argv)
        while rest:
            word = rest.pop(0)
            if word == "--":
                self._stray([word, *rest])
                return
            if self._is_value(word):
                self._stray([word])
                continue
            taken = []
            while rest and self._is_value(rest[0]) and rest[0] != "--":
                taken.append(rest.pop(0))
            self._option(word, taken)

    def _is_value(self, word: str) -> bool:
        """Whether argparse takes a word for a value rather than for an option, known or not."""
        if not word.startswith("-") or len(word) == 1 or word in self.options:
            return word not in self.options
        name = word.partition("=")[0]
        if name in self.options or self._matches(name):
            return False
        return bool(_NEGATIVE.fullmatch(word)) or " " in word

    def _matches(self, name: str) -> list[str]:
        return [one for one in self.options if one.startswith(name)] if name.startswith("--") and name != "--" else []

    def _stray(self, words: Sequence[str]) -> None:
        for word in words:
            self.fault("flags.stray", word, "belongs to no flag", "Quote a value that has spaces, or drop it.")

    def _option(self, word: str, taken: list[str]) -> None:
        """One option and the words after it that could be its values; what it does not take is left over."""
        name, equals, explicit = word.partition("=")
        found = [name] if name in self.options else self._matches(name)
        if not found:
            self._unknown(name, [explicit] if equals else taken)
            return
        if len(found) > 1:
            self.fault("flags.ambiguous", name, f"could be {', '.join(found)}", f"Write out {_nearest(name, found)}.")
            self.unknown[name] = taken[0] if taken else True
            return
        flag = self.options[found[0]]
        words, left = ([explicit], taken) if equals else _split(taken, flag.nargs)
        self._stray(left)
        self._take(name, found[0], flag, words, explicit=bool(equals))

    def _unknown(self, name: str, taken: Sequence[str]) -> None:
        near = difflib.get_close_matches(name, self.options, n=1, cutoff=0.75)
        self.fault("flags.unknown", name, "the program has no such flag",
                   f"Did you mean {near[0]}?" if near else "Drop it.")  # fmt: skip
        self.unknown[name] = taken[0] if taken else True

    def _take(self, given: str, name: str, flag: Flag, words: list[str], *, explicit: bool) -> None:
        wanted = _wanted(flag.nargs, len(words))
        if wanted or (explicit and flag.nargs == 0):
            self.fault("flags.count", given, f"takes {wanted or 'no value'}", f"Give {name} {wanted or 'no value'}.")
            return
        values = [self._value(given, flag, word) for word in words]
        several = flag.nargs in ("+", "*") or (isinstance(flag.nargs, int) and flag.nargs > 1)
        self.values[name] = values if several else values[0] if values else True

    def _value(self, given: str, flag: Flag, word: str) -> Any:  # noqa: ANN401
        try:
            value = _convert(word, flag)
        except ValueError:
            texts = {"int": "a whole number", "float": "a number", "json": "JSON"}
            self.fault("flags.type", given, f"{word!r} is not {texts[flag.kind]}", f"Give it {texts[flag.kind]}.")
            return word
        if flag.choices is not None and value not in flag.choices:
            known = [str(one) for one in flag.choices]
            near = difflib.get_close_matches(word, known, n=1)
            self.fault("flags.choice", given, f"{word!r} is no choice",
                       f"Did you mean {near[0]}?" if near else f"Choose from {', '.join(known)}.")  # fmt: skip
        return value if isinstance(value, str | int | float) else word


def _nearest(name: str, found: Sequence[str]) -> str:
    """Of several options with one prefix, the one that is likely meant: the shortest."""
    return min(found, key=lambda one: (len(one) - len(name), one))


def _split(taken: list[str], nargs: int | str | None) -> tuple[list[str], list[str]]:
    """The values that a flag takes of the words after it, and the rest."""
    count = nargs if isinstance(nargs, int) else len(taken) if nargs in ("+", "*") else 1
    return taken[:count], taken[count:]


def _wanted(nargs: int | str | None, count: int) -> str:
    """How many values a flag takes, in words, where `count` is not right."""
    if nargs is None and count != 1:
        return "one value"
    if nargs == "+" and not count:
        return "one value or more"
    return f"{nargs} values" if isinstance(nargs, int) and nargs and count != nargs else ""


def _convert(word: str, flag: Flag) -> Any:  # noqa: ANN401
    if flag.kind == "int":
        return int(word)
    if flag.kind == "float":
        return float(word)
    return json.loads(word) if flag.kind == "json" else word
