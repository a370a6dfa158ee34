"""The two layers that no wheel brings: the interpreter, and the bundle's own files.

What is known of an interpreter is cached by the state of its installation, so an unchanged one is not read again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from composer._fs import host_errors
from composer.errors import HostError
from composer.formats.elf import Elf, is_elf, read_elf
from composer.interpreter import InterpreterTree, PathProvider, TreeEntry
from composer.interpreter.archive import unpack
from composer.model.layer import Layer
from composer.steps.bytecode import compile_sources
from composer.steps.layer import LayerWriter, find_layer, stored_layer
from composer.steps.outline import Interpreter
from composer.steps.plan import BaseFile, Options
from composer.store import Store, key_of

_VERSION = 1
_OWN_VERSION = 2


class InterpreterFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What planning needs to know of an interpreter; key: of its layer in the store."""

    version: str
    floor: str
    warnings: Sequence[str]
    files: Sequence[BaseFile]
    key: str


class OwnFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the bundle itself; path is below the prefix."""

    path: str
    data: bytes
    mode: int = 0o644


def interpreter_layer(store: Store, interpreter: Interpreter, options: Options) -> InterpreterFacts:
    """Make the interpreter's layer, or find it. HostError when the interpreter cannot be relocated."""
    state = key_of("interpreter", _VERSION, minor=interpreter.minor, bytecode=options.bytecode, level=options.level,
                   mtime=options.mtime, installation=_installation_state(interpreter))  # fmt: skip
    facts = store.load("interpreter", state, InterpreterFacts)
    if facts and find_layer(store, facts.key):
        return facts
    with store.scratch() as work, compiler(store, interpreter) as python:
        facts = _write(store, interpreter.provider.tree(interpreter.minor, work), python, options)
    store.save("interpreter", state, facts)
    return facts


@contextlib.contextmanager
def compiler(store: Store, interpreter: Interpreter) -> Iterator[Path]:
    """A program of this very CPython that runs on this machine: the installed one, or the archive's, unpacked."""
    provider = interpreter.provider
    if isinstance(provider, PathProvider):
        yield provider.python
        return
    with store.scratch() as work:
        unpack(provider.archive, work)
        yield work / "python" / "bin" / f"python{interpreter.minor}"


def _write(store: Store, tree: InterpreterTree, compiler: Path, options: Options) -> InterpreterFacts:
    bytecode = tree.version if options.bytecode else None
    key = key_of("interpreter-layer", _VERSION, tree=tree.digest, bytecode=bytecode, level=options.level,
                 mtime=options.mtime)  # fmt: skip

    def fill(writer: LayerWriter) -> Layer:
        for path, entry in sorted(_with_bytecode(tree, compiler if bytecode else None).items()):
            if isinstance(entry, bytes):
                writer.data(path, entry)
            elif entry.kind == "symlink":
                writer.link(path, entry.target)
            else:
                writer.data(path, entry.read(), mode=entry.mode)
        return writer.finish(name="cpython", version=tree.version)

    stored_layer(store, key, fill, level=options.level, mtime=options.mtime)
    files = [BaseFile(path=one.path, target=one.target or None, elf=_elf(one)) for one in tree.entries]
    return InterpreterFacts(version=tree.version, floor=tree.glibc_floor, warnings=tree.warnings, files=files, key=key)


def _with_bytecode(tree: InterpreterTree, compiler: Path | None) -> Mapping[str, TreeEntry | bytes]:
    entries: dict[str, TreeEntry | bytes] = {entry.path: entry for entry in tree.entries}
    if compiler is None:
        return entries
    sources = {one.path: one.read() for one in tree.entries if one.kind == "file" and one.path.endswith(".py")}
    return entries | compile_sources(compiler, sources, f"cpython-{tree.minor.replace('.', '')}")


def _elf(entry: TreeEntry) -> Elf | None:
    if entry.kind != "file" or entry.path.endswith((".py", ".h", ".txt")):
        return None
    data = entry.read()
    return read_elf(data, entry.path) if is_elf(data[:64]) else None


def own_layer(store: Store, files: Sequence[OwnFile], interpreter: Interpreter, facts: InterpreterFacts,
              options: Options) -> tuple[str, list[BaseFile]]:  # fmt: skip
    """The layer of the bundle's own files: its key in the store, and the files as planning sees them.

    Its modules are compiled, too: a start must not add a file to the bundle.
    """
    ordered = sorted(files, key=lambda one: one.path)
    bytecode = facts.version if options.bytecode else None
    key = key_of("own-layer", _OWN_VERSION, files=ordered, bytecode=bytecode, level=options.level, mtime=options.mtime)

    def fill(writer: LayerWriter) -> Layer:
        for one in sorted([*ordered, *_own_bytecode(store, ordered, interpreter, options)], key=lambda one: one.path):
            writer.data(one.path, one.data, mode=one.mode)
        return writer.finish(name="wheel-composer", version="1")

    if not find_layer(store, key):
        stored_layer(store, key, fill, level=options.level, mtime=options.mtime)
    return key, [
        BaseFile(path=one.path, elf=read_elf(one.data, one.path) if is_elf(one.data[:64]) else None) for one in ordered
    ]


def _own_bytecode(store: Store, files: Sequence[OwnFile], interpreter: Interpreter,
                  options: Options) -> Iterator[OwnFile]:  # fmt: skip
    if not options.bytecode:
        return
    sources = {one.path: one.data for one in files if one.path.endswith(".py")}
    with compiler(store, interpreter) as python:
        for path, code in compile_sources(python, sources, f"cpython-{interpreter.minor.replace('.', '')}").items():
            yield OwnFile(path=path, data=code)


def _installation_state(interpreter: Interpreter) -> list[str]:
    """What changes when the installation does: for every file its place, size and times (ctime cannot be set back)."""
    provider = interpreter.provider
    if not isinstance(provider, PathProvider):
        assert interpreter.archive is not None
        return [interpreter.archive.artifacts[0].sha256]
    program = provider.python.resolve()
    folders = [program.parent.parent / "lib" / f"python{interpreter.minor}", program.parent.parent / "lib"]
    with host_errors(program):
        rows = [_state(program)]
        for number, folder in enumerate(folders):
            rows += [_state(path) for path in sorted(_files(folder, deep=number == 0))]
    if len(rows) == 1:
        raise HostError("has no standard library beside it", where=str(program))
    return rows


def _files(folder: Path, *, deep: bool) -> list[Path]:
    if not deep:
        return [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    skipped = ("site-packages", "__pycache__", "test")
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in skipped]
        found += [Path(parent, name) for name in names]
    return found


def _state(path: Path) -> str:
    found = path.stat()
    return f"{path} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
