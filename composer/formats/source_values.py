"""Modules of a program as syntax trees, and what their expressions mean as far as literals tell.

Nothing is imported or run.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from composer.errors import VerifyError

#: Gives the source of a module by its dotted name, or None where the program has no such module.
Source = Callable[[str], str | None]

_DEPTH: Final = 20


def parse(text: str, where: str) -> ast.Module:
    """The syntax tree of a module; VerifyError for what is no Python that this interpreter parses."""
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as fault:  # the last: nested too deeply
        raise VerifyError("is no Python source that can be read here", where=where, why=str(fault),
                          fix="Run compose with the bundle's version of Python, or newer.") from fault  # fmt: skip


@dataclass(slots=True)
class Modules:
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
            self._trees[name] = parse(text, name)
        return self._trees[name]

    def imports(self, name: str) -> dict[str, tuple[str, str]]:
        """What a module imports from others: its name here, and the module and the name there."""
        if name not in self._imports:
            self._imports[name] = _imports(self.tree(name), name)
        return self._imports[name]


def _imports(tree: ast.Module, module: str) -> dict[str, tuple[str, str]]:
    """name here: (module, name there)."""
    found: dict[str, tuple[str, str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            home = ".".join([*base, node.module] if node.module else base)
            found |= {alias.asname or alias.name: (home, alias.name) for alias in node.names}
    return found


def find_class(tree: ast.Module, name: str) -> ast.ClassDef | None:
    """A class of the module itself, if it has it."""
    return next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)


#: What the source does not say with literals.
OPEN: Final = object()


def assigned_names(body: list[ast.stmt]) -> dict[str, ast.expr]:
    """name: the last expression that is assigned to it in a block."""
    found: dict[str, ast.expr] = {}
    for node in body:
        if isinstance(node, ast.Assign):
            found |= {target.id: node.value for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            found[node.target.id] = node.value
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """Where an expression stands: what its names mean."""

    modules: Modules
    module: str
    local: Mapping[str, ast.expr]
    depth: int = 0

    def value(self, node: ast.expr) -> Any:  # noqa: ANN401
        """The value of an expression; `OPEN` where it is not literal. A dictionary is its keys."""
        if self.depth > _DEPTH:
            return OPEN
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
        return self.value(node.args[0]) if plain and len(node.args) == 1 else OPEN

    def _named(self, node: ast.expr) -> Any:  # noqa: ANN401
        if isinstance(node, ast.Name):
            return self._name(node.id)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            return self._member(node.value.id, node.attr)
        return OPEN

    def _name(self, name: str) -> Any:  # noqa: ANN401
        tree = self.modules.find(self.module)
        if name in self.local:
            return self._deeper(self.module, {}).value(self.local[name])
        if tree is None or self.depth > _DEPTH:
            return OPEN
        assigned = assigned_names(tree.body)
        if name in assigned:
            return self._deeper(self.module, {}).value(assigned[name])
        home, there = self.modules.imports(self.module).get(name, (None, ""))
        return self._deeper(home, {})._name(there) if home else OPEN

    def _member(self, owner: str, name: str) -> Any:  # noqa: ANN401
        tree = self.modules.find(self.module)
        if tree is None or self.depth > _DEPTH:
            return OPEN
        found = find_class(tree, owner)
        if found:
            assigned = assigned_names(found.body)
            return self._deeper(self.module, assigned).value(assigned[name]) if name in assigned else OPEN
        home, there = self.modules.imports(self.module).get(owner, (None, ""))
        return self._deeper(home, {})._member(there, name) if home else OPEN

    def _deeper(self, module: str, local: Mapping[str, ast.expr]) -> Scope:
        return Scope(modules=self.modules, module=module, local=local, depth=self.depth + 1)


def _joined(left: Any, right: Any) -> Any:  # noqa: ANN401
    """Two lists as one, unless something in them is open."""
    if not isinstance(left, list) or not isinstance(right, list) or OPEN in left or OPEN in right:
        return OPEN
    return [*left, *right]
