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
from composer.formats.elf import is_elf, read_elf
from composer.formats.linkage import read_linkage
from composer.formats.notes import minimum_kernel
from composer.interpreter import ArchiveProvider, HostProvider, InterpreterTree, PathProvider, TreeEntry
from composer.interpreter.archive import unpack
from composer.model.layer import Changes, FileChange, Layer
from composer.steps.bytecode import compile_sources
from composer.steps.layer import LayerWriter, find_layer, stored_layer
from composer.steps.outline import Interpreter
from composer.steps.plan import BaseFile, Options
from composer.store import Store, key_of

_VERSION = 4
_OWN_VERSION = 3


class InterpreterFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What planning needs to know of an interpreter; key: of its layer in the store.

    bytecode: the full version of the CPython that compiles modules, or None to ship no `.pyc`.
    """

    version: str
    bytecode: str | None
    floor: str
    warnings: Sequence[str]
    files: Sequence[BaseFile]
    key: str


class OwnFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the bundle itself; path is below the prefix. change: where it stands for something of upstream's."""

    path: str
    data: bytes
    mode: int = 0o644
    change: FileChange | None = None


def interpreter_key(interpreter: Interpreter, options: Options) -> str:
    """The store's key of what is known of an interpreter. HostError when it cannot be read."""
    return key_of("interpreter", _VERSION, minor=interpreter.minor, bytecode=options.bytecode, level=options.level,
                  mtime=options.mtime, installation=_installation_state(interpreter))  # fmt: skip


def find_interpreter(store: Store, key: str) -> InterpreterFacts | None:
    """What is known of an interpreter whose layer is in the store."""
    facts = store.load("interpreter", key, InterpreterFacts)
    return facts if facts and find_layer(store, facts.key) else None


def interpreter_layer(store: Store, interpreter: Interpreter, options: Options) -> InterpreterFacts:
    """Make the interpreter's layer, or find it. HostError when the interpreter cannot be relocated."""
    state = interpreter_key(interpreter, options)
    if facts := find_interpreter(store, state):
        return facts
    with store.scratch() as work, compiler(store, interpreter) as python:
        tree = interpreter.provider.tree(interpreter.minor, work)
        bytecode = _bytecode(interpreter, tree) if options.bytecode else None
        facts = _write(store, tree, python, bytecode, options)
    store.save("interpreter", state, facts)
    return facts


@contextlib.contextmanager
def compiler(store: Store, interpreter: Interpreter) -> Iterator[Path | None]:
    """A program of this CPython that runs on this machine: the installed one, or the archive's, unpacked.

    For one that does not run here it is one of this machine with the same minor version, and so the same bytecode
    (which has no machine), or None.
    """
    provider = interpreter.provider
    if isinstance(provider, PathProvider):
        yield provider.python
    elif isinstance(provider, ArchiveProvider) and interpreter.runs_here:
        with store.scratch() as work:
            unpack(provider.archive, work)
            yield work / "python" / "bin" / f"python{interpreter.minor}"
    else:
        yield interpreter.compiler.path if interpreter.compiler else None


def _bytecode(interpreter: Interpreter, tree: InterpreterTree) -> str | None:
    if interpreter.runs_here:
        return tree.version
    return interpreter.compiler.version if interpreter.compiler else None


def _write(store: Store, tree: InterpreterTree, compiler: Path | None, bytecode: str | None,
           options: Options) -> InterpreterFacts:  # fmt: skip
    # Without bytecode a compiler still compiles what precedes the bundle's own modules.
    key = key_of("interpreter-layer", _VERSION, tree=tree.digest, bytecode=bytecode, compiled=compiler is not None,
                 level=options.level, mtime=options.mtime)  # fmt: skip

    def fill(writer: LayerWriter) -> Layer:
        for path, entry in sorted(_with_bytecode(tree, compiler, whole=bytecode is not None).items()):
            if isinstance(entry, bytes):
                writer.data(path, entry)
            elif entry.kind == "symlink":
                writer.link(path, entry.target)
            else:
                writer.data(path, entry.read(), mode=entry.mode)
        return writer.finish(name="cpython", version=tree.version)

    stored_layer(store, key, fill, level=options.level, mtime=options.mtime)
    files = [_base_file(one) for one in tree.entries]
    warnings = [*tree.warnings]
    if options.bytecode and bytecode is None:
        warnings.append(f"modules are not compiled ahead of time: that takes a CPython {tree.minor} on this machine, "
                        "and there is none; every start on the host will be slower")  # fmt: skip
    return InterpreterFacts(version=tree.version, bytecode=bytecode, floor=tree.glibc_floor, warnings=warnings,
                            files=files, key=key)  # fmt: skip


def _with_bytecode(tree: InterpreterTree, compiler: Path | None, *,
                   whole: bool) -> Mapping[str, TreeEntry | bytes]:  # fmt: skip
    """The tree with bytecode of its modules, or else of those that are imported before the bundle's own.

    Without it those would be written beside their sources at the first start: no hook can prevent that.
    """
    entries: dict[str, TreeEntry | bytes] = {entry.path: entry for entry in tree.entries}
    if compiler is None:
        return entries
    first = (f"lib/python{tree.minor}/encodings/", f"lib/python{tree.minor}/sitecustomize.py")
    sources = {
        one.path: one.read() for one in tree.entries
        if one.kind == "file" and one.path.endswith(".py") and (whole or one.path.startswith(first))
    }  # fmt: skip
    return entries | compile_sources(compiler, sources, f"cpython-{tree.minor.replace('.', '')}")


def _base_file(entry: TreeEntry) -> BaseFile:
    data = entry.read() if entry.kind == "file" and not entry.path.endswith((".py", ".h", ".txt")) else b""
    if not is_elf(data[:64]):
        return BaseFile(path=entry.path, target=entry.target or None)
    return _object(entry.path, data)


def _object(path: str, data: bytes) -> BaseFile:
    return BaseFile(path=path, elf=read_elf(data, path), linkage=read_linkage(data, path),
                    kernel=minimum_kernel(data, path))  # fmt: skip


def own_layer(store: Store, files: Sequence[OwnFile], interpreter: Interpreter, facts: InterpreterFacts,
              options: Options) -> tuple[str, list[BaseFile]]:  # fmt: skip
    """The layer of the bundle's own files: its key in the store, and the files as planning sees them.

    Its modules are compiled, too: a start must not add a file to the bundle.
    """
    ordered = sorted(files, key=lambda one: one.path)
    key = key_of("own-layer", _OWN_VERSION, files=ordered, bytecode=facts.bytecode, level=options.level,
                 mtime=options.mtime)  # fmt: skip

    def fill(writer: LayerWriter) -> Layer:
        for one in sorted([*ordered, *_own_bytecode(store, ordered, interpreter, facts)], key=lambda one: one.path):
            writer.data(one.path, one.data, mode=one.mode)
        changes = Changes(files=[one.change for one in ordered if one.change])
        return writer.finish(name="wheel-composer", version="1", changes=changes)

    if not find_layer(store, key):
        stored_layer(store, key, fill, level=options.level, mtime=options.mtime)
    return key, [_object(one.path, one.data) if is_elf(one.data[:64]) else BaseFile(path=one.path) for one in ordered]


def _own_bytecode(store: Store, files: Sequence[OwnFile], interpreter: Interpreter,
                  facts: InterpreterFacts) -> Iterator[OwnFile]:  # fmt: skip
    if not facts.bytecode:
        return
    sources = {one.path: one.data for one in files if one.path.endswith(".py")}
    with compiler(store, interpreter) as python:
        assert python is not None
        for path, code in compile_sources(python, sources, f"cpython-{interpreter.minor.replace('.', '')}").items():
            yield OwnFile(path=path, data=code)


def _installation_state(interpreter: Interpreter) -> list[str]:
    """What changes when the installation does: for every file its place, size and times (ctime cannot be set back)."""
    provider = interpreter.provider
    found = interpreter.compiler
    compiled_by = [f"{found.path} {found.version}" if found else ""]
    if isinstance(provider, HostProvider):
        return [provider.tree(interpreter.minor, Path()).digest, *compiled_by]
    if not isinstance(provider, PathProvider):
        assert interpreter.archive is not None
        return [interpreter.archive.artifacts[0].sha256, *([] if interpreter.runs_here else compiled_by)]
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
