"""What a Python source imports whenever it is imported itself, read without compiling all of it.

Only statements that run unconditionally count. Below `if`, loops, functions and `match`, in a `try` that catches an
ImportError and in a `with` that might, an import may fail or never happen: what is in doubt is left out.

A stack has 12,000 sources of 170 MB, of which one in thirty bytes matters here: a source is cut into its top-level
statements first, and only those that can hold an import are parsed.
"""

from __future__ import annotations

import ast
import re
import threading
from collections.abc import Iterable, Iterator

import msgspec

# A top-level statement: from a line that starts in column 0 to the next one that does. What looks like such a line
# inside a string is none, and neither is a clause of a compound statement, nor a closing bracket.
_STATEMENT = re.compile(
    rb"""(?:
        [^"'\#\n\\]++
      | \#[^\n]*+
      | \"\"\"(?:[^"\\]++|\\.|\"(?!\"\"))*+\"\"\"
      | '''(?:[^'\\]++|\\.|'(?!''))*+'''
      | "(?:[^"\\\n]++|\\.)*+"
      | '(?:[^'\\\n]++|\\.)*+'
      | \\.
      | \n(?=[\ \t\n\#)\]}"'] | (?:except|else|elif|finally)\b)
    )++""",
    re.VERBOSE | re.DOTALL,
)
_MAY_IMPORT = re.compile(rb"(?:import|from|try|class|with)\b")
_LATER = re.compile(rb";[ \t\f]*(?:import|from)\b")
_IN_CLASS = re.compile(rb"\n([ \t]++)(?:(?P<method>(?:async[ \t]+)?def)|import|from|try|class|with)\b")
_EDITS_PATH = re.compile(rb"\bsys\.path(?:\.(?:insert|append|extend)\b|\s*\[[^\]\n]{0,200}\]\s*\+?=|\s*\+?=[^=])")
_CATCH_IMPORT_ERRORS = frozenset({"BaseException", "Exception", "ImportError", "ModuleNotFoundError"})
_HARMLESS_CONTEXTS = frozenset({"catch_warnings"})
_FAULTS = (SyntaxError, ValueError, RecursionError, MemoryError)  # the last is how the parser says: nested too deeply
#: CPython 3.11 counts how deep trees are for all threads together, and may fail then (python/cpython#106905).
_PARSING = threading.Lock()


class Import(msgspec.Struct, frozen=True, array_like=True):
    """`import module`, or `from module import names` with `level` leading dots, and the line it is on (from 1)."""

    module: str
    names: tuple[str, ...] = ()
    level: int = 0
    line: int = 0


class SourceImports(msgspec.Struct, frozen=True, array_like=True):
    """What one source imports in any case. edits_path: it mentions a change of sys.path."""

    imports: tuple[Import, ...] = ()
    edits_path: bool = False


def source_imports(source: bytes) -> SourceImports:
    """The unconditional imports of a source, in their order. Of a text that is no Python it may give any."""
    text = source.removeprefix(b"\xef\xbb\xbf")
    if b"\r" in text:
        text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    try:
        found = tuple(_of_statements(text))
    except _FAULTS:  # cut where it should not have been, or no Python
        found = tuple(_of_module(text))
    return SourceImports(found, b"sys.path" in text and bool(_EDITS_PATH.search(text)))


def _of_statements(text: bytes) -> Iterator[Import]:
    line, counted = 1, 0
    for match in _STATEMENT.finditer(text):
        statement = match[0]
        if b"import" not in statement or not _may_import(statement):
            continue
        line += text.count(b"\n", counted, match.start())
        counted = match.start()
        yield from _always(_parsed(statement), line - 1)


def _may_import(statement: bytes) -> bool:
    """Whether a statement needs to be parsed. A class does when it imports, and not only its methods do."""
    if not statement.startswith(b"class"):
        return bool(_MAY_IMPORT.match(statement) or _LATER.search(statement))
    leads = [(len(match[1]), match["method"] is None) for match in _IN_CLASS.finditer(statement)]
    methods = min((depth for depth, imports in leads if not imports), default=len(statement))
    return any(imports and depth <= methods for depth, imports in leads)


def _of_module(text: bytes) -> Iterator[Import]:
    try:
        yield from _always(_parsed(text), 0)
    except _FAULTS:
        return


def _parsed(text: bytes) -> list[ast.stmt]:
    with _PARSING:
        return ast.parse(text).body


def _always(body: Iterable[ast.stmt], before: int) -> Iterator[Import]:
    """The imports that run when all of `body` does; `before`: lines before the text that was parsed."""
    for node in body:
        match node:
            case ast.Import():
                yield from (Import(alias.name, (), 0, before + node.lineno) for alias in node.names)
            case ast.ImportFrom(module="__future__"):
                pass
            case ast.ImportFrom():
                names = tuple(alias.name for alias in node.names)
                yield Import(node.module or "", names, node.level, before + node.lineno)
            case ast.ClassDef():
                yield from _always(node.body, before)
            case ast.With() if all(_is_harmless(item.context_expr) for item in node.items):
                yield from _always(node.body, before)
            case ast.Try():
                if not any(_catches(handler.type) for handler in node.handlers):
                    yield from _always([*node.body, *node.orelse], before)
                yield from _always(node.finalbody, before)
            case _:
                pass


def _is_harmless(context: ast.expr) -> bool:
    """Whether an exception surely leaves a `with` of this context."""
    return isinstance(context, ast.Call) and _name(context.func) in _HARMLESS_CONTEXTS


def _catches(caught: ast.expr | None) -> bool:
    """Whether a handler may catch an ImportError."""
    if caught is None:
        return True
    if isinstance(caught, ast.Tuple):
        return any(_catches(one) for one in caught.elts)
    return not isinstance(caught, ast.Name) or caught.id in _CATCH_IMPORT_ERRORS


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""
