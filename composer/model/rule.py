"""Rules about what goes together: targets, hosts, stacks, models, flags and variables. Data, in a small language.

A rule is violated where every condition of `when` holds and not every condition of `must` does. A condition is
`[field, operator, value]`. Fields are dotted (`host.sm`, `flags.--tp`, `env.NCCL_P2P_LEVEL`); what an operator takes
as its value is its kind: a literal, another field, or one of the two below.

`<=expr` takes `FIELD/NUMBER`, and `in_table` takes `TABLE.FIELD`: the list that the table has for the field's value.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final, Literal

from composer.errors import RecipeError
from composer.model._strict import Record, convert
from composer.model.finding import Severity

SCHEMA: Final = 1
Phase = Literal["build", "compose", "select", "install", "host", "launch", "k8s"]
Scalar = str | int | float | bool
Value = Scalar | Sequence[Scalar]

#: A field of these that a context lacks is unset: nobody said anything.
UNSET: Final = ("flags", "env", "build", "k8s", "model", "argv")
#: A field of these that a context lacks is unknown: there is something, and nobody has looked.
UNKNOWN: Final = ("target", "host", "topo", "stack", "cache", "file", "artefact", "sysctl", "manifest", "patch")
#: How far two GPUs may be apart, from near to far, as NCCL calls it.
NCCL_LEVELS: Final = ("LOC", "NVL", "PIX", "PXB", "PHB", "SYS")

#: Operators in the words of a sentence, where they are not what one would write.
_SPOKEN: Final = {
    "exists": "is set", "absent": "is not set", "is_int": "is a whole number", "power_of_two": "is a power of two",
    "not_in": "not in", "not_contains": "does not contain", "==field": "==", "!=field": "!=", "<=field": "<=",
    ">=field": ">=", "==plus1": "== 1 +", "<=expr": "<=", "in_table": "in", "len==": "has this many:",
    "major": "is of major", "subset_of": "all in", "level_le": "not beyond", "same_l4t_line": "of the line of",
    "same_major_le": "runs on",
}  # fmt: skip
_VERSION: Final = re.compile(r"\d+(\.\d+)*")
_ID: Final = re.compile(r"[a-z0-9][a-z0-9.-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One condition: the value of `field` compared by `operator` with `value`, which its operator's kind reads."""

    field: str
    operator: str
    value: Any = None

    @property
    def fields(self) -> tuple[str, ...]:
        """Every field that the condition reads, its own first."""
        kind = OPERATORS[self.operator]
        if kind == "field":
            return (self.field, self.value)
        if kind == "expression":
            return (self.field, self.value.rpartition("/")[0])
        if kind == "table":
            return (self.field, self.value.partition(".")[2])
        return (self.field,)

    def __str__(self) -> str:
        words = _SPOKEN.get(self.operator, self.operator)
        value = ", ".join(map(str, self.value)) if isinstance(self.value, list | tuple) else self.value
        return f"{self.field} {words}" + ("" if value is None else f" {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule, who says so (`reference`, `source`), how it was checked (`verified`), and a context for each verdict.

    bad is a context that violates the rule, and ok one that does not; both are part of the rule, and tested.
    """

    id: str
    severity: Severity
    phase: Phase
    when: tuple[Condition, ...]
    must: tuple[Condition, ...]
    message: str
    fix: str
    reference: str | None
    source: tuple[str, ...]
    verified: str
    bad: Mapping[str, Value]
    ok: Mapping[str, Value]

    @property
    def fields(self) -> tuple[str, ...]:
        """Every field that the rule reads, in the order of its conditions."""
        return tuple(dict.fromkeys(field for one in (*self.when, *self.must) for field in one.fields))


class ModelName(Record, frozen=True, kw_only=True):
    """What a model's name tells: `name` is a glob over it, or over the last folder of its path."""

    name: str
    family: str | None = None
    quant: str | None = None
    quant_method: str | None = None
    gated: bool | None = None
    multimodal: bool | None = None

    def facts(self) -> dict[str, Value]:
        """The fields below `model` that it gives."""
        given = {"model.family": self.family, "model.quant": self.quant, "model.quant_method": self.quant_method,
                 "model.gated": self.gated, "model.multimodal": self.multimodal}  # fmt: skip
        return {field: value for field, value in given.items() if value is not None}


class Tables(Record, frozen=True, kw_only=True):
    """What rules look up: tables of `in_table`, spellings of flags, owners of variables, and names of models."""

    schema: int
    tables: Mapping[str, Mapping[str, tuple[str, ...]]] = {}
    spellings: Mapping[str, tuple[str, ...]] = {}
    owners: Mapping[str, str] = {}
    model: tuple[ModelName, ...] = ()

    def model_facts(self, name: str) -> dict[str, Value]:
        """What is known of a model by its name alone."""
        found: dict[str, Value] = {"model.id": name}
        for one in self.model:
            if fnmatchcase(name.lower(), one.name.lower()):
                found |= one.facts()
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleBook:
    """All rules, in the order of their phases and files, and what they look up."""

    rules: tuple[Rule, ...]
    tables: Tables


class _RuleRecord(Record, frozen=True, kw_only=True):
    id: str
    severity: Severity
    when: tuple[tuple[Any, ...], ...]
    must: tuple[tuple[Any, ...], ...]
    message: str
    fix: str
    source: tuple[str, ...]
    verified: str
    bad: Mapping[str, Any]
    ok: Mapping[str, Any]
    reference: str | None = None


class _RuleFile(Record, frozen=True, kw_only=True):
    schema: int
    phase: Phase
    rule: tuple[_RuleRecord, ...]


def parse_tables(data: Mapping[str, Any], where: str) -> Tables:
    """The tables from TOML data; RecipeError with the path of what is wrong."""
    tables = convert(data, Tables, where)
    if tables.schema != SCHEMA:
        raise _schema_fault(tables.schema, where)
    return tables


def parse_rules(files: Mapping[str, Mapping[str, Any]], tables: Tables) -> RuleBook:
    """All rules from the TOML data of their files, by file name.

    RecipeError lists every fault with the file, the rule and the field: `launch.toml: rule[3] (no-fa3).must[0]`.
    """
    faults: list[RecipeError] = []
    rules: dict[str, Rule] = {}
    for name, data in files.items():
        parsed = convert(data, _RuleFile, name)
        if parsed.schema != SCHEMA:
            faults.append(_schema_fault(parsed.schema, name))
        for index, record in enumerate(parsed.rule):
            where = f"{name}: rule[{index}] ({record.id})"
            faults += _rule_faults(record, where, tables)
            if record.id in rules:
                faults.append(RecipeError("this id is taken", where=f"{where}.id", fix="Give each rule its own."))
            rules[record.id] = _rule(record, parsed.phase)
    RecipeError.collect(faults)
    return RuleBook(rules=tuple(rules.values()), tables=tables)


def field_fault(field: object) -> str | None:
    """What is wrong with the name of a field, or None."""
    if not isinstance(field, str):
        return f"a field is a text, not {field!r}"
    if field == "argv":
        return None
    space, _, rest = field.partition(".")
    known = [one for one in (*UNSET, *UNKNOWN) if one != "argv"]
    if space not in known:
        near = difflib.get_close_matches(space, known, n=1)
        return f"unknown field {field!r}: " + (f"did you mean {near[0]}.?" if near else f"known: {', '.join(known)}")
    return None if rest else f"{field!r} names no field of {space}"


def _schema_fault(schema: int, where: str) -> RecipeError:
    return RecipeError(f"schema {schema} is not {SCHEMA}", where=f"{where}: schema",
                       fix="Use the version of compose that this file was written for.")  # fmt: skip


def _rule(record: _RuleRecord, phase: Phase) -> Rule:
    return Rule(
        id=record.id, severity=record.severity, phase=phase, message=record.message, fix=record.fix,
        when=tuple(map(_condition, record.when)), must=tuple(map(_condition, record.must)),
        reference=record.reference, source=record.source, verified=record.verified,
        bad=dict(record.bad), ok=dict(record.ok),
    )  # fmt: skip


def _condition(row: tuple[Any, ...]) -> Condition:
    field, operator, value = (*row, None, None, None)[:3]
    return Condition(field=field, operator=operator, value=value)


def _rule_faults(record: _RuleRecord, where: str, tables: Tables) -> Iterator[RecipeError]:
    if not _ID.fullmatch(record.id):
        yield RecipeError(f"{record.id!r} is no id", where=f"{where}.id", fix="Use a-z, 0-9, hyphens and full stops.")
    for name, text in (("message", record.message), ("fix", record.fix), ("verified", record.verified)):
        if not text.strip():
            yield RecipeError("is empty", where=f"{where}.{name}")
    for name, rows in (("when", record.when), ("must", record.must)):
        if not rows:
            yield RecipeError("has no condition", where=f"{where}.{name}", fix="Give at least one.")
        for index, row in enumerate(rows):
            if fault := _condition_fault(row, tables):
                yield RecipeError(fault, where=f"{where}.{name}[{index}]")
    yield from _example_faults(record.bad, f"{where}.bad")
    yield from _example_faults(record.ok, f"{where}.ok")


def _example_faults(context: Mapping[str, Any], where: str) -> Iterator[RecipeError]:
    for field, value in context.items():
        fault = field_fault(field) or (None if is_value(value) else f"{value!r} is neither a scalar nor a list of them")
        if fault:
            yield RecipeError(fault, where=f"{where}.{field}")


def is_value(value: object) -> bool:
    """Whether a context can hold `value`: a scalar, or a list of scalars."""
    if isinstance(value, list | tuple):
        return all(isinstance(one, str | int | float) for one in value)
    return isinstance(value, str | int | float)


def _condition_fault(row: tuple[Any, ...], tables: Tables) -> str | None:
    if len(row) not in (2, 3):
        return "a condition is [field, operator] or [field, operator, value]"
    field, operator, *values = row
    fault = field_fault(field)
    if fault:
        return fault
    if not isinstance(operator, str) or operator not in OPERATORS:
        near = difflib.get_close_matches(str(operator), OPERATORS, n=1)
        return f"unknown operator {operator!r}" + (f": did you mean {near[0]!r}?" if near else "")
    kind = OPERATORS[operator]
    if (kind == "none") != (not values):
        return f"{operator!r} takes {'no value' if kind == 'none' else 'a value'}"
    return _KINDS[kind](values[0], tables) if values else None


def _literal_fault(value: object, _: Tables) -> str | None:
    return None if is_value(value) else f"{value!r} is neither a scalar nor a list of scalars"


def _ordered_fault(value: object, _: Tables) -> str | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    version = isinstance(value, str) and _VERSION.fullmatch(value)
    return None if number or version else f"{value!r} is neither a number nor a version"


def _text_fault(value: object, _: Tables) -> str | None:
    return None if isinstance(value, str) and value else f"{value!r} is no text"


def _list_fault(value: object, _: Tables) -> str | None:
    return None if isinstance(value, list | tuple) and value and is_value(value) else f"{value!r} is no list of scalars"


def _count_fault(value: object, _: Tables) -> str | None:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return None if whole else f"{value!r} is no whole number"


def _field_fault(value: object, _: Tables) -> str | None:
    return field_fault(value)


def _expression_fault(value: object, _: Tables) -> str | None:
    field, slash, number = value.rpartition("/") if isinstance(value, str) else ("", "", "")
    if not slash or not _VERSION.fullmatch(number) or not float(number):
        return f"{value!r} is not FIELD/NUMBER"
    return field_fault(field)


def _table_fault(value: object, tables: Tables) -> str | None:
    table, dot, field = value.partition(".") if isinstance(value, str) else ("", "", "")
    if not dot:
        return f"{value!r} is not TABLE.FIELD"
    if table not in tables.tables:
        return f"no table {table!r}: known are {', '.join(tables.tables) or 'none'}"
    return field_fault(field)


_KINDS: Final[Mapping[str, Callable[[object, Tables], str | None]]] = {
    "literal": _literal_fault,
    "ordered": _ordered_fault,
    "text": _text_fault,
    "list": _list_fault,
    "count": _count_fault,
    "field": _field_fault,
    "expression": _expression_fault,
    "table": _table_fault,
}
#: The kind of value of every operator.
OPERATORS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("exists", "absent", "is_int", "power_of_two"), "none"),
    **dict.fromkeys(("==", "!="), "literal"),
    **dict.fromkeys(("<", "<=", ">", ">="), "ordered"),
    **dict.fromkeys(("in", "not_in"), "list"),
    **dict.fromkeys(("contains", "not_contains"), "text"),
    **dict.fromkeys(("len==", "major"), "count"),
    **dict.fromkeys(
        ("==field", "!=field", "<=field", ">=field", "==plus1", "subset_of", "level_le", "same_l4t_line",
         "same_major_le"), "field",
    ),
    "<=expr": "expression",
    "in_table": "table",
}  # fmt: skip
