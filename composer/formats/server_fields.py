"""Flags that a class declares as annotated fields, `model_path: A[str, Arg(help="...", aliases=["--model"])]`.

SGLang has done so since 0.5.2x: `add_cli_args_from_dataclass(parser, ServerArgs)` makes a flag of every field, and the
fields may lie in other classes, which `collect_input_fields(LIST)` gathers (sglang/srt/arg_groups/arg_utils.py).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from composer.formats.source_values import Modules, Scope, assigned_names, find_class

#: What makes flags of a class, and what gathers its fields from others.
REGISTER, _COLLECT = "add_cli_args_from_dataclass", "collect_input_fields"
_ANNOTATED: Final = ("A", "Annotated")
#: Types that are told to argparse; all others are read as text.
_TOLD: Final = ("str", "int", "float")


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """A flag as the arguments of an `add_argument` that would make it, and where they stand."""

    names: tuple[str, ...]
    given: Mapping[str, ast.expr]
    scope: Scope
    line: int


def declared_flags(modules: Modules, module: str, name: str) -> Iterator[Declared]:
    """What the fields of a class declare, in the order of the source."""
    for home, owner in _owners(modules, module, name):
        tree = modules.find(home)
        found = find_class(tree, owner) if tree else None
        scope = Scope(modules=modules, module=home, local={})
        for field in found.body if found else ():
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                yield from _declared(field, field.target.id, scope)


def _owners(modules: Modules, module: str, name: str) -> Iterator[tuple[str, str]]:
    """(module, class): the class itself, and those whose fields its module gathers."""
    yield module, name
    tree = modules.tree(module)
    lists = assigned_names(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == _COLLECT:
            for argument in node.args:
                gathered = lists.get(argument.id) if isinstance(argument, ast.Name) else argument
                for one in gathered.elts if isinstance(gathered, ast.List | ast.Tuple) else ():
                    if isinstance(one, ast.Name):
                        yield modules.imports(module).get(one.id, (module, one.id))


def _declared(field: ast.AnnAssign, name: str, scope: Scope) -> Iterator[Declared]:
    kind, said = _annotation(field.annotation)
    if kind is None or said is None or scope.value(said.get("no_cli", _constant(None))) is True:
        return
    first = said.get("cli_name", _constant(f"--{name.replace('_', '-')}"))
    aliases = scope.value(said["aliases"]) if "aliases" in said else None
    texts = [one for one in [scope.value(first), *(aliases if isinstance(aliases, list) else ())]
             if isinstance(one, str)]  # fmt: skip
    if _is_two_way(said.get("action")):  # argparse.BooleanOptionalAction
        texts += [f"--no-{one.removeprefix('--')}" for one in texts if one.startswith("--")]
    yield Declared(names=tuple(texts), given=_arguments(kind, said, has_default=field.value is not None), scope=scope,
                   line=field.lineno)  # fmt: skip


def _annotation(node: ast.expr) -> tuple[ast.expr | None, Mapping[str, ast.expr] | None]:
    """The type of a field, and what its `Arg(...)` says; a text alone is its help. None where it is no flag."""
    if not (isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in _ANNOTATED):
        return None, None
    parts = _subscripted(node)[1]
    for one in parts[1:]:
        if isinstance(one, ast.Constant | ast.JoinedStr | ast.BinOp):
            return parts[0], {}
        if isinstance(one, ast.Call) and isinstance(one.func, ast.Name) and one.func.id == "Arg":
            return parts[0], {word.arg: word.value for word in one.keywords if word.arg}
    return None, None


def _arguments(kind: ast.expr, said: Mapping[str, ast.expr], *, has_default: bool) -> dict[str, ast.expr]:
    """As `add_cli_args_from_dataclass` tells them to argparse."""
    if action := said.get("action"):
        more = said.get("action_kwargs")
        keys = zip(more.keys, more.values, strict=True) if isinstance(more, ast.Dict) else ()
        given = {str(key.value): value for key, value in keys if isinstance(key, ast.Constant)}
        return given | ({"nargs": _constant(0)} if _is_two_way(action) else {"action": action})
    inner = _required(kind)
    outer, parts = _subscripted(inner)
    given = {key: said[key] for key in ("choices", "nargs") if key in said}
    if outer == "Literal" and parts:
        first = parts[0].value if isinstance(parts[0], ast.Constant) else ""
        kinds = ast.Name(id=type(first).__name__)
        return {"choices": said.get("choices", ast.List(elts=parts)), **_typed(said, kinds)}
    if outer in ("List", "list") and "type_parser" not in said:
        return {"nargs": _constant("+"), **given, **_typed(said, parts[0] if parts else None)}
    if isinstance(inner, ast.Name) and inner.id == "bool":
        return {"action": _constant("store_true")}
    # A field without a default must be given, unless it says otherwise.
    required = said.get("required", _constant(not has_default))
    return {**given, **_typed(said, inner), "required": required}


def _typed(said: Mapping[str, ast.expr], kind: ast.expr | None = None) -> dict[str, ast.expr]:
    told = isinstance(kind, ast.Name) and kind.id in _TOLD
    found = said.get("type_parser", kind if told else None)
    return {"type": found} if found else {}


def _required(kind: ast.expr) -> ast.expr:
    """The type in `Optional[X]`, `Union[X, None]` and `X | None`."""
    outer, parts = _subscripted(kind)
    if outer == "Optional" and parts:
        return parts[0]
    if isinstance(kind, ast.BinOp):
        parts = [kind.left, kind.right]
    elif outer != "Union":
        return kind
    others = [one for one in parts if not (isinstance(one, ast.Constant) and one.value is None)]
    return others[0] if len(others) == 1 else kind


def _subscripted(kind: ast.expr) -> tuple[str, list[ast.expr]]:
    """`List[int]` as its name and what is in its brackets."""
    if isinstance(kind, ast.Subscript) and isinstance(kind.value, ast.Name):
        return kind.value.id, kind.slice.elts if isinstance(kind.slice, ast.Tuple) else [kind.slice]
    return "", []


def _is_two_way(action: ast.expr | None) -> bool:
    return isinstance(action, ast.Attribute) and action.attr == "BooleanOptionalAction"


def _constant(value: str | int | None) -> ast.Constant:
    return ast.Constant(value=value)
