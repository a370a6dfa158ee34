"""Which imports of a source run in any case, and that cutting a source into statements loses none of them."""

from __future__ import annotations

import ast
import gc
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from composer.formats.python_imports import Import, SourceImports, _of_module, source_imports

ALWAYS = {
    "import a": [("a", (), 0)],
    "import a.b as c, d": [("a.b", (), 0), ("d", (), 0)],
    "from a import b, c": [("a", ("b", "c"), 0)],
    "from a import (\n    b,\n    c,\n)": [("a", ("b", "c"), 0)],
    "from a import (\nb,\nc)": [("a", ("b", "c"), 0)],
    "from . import a": [("", ("a",), 1)],
    "from ..a import *": [("a", ("*",), 2)],
    "import a; import b": [("a", (), 0), ("b", (), 0)],
    "x = 1; import a": [("a", (), 0)],
    "import a, \\\n  b": [("a", (), 0), ("b", (), 0)],
    "import a\r\nimport b\r\n": [("a", (), 0), ("b", (), 0)],
    "import a\rimport b\r": [("a", (), 0), ("b", (), 0)],
    "\ufeffimport a": [("a", (), 0)],
    "class C:\n    import a\n    def f(self):\n        import b": [("a", (), 0)],
    "class C(\n    Base,\n):\n    def f(self):\n        import b\n    from a import x": [("a", ("x",), 0)],
    "try:\n    import a\nfinally:\n    import b": [("a", (), 0), ("b", (), 0)],
    "try:\n    import a\nexcept KeyError:\n    import b\nelse:\n    import c": [("a", (), 0), ("c", (), 0)],
    "try:\n    x\nexcept ImportError:\n    y\nfinally:\n    import a": [("a", (), 0)],
    "with warnings.catch_warnings():\n    import a": [("a", (), 0)],
    "s = '''\nimport a\n'''\nimport b": [("b", (), 0)],
    's = """\\"""\nimport a\n"""\nimport b': [("b", (), 0)],
    "s = 'it\\'s' # '''\nimport b": [("b", (), 0)],
    "def f():\n    return '''\nimport a\n'''\nimport b": [("b", (), 0)],
    "# coding: latin-1\nimport a": [("a", (), 0)],
}
NEVER = [
    "", "from __future__ import annotations", "def f():\n    import a", "async def f():\n    import a",
    "if x:\n    import a\nelif y:\n    import b\nelse:\n    import c", "for x in y:\n    import a",
    "while x:\n    import a", "match x:\n    case 1:\n        import a", "class C:\n    if x:\n        import a",
    "try:\n    import a\nexcept ImportError:\n    import b", "try:\n    import a\nexcept:\n    pass",
    "try:\n    import a\nexcept (KeyError, ModuleNotFoundError):\n    pass",
    "try:\n    import a\nexcept errors.Missing:\n    pass", "try:\n    import a\nexcept Exception as fault:\n    pass",
    "try:\n    import a\nexcept ImportError:\n    pass\nelse:\n    import a.b",
    "with suppress(ImportError):\n    import a", "with guard, catch_warnings():\n    import a",
    "'import a'", "x = '''\nimport a\n'''", "importlib = 1", "import a from b", "print 'import a'\nimport",
    "\0import a",
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), ALWAYS.items())
def test_what_runs_in_any_case(text, expected):
    found = source_imports(text.encode()).imports
    assert [(one.module, one.names, one.level) for one in found] == expected


@pytest.mark.parametrize("text", NEVER)
def test_what_may_fail_or_never_happen(text):
    assert source_imports(text.encode()) == SourceImports()


def test_lines_are_those_of_the_file():
    text = (
        b'"""Doc\nof two lines."""\n\nimport a\n\nclass C:\n    x = 1\n    import b\n\ntry:\n    import c\nfinally: x\n'
    )
    assert [(one.module, one.line) for one in source_imports(text).imports] == [("a", 4), ("b", 8), ("c", 11)]


def test_newer_syntax_elsewhere_in_the_file_does_not_matter():
    text = b"import a\n\ntype X[T] = list[T]\n\ndef f[T](x: T) -> T:\n    return f'{x['key']}'\n\nimport b\n"
    assert [one.module for one in source_imports(text).imports] == ["a", "b"]


def test_bytes_that_are_no_utf8():
    assert source_imports(b"# \xe9t\xe9\nimport a\nx = '\xff'\n").imports == (Import("a", (), 0, 2),)
    assert source_imports(b"from a import \xff\n") == SourceImports()


@pytest.mark.parametrize(
    ("text", "edits"),
    [
        ("sys.path.insert(0, x)", True), ("sys.path += [x]", True), ("sys.path[:0] = [x]", True),
        ("sys.path = [x]", True), ("sys.path.extend(x)", True), ("print(sys.path)", False), ("sys.path[0]", False),
        ("sys.path == x", False), ("sys.path_hooks.append(x)", False),
    ],
)  # fmt: skip
def test_a_change_of_where_modules_are_looked_for(text, edits):
    assert source_imports(f"import sys\ndef f():\n    {text}\n".encode()).edits_path is edits


def test_the_standard_library_cut_and_whole():
    """Real sources: the statements that are parsed are all that matter."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[::4]
    assert len(sources) > 30
    for path in sources:
        data = path.read_bytes()
        assert source_imports(data).imports == tuple(_of_module(data)), path
        assert ast.parse(data)


class _Yielding:
    """Garbage whose end lets another thread run, wherever the collector finds it."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        time.sleep(0)


def test_threads_that_read_at_the_same_time_do_not_disturb_each_other() -> None:
    """CPython 3.11 counts how deep trees are for all threads together (python/cpython#106905)."""
    text = b"class C:\n" + b"".join(b"    from package%d import a, b, c\n" % number for number in range(300))

    def read(_number: int) -> int:
        _Yielding()
        return len(source_imports(text).imports)

    before = gc.get_threshold()
    gc.set_threshold(50)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(read, range(400))) == {300}
    finally:
        gc.set_threshold(*before)
