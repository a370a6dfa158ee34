"""Turn plain TOML data into typed values, and every fault into an error with its dotted path."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, get_args, get_type_hints

import msgspec

from composer.errors import RecipeError

T = TypeVar("T")


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """A table of a recipe: fields are spelled with hyphens in the file, and no other key is allowed."""


def convert(data: Mapping[str, Any], into: type[T], where: str) -> T:
    """`data` as an `into`; RecipeError lists every unknown key, and names the path of the first wrong value."""
    unknown = [
        RecipeError(
            f"unknown key {path!r}", where=where,
            fix=f"Did you mean {near!r}?" if near else f"Known keys here: {', '.join(known)}.",
        )
        for path, near, known in _unknown_keys(data, into, "")
    ]  # fmt: skip
    RecipeError.collect(unknown)
    try:
        return msgspec.convert(data, into)
    except msgspec.ValidationError as fault:
        what, _, path = str(fault).partition(" - at ")
        raise RecipeError(what[0].lower() + what[1:], where=f"{where}: {_dotted(path) or 'top level'}") from fault


def _dotted(path: str) -> str:
    """`$.component[0].version` in quotes or not, as `component[0].version`."""
    return re.sub(r"^\$\.?", "", path.strip("`"))


def _unknown_keys(data: Any, kind: Any, path: str) -> Iterator[tuple[str, str | None, list[str]]]:  # noqa: ANN401
    struct = _struct_in(kind)
    if struct is None:
        return
    if isinstance(data, list | tuple):
        for index, item in enumerate(data):
            yield from _unknown_keys(item, struct, f"{path}[{index}]")
        return
    if not isinstance(data, Mapping):
        return
    if _is_table_of(kind):
        for key, item in data.items():
            yield from _unknown_keys(item, struct, f"{path}.{key}" if path else key)
        return
    fields = {field.encode_name: field.name for field in msgspec.structs.fields(struct)}
    hints = get_type_hints(struct)
    for key, item in data.items():
        inner = f"{path}.{key}" if path else str(key)
        if key in fields:
            yield from _unknown_keys(item, hints[fields[key]], inner)
        else:
            near = difflib.get_close_matches(str(key), fields, n=1)
            yield inner, near[0] if near else None, sorted(fields)


def _is_table_of(kind: Any) -> bool:  # noqa: ANN401
    return any(origin in str(kind) for origin in ("Mapping[", "dict["))


def _struct_in(kind: Any) -> type[msgspec.Struct] | None:  # noqa: ANN401
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return kind
    return next((found for arg in get_args(kind) if (found := _struct_in(arg))), None)
