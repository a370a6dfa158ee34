"""Which modules to compile: a named set of modules.toml, and what the settings of a build change in it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

_FILE = Path(__file__).parents[2] / "modules.toml"
_PARTS = ("comm", "gemma", "oai_oss", "moe", "act", "misc", "xqa")
# An element that each list may hold; where it may be empty the second is true.
_KINDS: Mapping[str, tuple[type | tuple[type, type], bool]] = {
    "f16": (str, False), "f8": (str, True), "fa2_head_dims": ((int, int), True), "fa3_head_dims": ((int, int), True),
    "sliding_window": (bool, False), "logits_soft_cap": (bool, False), "parts": (str, True), "only": (str, True),
    "exclude": (str, True),
}  # fmt: skip
_NAMES: Mapping[str, tuple[str, ...]] = {
    "f16": ("float16", "bfloat16"), "f8": ("float8_e4m3fn", "float8_e5m2"), "parts": _PARTS,
}  # fmt: skip


class SelectionError(ValueError):
    """A setting that cannot be meant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """See modules.toml."""

    f16: tuple[str, ...]
    f8: tuple[str, ...]
    fa2_head_dims: tuple[tuple[int, int], ...]
    fa3_head_dims: tuple[tuple[int, int], ...]
    sliding_window: tuple[bool, ...]
    logits_soft_cap: tuple[bool, ...]
    parts: tuple[str, ...]
    only: tuple[str, ...]
    exclude: tuple[str, ...]

    def has(self, module: str) -> bool:
        """Whether the patterns let a module through."""
        wanted = not self.only or any(fnmatchcase(module, pattern) for pattern in self.only)
        return wanted and not any(fnmatchcase(module, pattern) for pattern in self.exclude)

    def switches(self) -> dict[str, bool]:
        """The parts as upstream's generator takes them."""
        return {f"add_{part}": part in self.parts for part in _PARTS}


KEYS = tuple(one.name.replace("_", "-") for one in fields(Selection))


def select(settings: Mapping[str, str]) -> Selection:
    """The set that `settings["set"]` names, with the keys of modules.toml that it has, too, as TOML values."""
    sets: dict[str, dict[str, Any]] = tomllib.loads(_FILE.read_text("utf-8"))
    name = settings.get("set", "full")
    if name not in sets:
        raise SelectionError(f"set: there is no {name!r}, only {', '.join(sets)}")
    values = {**sets[name], **{key: _parsed(key, settings[key]) for key in KEYS if key in settings}}
    if unknown := sorted(values.keys() ^ set(KEYS)):
        raise SelectionError(f"{name}: unknown or missing: {', '.join(unknown)}")
    return Selection(**{key.replace("-", "_"): _checked(key, value) for key, value in values.items()})


def _parsed(key: str, text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as fault:
        raise SelectionError(f"{key}: {text!r} is not a value of TOML: {fault}") from fault


def _checked(key: str, value: object) -> tuple[Any, ...]:
    field = key.replace("-", "_")
    kind, may_be_empty = _KINDS[field]
    if not isinstance(value, list) or not all(_is(one, kind) for one in value) or not (value or may_be_empty):
        raise SelectionError(f"{key}: {value!r} is not {'a list' if may_be_empty else 'a list of at least one'} of "
                             f"{'pairs of numbers' if isinstance(kind, tuple) else kind.__name__}")  # fmt: skip
    if wrong := [one for one in value if one not in _NAMES.get(field, value)]:
        raise SelectionError(f"{key}: {wrong[0]!r} is none of {', '.join(_NAMES[field])}")
    return tuple(tuple(one) if isinstance(one, list) else one for one in value)


def _is(value: object, kind: type | tuple[type, type]) -> bool:
    if isinstance(kind, tuple):
        return isinstance(value, list) and len(value) == 2 and all(type(one) is int and one > 0 for one in value)
    return type(value) is kind
