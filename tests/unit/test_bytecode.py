"""Bytecode: the same bytes every time, run by the interpreter without its source, broken modules left out."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from composer.errors import BuildError
from composer.interpreter.tree import InterpreterTree, file_entry, tree_digest
from composer.steps.base import _write
from composer.steps.bytecode import compile_sources
from composer.steps.layer import find_layer
from composer.steps.plan import Options
from composer.store import Store

PYTHON = Path(sys.executable)
TAG = str(sys.implementation.cache_tag)
MINOR = ".".join(platform.python_version_tuple()[:2])
GOOD = {
    "pack/__init__.py": b"",
    "pack/one.py": b"KINDS = {'a', 'b', 'c', 'd', 'e'}\ndef known(kind): return kind in {'x', 'y', 'z', 'u', 'v'}\n",
    "top.py": b'"""Doc."""\nassert True\nANSWER = 42\n',
    "pack/data.txt": b"not a module",
}
BROKEN = {
    "print.py": b"print 'Python 2'\n",
    "template.py": b"def {{ name }}(): pass\n",
    "nul.py": b"a = 1\0\n",
    "bytes.py": b"x = '\xff'\n",
    "coding.py": b"# coding: no-such-codec\n",
    "brackets.py": b"(" * 5000,
    "nested.py": b"-" * 200_000 + b"1\n",
    "chain.py": b"if a: pass\n" + b"elif a: pass\n" * 20_000,
}


def test_same_bytes_in_any_order_and_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = compile_sources(PYTHON, GOOD, TAG)
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    monkeypatch.setenv("PYTHONOPTIMIZE", "2")
    monkeypatch.chdir(tmp_path)
    turned = dict(reversed(GOOD.items()))
    assert compile_sources(PYTHON, turned, TAG) == first
    # A module that is not compiled must not change what the others become.
    assert compile_sources(PYTHON, GOOD | BROKEN, TAG) == first


def test_paths_and_kind() -> None:
    found = compile_sources(PYTHON, GOOD, TAG)
    assert sorted(found) == [
        f"__pycache__/top.{TAG}.pyc", f"pack/__pycache__/__init__.{TAG}.pyc", f"pack/__pycache__/one.{TAG}.pyc",
    ]  # fmt: skip
    for source in ("top.py", "pack/one.py"):
        code = found[str(Path(importlib.util.cache_from_source(source)))]
        assert code[:4] == importlib.util.MAGIC_NUMBER
        assert code[4:8] == b"\x01\0\0\0"  # by hash, never compared with the source (PEP 552)
        assert code[8:16] == importlib.util.source_hash(GOOD[source])


def test_the_interpreter_runs_the_bytecode_and_not_the_source(tmp_path: Path) -> None:
    for path, code in compile_sources(PYTHON, GOOD, TAG).items():
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(code)
    (tmp_path / "pack/__init__.py").write_bytes(b"")
    (tmp_path / "pack/one.py").write_bytes(b"raise SystemExit('the source ran')")
    (tmp_path / "top.py").write_bytes(b"raise SystemExit('the source ran')")
    lines = "import sys; sys.path.insert(0, '.'); import top, pack.one as one; print(top.ANSWER, one.known('z'))"
    done = subprocess.run([PYTHON, "-I", "-c", lines], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("42 True\n", "")


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_a_broken_source_is_left_out(name: str) -> None:
    found = compile_sources(PYTHON, {name: BROKEN[name], "good.py": b"x = 1\n"}, TAG)
    assert list(found) == [f"__pycache__/good.{TAG}.pyc"]


def test_nothing_to_compile_starts_no_interpreter() -> None:
    assert compile_sources(Path("/nonexistent/python"), {"a.txt": b""}, TAG) == {}


@pytest.mark.parametrize(
    ("program", "what"),
    [
        ("exec false", "exit status"),
        ("cat > /dev/null; printf abc", "cut-off"),
        ("cat > /dev/null", "returned 0 results for 1 modules"),
    ],
)
def test_an_interpreter_that_fails(tmp_path: Path, program: str, what: str) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\n{program}\n")
    fake.chmod(0o755)
    with pytest.raises(BuildError, match=what):
        compile_sources(fake, {"a.py": b""}, TAG)


def test_no_interpreter() -> None:
    with pytest.raises(BuildError, match="program not found"):
        compile_sources(Path("/nonexistent/python"), {"a.py": b""}, TAG)


def test_an_interpreter_is_another_layer_where_nothing_compiles_it(tmp_path: Path) -> None:
    """Without bytecode of all modules, too: those that come before the bundle's own have theirs if anything can."""
    entry = file_entry(f"lib/python{MINOR}/encodings/__init__.py", b"kept = 1\n")
    tree = InterpreterTree(version=platform.python_version(), minor=MINOR, provider="archive", glibc_floor="2.17",
                           digest=tree_digest([entry]), entries=(entry,))  # fmt: skip
    store = Store(tmp_path)
    keys = [_write(store, tree, compiler, None, Options(bytecode=False)).key for compiler in (None, PYTHON)]
    layers = [find_layer(store, key) for key in keys]
    assert [len(layer.entries) for layer in layers if layer] == [1, 2]
