"""Judge rules by what is known: each is ok, violated, or unknown where a fact is missing that it turns on.

Pure: a context goes in, verdicts come out. A rule does not apply where a condition of its `when` is false, whatever
else is unknown. Where one is unknown, so is the verdict: what nobody has looked at is never called ok.
"""

from __future__ import annotations

import enum
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from composer.model.rule import NCCL_LEVELS, UNSET, Condition, Rule, RuleBook, Tables, Value

Verdict = Literal["ok", "violated", "unknown"]

_LEADING_VERSION: Final = re.compile(r"\d+(\.\d+)*")
#: So many items of a list are shown.
_SHOWN: Final = 6
# NCCL's documentation of NCCL_P2P_LEVEL: integers are from before NVL, and what is above 4 is SYS.
_OLD_NCCL_LEVELS: Final = ("LOC", "PIX", "PXB", "PHB", "SYS")
# L4T releases that do not run each other's builds: r32, r35, r36 before .4, from .4 on, and r38 with what follows it.
_L4T_LINES: Final = ((32,), (35,), (36,), (36, 4), (38,))


class _Missing(enum.Enum):
    """What a context says of a field that it has no value for."""

    UNSET = "unset"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What is known, by dotted field. None: known to be unset.

    A field that is not in `values` is unset or unknown by its first part (composer.model.rule.UNSET and UNKNOWN), and
    unknown if it or that part is in `unknown`: where nobody said what is launched, its flags are not unset.
    """

    values: Mapping[str, Value | None]
    unknown: frozenset[str] = frozenset()

    def lookup(self, field: str) -> Value | _Missing:
        """The value of a field, or why there is none."""
        if field in self.values:
            value = self.values[field]
            return _Missing.UNSET if value is None else value
        space = field.partition(".")[0]
        return _Missing.UNSET if space in UNSET and not self.unknown & {field, space} else _Missing.UNKNOWN


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The verdict on a rule.

    applies: whether its `when` holds, None if that is unknown. evidence: the conditions that fail, and what is there
    instead. missing: the fields that would have to be known.
    """

    rule: Rule
    verdict: Verdict
    applies: bool | None
    evidence: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def judge(book: RuleBook, context: Context, *, phases: Iterable[str] = ()) -> list[Outcome]:
    """The verdict on every rule, or on those of some phases, in the book's order."""
    chosen = frozenset(phases)
    return [evaluate(rule, context, book.tables) for rule in book.rules if not chosen or rule.phase in chosen]


def evaluate(rule: Rule, context: Context, tables: Tables) -> Outcome:
    """The verdict on one rule."""
    applies = _all(rule.when, context, tables)
    if applies is False:
        return Outcome(rule=rule, verdict="ok", applies=False)
    missing = tuple(field for field in rule.fields if context.lookup(field) is _Missing.UNKNOWN)
    if applies is None:
        return Outcome(rule=rule, verdict="unknown", applies=None, missing=missing)
    holds = _all(rule.must, context, tables)
    if holds is None:
        return Outcome(rule=rule, verdict="unknown", applies=True, missing=missing)
    failing = [one for one in rule.must if _holds(one, context, tables) is False]
    return Outcome(rule=rule, verdict="ok" if holds else "violated", applies=True,
                   evidence=tuple(_evidence(one, context) for one in failing))  # fmt: skip


def _all(conditions: Sequence[Condition], context: Context, tables: Tables) -> bool | None:
    """False if one is false; otherwise None if one is unknown."""
    results = [_holds(one, context, tables) for one in conditions]
    if False in results:
        return False
    return None if None in results else True


def _evidence(condition: Condition, context: Context) -> str:
    # A whole command line says too much, and may hold a key.
    values = [(field, context.lookup(field)) for field in condition.fields if field != "argv"]
    seen = ", ".join(f"{field} is {'not set' if isinstance(value, _Missing) else shown(value)}"
                     for field, value in values) or "it is there"  # fmt: skip
    return f"{seen}; wanted: {condition}"


def shown(value: Value) -> str:
    """A value of a context in words."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        return str(value)
    more = ", ..." if len(value) > _SHOWN else ""
    return f"[{', '.join(map(str, value[:_SHOWN]))}{more}]"


def _holds(condition: Condition, context: Context, tables: Tables) -> bool | None:
    left = context.lookup(condition.field)
    if left is _Missing.UNKNOWN:
        return None
    name = condition.operator
    if left is _Missing.UNSET:
        return name in _TRUE_OF_UNSET
    if name in ("exists", "absent"):
        return name == "exists"
    right = _operand(condition, context, tables)
    if right is _Missing.UNKNOWN:
        return None
    if right is _Missing.UNSET:
        return name == "!=field"
    return _COMPARE[name](left, right)


#: Operators that hold of a field that is not set: it is equal to nothing and contains nothing.
_TRUE_OF_UNSET: Final = frozenset({"absent", "!=", "!=field", "not_in", "not_contains"})


def _operand(condition: Condition, context: Context, tables: Tables) -> Any:  # noqa: ANN401
    """What the field is compared with: the literal, or what another field or a table has."""
    if len(condition.fields) == 1:
        return condition.value
    other = context.lookup(condition.fields[1])
    if isinstance(other, _Missing):
        return other
    if condition.operator == "<=expr":
        number = _number(other)
        return _Missing.UNKNOWN if number is None else number / float(condition.value.rpartition("/")[2])
    if condition.operator == "in_table":
        return tables.tables[condition.value.partition(".")[0]].get(str(other), _Missing.UNKNOWN)
    return other


def _number(value: object) -> float | None:
    if isinstance(value, int | float):
        return float(value)
    try:
        return float(value) if isinstance(value, str) else None
    except ValueError:
        return None


def _version(value: object) -> tuple[int, ...] | None:
    """`570.86.10-1` as (570, 86, 10); zeros at the end say nothing."""
    found = _LEADING_VERSION.match(str(value))
    if not found or isinstance(value, bool | list | tuple):
        return None
    parts = [int(part) for part in found[0].split(".")]
    while parts and not parts[-1]:
        parts.pop()
    return tuple(parts)


def _ordered(compare: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool | None]:
    """Numbers compare as numbers, and two texts as versions; what is neither, nobody knows."""

    def ordered(left: Any, right: Any) -> bool | None:  # noqa: ANN401
        if isinstance(left, str) and isinstance(right, str):
            pair = (_version(left), _version(right))
        else:
            pair = (_number(left), _number(right))  # type: ignore[assignment]
        return None if None in pair else compare(*pair)

    return ordered


def _equal(left: Any, right: Any) -> bool:  # noqa: ANN401
    """As values, or as texts: a variable and a flag that say the same number are equal, and true is only itself."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, list | tuple) or isinstance(right, list | tuple):
        return isinstance(left, list | tuple) and isinstance(right, list | tuple) and [*left] == [*right]
    return bool(left == right) or str(left) == str(right)


def _is_in(left: Any, right: Sequence[Any]) -> bool:  # noqa: ANN401
    return any(_equal(left, one) for one in right)


def _contains(left: Any, right: str) -> bool:  # noqa: ANN401
    return right in left if isinstance(left, str) else isinstance(left, list | tuple) and right in left


def _is_int(left: Any, _: object) -> bool:  # noqa: ANN401
    return isinstance(left, int) and not isinstance(left, bool)


def _power_of_two(left: Any, _: object) -> bool | None:  # noqa: ANN401
    number = _number(left)
    if number is None:
        return None
    return number.is_integer() and number > 0 and int(number) & (int(number) - 1) == 0


def _plus_one(left: Any, right: Any) -> bool | None:  # noqa: ANN401
    pair = (_number(left), _number(right))
    return None if pair[0] is None or pair[1] is None else pair[0] == pair[1] + 1


def _subset(left: Any, right: Any) -> bool | None:  # noqa: ANN401
    several = [left] if isinstance(left, str) else left
    lists = isinstance(several, list | tuple) and isinstance(right, list | tuple)
    return set(several) <= set(right) if lists else None


def _level(value: object) -> int | None:
    text = str(value).upper()
    if text.isdigit():
        text = _OLD_NCCL_LEVELS[min(int(text), len(_OLD_NCCL_LEVELS) - 1)]
    return NCCL_LEVELS.index(text) if text in NCCL_LEVELS else None


def _level_le(left: object, right: object) -> bool | None:
    near, far = _level(left), _level(right)
    return None if near is None or far is None else near <= far


def _l4t_line(value: object) -> int | None:
    version = _version(value)
    return None if version is None else sum(version >= start for start in _L4T_LINES)


def _same_l4t_line(left: object, right: object) -> bool | None:
    lines = (_l4t_line(left), _l4t_line(right))
    return None if None in lines else lines[0] == lines[1]


def _runs_on(left: object, right: object) -> bool | None:
    """Code for SM `left` on a GPU of SM `right`: the major is the same, and the minor no smaller."""
    built, has = _number(left), _number(right)
    return None if built is None or has is None else built // 10 == has // 10 and built <= has


def _major(left: object, right: int) -> bool | None:
    version = _version(left)
    return version[0] == right if version else None


_COMPARE: Final[Mapping[str, Callable[[Any, Any], bool | None]]] = {
    "==": _equal,
    "!=": lambda left, right: not _equal(left, right),
    "==field": _equal,
    "!=field": lambda left, right: not _equal(left, right),
    "==plus1": _plus_one,
    "<": _ordered(operator.lt),
    "<=": _ordered(operator.le),
    ">": _ordered(operator.gt),
    ">=": _ordered(operator.ge),
    "<=field": _ordered(operator.le),
    ">=field": _ordered(operator.ge),
    "<=expr": _ordered(operator.le),
    "in": _is_in,
    "not_in": lambda left, right: not _is_in(left, right),
    "in_table": _is_in,
    "contains": _contains,
    "not_contains": lambda left, right: not _contains(left, right),
    "is_int": _is_int,
    "power_of_two": _power_of_two,
    "len==": lambda left, right: isinstance(left, list | tuple) and len(left) == right,
    "major": _major,
    "subset_of": _subset,
    "level_le": _level_le,
    "same_l4t_line": _same_l4t_line,
    "same_major_le": _runs_on,
}
