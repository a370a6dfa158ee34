"""Read a program's command line and variables out of its Python source, without running it.

A program such as `sglang.launch_server` builds its parser in static methods (`ServerArgs.add_cli_args(parser)`), one
`add_argument` per flag. Importing it to ask needs a GPU's driver and ten seconds; reading takes none. What an
`add_argument` says with literals, module constants, keys of a class's dictionary or names imported from the same
program is understood. What it says otherwise is left open (`choices=None` with `open_choices`), and never judged.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from composer.errors import VerifyError

#: Gives the source of a module by its dotted name, or None where the program has no such module.
Source = Callable[[str], str | None]
Kind = Literal["str", "int", "float", "json", "open"]

_DEPTH: Final = 20
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
    """Every flag of the program that `python -m module` runs, in the order of its parser.

    VerifyError where the module is missing, is no Python that this interpreter parses, or builds no parser this way.
    """
    modules = _Modules(source)
    classes = list(_parser_classes(modules.tree(module), module, modules))
    if not classes:
        raise VerifyError("builds no command line that can be read", where=module,
                          fix="Use a version of compose that knows this release.")  # fmt: skip
    return tuple(flag for home, name in classes for flag in _class_flags(modules, home, name))


def read_variables(text: str, where: str) -> tuple[Variable, ...]:
    """The variables that classes of a module declare as `NAME = EnvType(default)`; VerifyError for no Python."""
    found = []
    for node in _parse(text, where).body:
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


def _parse(text: str, where: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError) as fault:
        raise VerifyError("is no Python source that can be read here", where=where, why=str(fault),
                          fix="Run compose with the bundle's version of Python, or newer.") from fault  # fmt: skip


@dataclass(slots=True)
class _Modules:
    """The parsed modules of a program."""

    source: Source
    _trees: dict[str, ast.Module] = field(default_factory=dict)
    _imports: dict[str, dict[str, tuple[str, str]]] = field(default_factory=dict)

    def tree(self, name: str) -> ast.Module:
        """A module that must be there."""
        found = self.find(name)
        if found is None:
            raise VerifyError("is not in the bundle", where=name, fix="Give a bundle that holds this program.")
        return found

    def find(self, name: str) -> ast.Module | None:
        """A module, if the program has it."""
        if name not in self._trees:
            text = self.source(name)
            if text is None:
                return None
            self._trees[name] = _parse(text, name)
        return self._trees[name]

    def imports(self, name: str) -> dict[str, tuple[str, str]]:
        """What a module imports from others: its name here, and the module and the name there."""
        if name not in self._imports:
            self._imports[name] = _imports(self.tree(name), name)
        return self._imports[name]


def _parser_classes(tree: ast.Module, module: str, modules: _Modules) -> Iterator[tuple[str, str]]:
    """(module, class) of every `CLASS.add_cli_args(...)` in a module; else in the functions it imports and calls."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found = [
        node.func.value.id for node in calls
        if isinstance(node.func, ast.Attribute) and node.func.attr == "add_cli_args"
        and isinstance(node.func.value, ast.Name)
    ]  # fmt: skip
    for name in dict.fromkeys(found):
        yield (module, name) if _class(tree, name) else modules.imports(module).get(name, (module, name))
    if not found:
        called = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
        for home in dict.fromkeys(home for name, (home, _) in modules.imports(module).items() if name in called):
            other = modules.find(home)
            if other is not None and _makes_parser(other):
                yield from _parser_classes(other, home, modules)


def _makes_parser(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.Attribute) and node.attr == "add_cli_args" for node in ast.walk(tree))


def _imports(tree: ast.Module, module: str) -> dict[str, tuple[str, str]]:
    """name here: (module, name there)."""
    found: dict[str, tuple[str, str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            home = ".".join([*base, node.module] if node.module else base)
            found |= {alias.asname or alias.name: (home, alias.name) for alias in node.names}
    return found


def _class(tree: ast.Module, name: str) -> ast.ClassDef | None:
    return next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)


def _class_flags(modules: _Modules, module: str, name: str) -> Iterator[Flag]:
    found = _class(modules.tree(module), name)
    methods = [node for node in found.body if isinstance(node, ast.FunctionDef)] if found else []
    method = next((node for node in methods if node.name == "add_cli_args"), None)
    if method is None:
        raise VerifyError(f"has no {name}.add_cli_args", where=module,
                          fix="Use a version of compose that knows this release.")  # fmt: skip
    scope = _Scope(modules=modules, module=module, local=_assigned(method.body))
    calls = [node for node in ast.walk(method) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda node: (node.lineno, node.col_offset)):
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
            names = tuple(one.value for one in call.args if isinstance(one, ast.Constant))
            yield _flag(names, {one.arg: one.value for one in call.keywords if one.arg}, scope, call.lineno)


def _flag(names: tuple[Any, ...], given: Mapping[str, ast.expr], scope: _Scope, line: int) -> Flag:
    choices = scope.value(given["choices"]) if "choices" in given else None
    return Flag(
        names=tuple(map(str, names)), kind=_kind(given.get("type")), nargs=_nargs(given, scope),
        choices=None if choices is None or choices is _OPEN else tuple(choices), open_choices=choices is _OPEN,
        required="required" in given and scope.value(given["required"]) is True, line=line,
    )  # fmt: skip


def _kind(node: ast.expr | None) -> Kind:
    if node is None:
        return "str"
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return _KINDS.get(name, "open")


def _nargs(given: Mapping[str, ast.expr], scope: _Scope) -> int | str | None:
    """As given; 0 for a switch, and the default of an action that is a class with one."""
    if "nargs" in given:
        value = scope.value(given["nargs"])
        return value if isinstance(value, int | str) else None
    action = given.get("action")
    if isinstance(action, ast.Constant):
        return None if action.value in ("store", "append", "extend") else 0
    found = _class(scope.modules.tree(scope.module), action.id) if isinstance(action, ast.Name) else None
    return _default_nargs(found) if found else None


def _default_nargs(action: ast.ClassDef) -> int | None:
    for method in action.body:
        if isinstance(method, ast.FunctionDef) and method.name == "__init__":
            names, defaults = method.args.args, method.args.defaults
            for name, default in zip(names[len(names) - len(defaults) :], defaults, strict=True):
                if name.arg == "nargs" and isinstance(default, ast.Constant) and isinstance(default.value, int):
                    return default.value
    return None


#: What the source does not say with literals.
_OPEN: Final = object()


def _assigned(body: list[ast.stmt]) -> dict[str, ast.expr]:
    """name: the last expression that is assigned to it in a block."""
    found: dict[str, ast.expr] = {}
    for node in body:
        if isinstance(node, ast.Assign):
            found |= {target.id: node.value for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            found[node.target.id] = node.value
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scope:
    """Where an expression stands: what its names mean."""

    modules: _Modules
    module: str
    local: Mapping[str, ast.expr]
    depth: int = 0

    def value(self, node: ast.expr) -> Any:  # noqa: ANN401
        """The value of an expression; `_OPEN` where it is not literal. A dictionary is its keys."""
        if self.depth > _DEPTH:
            return _OPEN
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.List | ast.Tuple | ast.Set):
            return self._items(node.elts)
        if isinstance(node, ast.Dict):
            return self._items([key for key in node.keys if key])
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return _joined(self.value(node.left), self.value(node.right))
        if isinstance(node, ast.Call):
            return self._call(node)
        return self._named(node)

    def _items(self, nodes: list[ast.expr]) -> Any:  # noqa: ANN401
        found: Any = []
        for node in nodes:
            inner = self.value(node.value) if isinstance(node, ast.Starred) else [self.value(node)]
            found = _joined(found, inner)
        return found

    def _call(self, node: ast.Call) -> Any:  # noqa: ANN401
        if isinstance(node.func, ast.Attribute) and node.func.attr == "keys" and not node.args:
            return self.value(node.func.value)
        plain = isinstance(node.func, ast.Name) and node.func.id in ("list", "tuple", "set", "sorted")
        return self.value(node.args[0]) if plain and len(node.args) == 1 else _OPEN

    def _named(self, node: ast.expr) -> Any:  # noqa: ANN401
        if isinstance(node, ast.Name):
            return self._name(node.id)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            return self._member(node.value.id, node.attr)
        return _OPEN

    def _name(self, name: str) -> Any:  # noqa: ANN401
        tree = self.modules.find(self.module)
        if name in self.local:
            return self._deeper(self.module, {}).value(self.local[name])
        if tree is None:
            return _OPEN
        assigned = _assigned(tree.body)
        if name in assigned:
            return self._deeper(self.module, {}).value(assigned[name])
        home, there = self.modules.imports(self.module).get(name, (None, ""))
        return self._deeper(home, {})._name(there) if home else _OPEN

    def _member(self, owner: str, name: str) -> Any:  # noqa: ANN401
        tree = self.modules.find(self.module)
        if tree is None or self.depth > _DEPTH:
            return _OPEN
        found = _class(tree, owner)
        if found:
            assigned = _assigned(found.body)
            return self._deeper(self.module, assigned).value(assigned[name]) if name in assigned else _OPEN
        home, there = self.modules.imports(self.module).get(owner, (None, ""))
        return self._deeper(home, {})._member(there, name) if home else _OPEN

    def _deeper(self, module: str, local: Mapping[str, ast.expr]) -> _Scope:
        return _Scope(modules=self.modules, module=module, local=local, depth=self.depth + 1)


def _joined(left: Any, right: Any) -> Any:  # noqa: ANN401
    """Two lists as one, unless something in them is open."""
    if not isinstance(left, list) or not isinstance(right, list) or _OPEN in left or _OPEN in right:
        return _OPEN
    return [*left, *right]
