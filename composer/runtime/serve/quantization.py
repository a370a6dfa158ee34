"""Which quantisations the bundle's SGLang knows, by its own source; nothing of it is imported or run.

SGLang looks a checkpoint's `quant_method` up in a table and ends for one that is not in it, after all of it was
imported (0.5.9 and 0.5.23: sglang/srt/configs/model_config.py, `_verify_quantization`).
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..finding import Finding, error

#: The module with that table, in parts (QUANTIZATION_METHODS) for several kinds of devices.
MODULE = "sglang.srt.layers.quantization"
_TABLE = "QUANTIZATION_METHODS"


def known_methods(source: str) -> frozenset[str]:
    """Every method that the module's source puts into a table, whatever for; none where that cannot be read."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return frozenset()
    keys = (key for node in ast.walk(tree) for key in _keys(node))
    return frozenset(key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str))


def _keys(node: ast.AST) -> Iterator[ast.expr | None]:
    """What a statement or call adds: `TABLE = {...}`, `TABLE[...] = `, `TABLE.update({...})`."""
    values: list[ast.expr] = []
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (one.slice for one in targets if isinstance(one, ast.Subscript) and _is_table(one.value))
        values = [node.value] if node.value and any(map(_is_table, targets)) else []
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "update":
        values = node.args if _is_table(node.func.value) else []
    for value in values:
        yield from value.keys if isinstance(value, ast.Dict) else ()


def _is_table(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id.endswith(_TABLE)


def bundled_methods(prefix: Path) -> frozenset[str]:
    """The methods of the SGLang in the bundle at `prefix`; none where there is no telling."""
    below = f"{MODULE.replace('.', '/')}/__init__.py"
    for path in prefix.glob(f"lib/python3*/site-packages/{below}"):
        try:
            return known_methods(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            break
    return frozenset()


def faults(named: str, model: str, prefix: Path) -> list[Finding]:
    """An error about a model whose method the SGLang of the bundle at `prefix` does not know; none where it may."""
    known = bundled_methods(prefix) if named else frozenset()
    if not known or named in known:
        return []
    evidence = f'quantised by {named}, for which this bundle\'s SGLang ends with "Unknown quantization method"'
    fix = f"Take a copy of the model that is not quantised, or by one of {', '.join(sorted(known))}."
    return [error("model.quantization", model, evidence, fix)]


def method(config: Mapping[str, Any]) -> str:
    """The method that a model's config.json names, as SGLang looks it up; nothing for a model without one."""
    for name in ("quantization_config", "compression_config"):
        found = config.get(name)
        if isinstance(found, Mapping):
            named = found.get("quant_method")
            return named.lower() if isinstance(named, str) else ""
    return ""


def method_of(folder: Path) -> str:
    """The method that the config.json of a model's folder names; nothing where there is none to be read."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return ""
    return method(config) if isinstance(config, dict) else ""


def named_method(repository: str) -> str:
    """The method that a repository's name tells, before anything of it is here: torchao, which few servers know."""
    return "torchao" if "torchao" in repository.lower() else ""
