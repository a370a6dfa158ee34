"""Read a program's command line and variables out of its Python source, without running it.

A program such as `sglang.launch_server` builds its parser in static methods (`ServerArgs.add_cli_args(parser)`), one
`add_argument` per flag, or declares flags as fields of a class (`server_fields`). Importing it to ask needs a GPU's
driver and ten seconds; reading takes none. What is said there with literals, module constants, keys of a class's
dictionary or names imported from the same program is understood. What is said otherwise is left open (`choices=None`
with `open_choices`), and never judged.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from composer.errors import VerifyError
from composer.formats.server_fields import REGISTER, declared_flags
from composer.formats.source_values import Modules, Scope, Source, assigned_names, find_class, parse

Kind = Literal["str", "int", "float", "json", "open"]

_KINDS: Final[Mapping[str, Kind]] = {
    "str": "str", "nullable_str": "str", "int": "int", "float": "float", "loads": "json", "json_list_type": "json",
}  # fmt: skip
_QUOTED: Final = re.compile(rb"""(["'])([A-Z][A-Z0-9_]{2,})\1""")


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One `add_argument`.

    names: its spellings. kind: what its values are read as; `open` where the source does not tell. nargs as argparse's,
    0 for a switch. choices: the values it takes, None for any; open_choices: there are some that are not literal.
    line: of the source.
    """

    names: tuple[str, ...]
    kind: Kind = "str"
    nargs: int | str | None = None
    choices: tuple[Any, ...] | None = None
    open_choices: bool = False
    required: bool = False
    line: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """A variable that a class of typed variables declares: `EnvBool(False)` has the type Bool and the default False."""

    name: str
    type: str
    default: str


def read_flags(source: Source, module: str) -> tuple[Flag, ...]:
    """Every flag of the program that `python -m module` runs whose name can be read, in the order of its parser.

    VerifyError where the module is missing, is no Python that this interpreter parses, or builds no parser this way.
    """
    modules = Modules(source)
    classes = list(_parser_classes(modules.tree(module), module, modules))
    if not classes:
        raise VerifyError("builds no command line that can be read", where=module,
                          fix="Use a version of compose that knows this release.")  # fmt: skip
    return tuple(flag for home, name in classes for flag in _class_flags(modules, home, name) if flag.names)


def read_variables(text: str, where: str) -> tuple[Variable, ...]:
    """The variables that classes of a module declare as `NAME = EnvType(default)`; VerifyError for no Python."""
    found = []
    for node in parse(text, where).body:
        for one in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(one, ast.Assign) and isinstance(one.value, ast.Call) and isinstance(one.value.func, ast.Name):
                kind, arguments = one.value.func.id, one.value.args
                if kind.startswith("Env") and isinstance(one.targets[0], ast.Name) and arguments:
                    found.append(Variable(name=one.targets[0].id, type=kind.removeprefix("Env"),
                                          default=ast.unparse(arguments[0])))  # fmt: skip
    return tuple(found)


def quoted_names(content: bytes) -> set[str]:
    """Every quoted text of a source that could be a variable's name. Reading one always quotes it."""
    return {found[2].decode() for found in _QUOTED.finditer(content)}


def _parser_classes(tree: ast.Module, module: str, modules: Modules) -> Iterator[tuple[str, str]]:
    """(module, class) of every `CLASS.add_cli_args(...)` in a module; else in the functions it imports and calls."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found = [
        node.func.value.id for node in calls
        if isinstance(node.func, ast.Attribute) and node.func.attr == "add_cli_args"
        and isinstance(node.func.value, ast.Name)
    ]  # fmt: skip
    for name in dict.fromkeys(found):
        yield (module, name) if find_class(tree, name) else modules.imports(module).get(name, (module, name))
    if not found:
        called = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
        for home in dict.fromkeys(home for name, (home, _) in modules.imports(module).items() if name in called):
            other = modules.find(home)
            if other is not None and _makes_parser(other):
                yield from _parser_classes(other, home, modules)


def _makes_parser(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.Attribute) and node.attr == "add_cli_args" for node in ast.walk(tree))


def _class_flags(modules: Modules, module: str, name: str) -> Iterator[Flag]:
    found = find_class(modules.tree(module), name)
    methods = [node for node in found.body if isinstance(node, ast.FunctionDef)] if found else []
    method = next((node for node in methods if node.name == "add_cli_args"), None)
    if method is None:
        raise VerifyError(f"has no {name}.add_cli_args", where=module,
                          fix="Use a version of compose that knows this release.")  # fmt: skip
    scope = Scope(modules=modules, module=module, local=assigned_names(method.body))
    calls = [node for node in ast.walk(method) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda node: (node.lineno, node.col_offset)):
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
            names = tuple(one.value for one in call.args if isinstance(one, ast.Constant))
            yield _flag(names, {one.arg: one.value for one in call.keywords if one.arg}, scope, call.lineno)
        elif isinstance(call.func, ast.Name) and call.func.id == REGISTER:
            for one in declared_flags(modules, module, name):
                yield _flag(one.names, one.given, one.scope, one.line)


def _flag(names: tuple[Any, ...], given: Mapping[str, ast.expr], scope: Scope, line: int) -> Flag:
    choices = scope.value(given["choices"]) if "choices" in given else None
    return Flag(
        names=tuple(map(str, names)), kind=_kind(given.get("type")), nargs=_nargs(given, scope),
        choices=tuple(choices) if isinstance(choices, list) else None,
        open_choices=not isinstance(choices, list | None),
        required="required" in given and scope.value(given["required"]) is True, line=line,
    )  # fmt: skip


def _kind(node: ast.expr | None) -> Kind:
    if node is None:
        return "str"
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return _KINDS.get(name, "open")


def _nargs(given: Mapping[str, ast.expr], scope: Scope) -> int | str | None:
    """As given; 0 for a switch, and the default of an action that is a class with one."""
    if "nargs" in given:
        value = scope.value(given["nargs"])
        return value if isinstance(value, int | str) else None
    action = given.get("action")
    if isinstance(action, ast.Constant):
        return None if action.value in ("store", "append", "extend") else 0
    found = _action(action.id, scope) if isinstance(action, ast.Name) else None
    return _default_nargs(found) if found else None


def _action(name: str, scope: Scope) -> ast.ClassDef | None:
    """The class of an action, of the module itself or of one that it imports from."""
    own = find_class(scope.modules.tree(scope.module), name)
    home, there = scope.modules.imports(scope.module).get(name, ("", ""))
    tree = scope.modules.find(home) if home else None
    return own or (find_class(tree, there) if tree else None)


def _default_nargs(action: ast.ClassDef) -> int | None:
    for method in action.body:
        if isinstance(method, ast.FunctionDef) and method.name == "__init__":
            names, defaults = method.args.args, method.args.defaults
            for name, default in zip(names[len(names) - len(defaults) :], defaults, strict=True):
                if name.arg == "nargs" and isinstance(default, ast.Constant) and isinstance(default.value, int):
                    return default.value
    return None
