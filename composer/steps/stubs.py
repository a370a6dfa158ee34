"""Make the libraries that stand in for those that a stack links and never calls.

Their symbols are read from the real library in its wheel, and that is all that is taken from it: a stub is ours.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec

from composer._fs import host_errors
from composer.errors import ElfError, RecipeError
from composer.formats.elf import read_elf
from composer.formats.stubcode import Machine
from composer.formats.stublib import Answer, render_library
from composer.formats.symbols import Definition, defined_symbols
from composer.formats.zip import Member, stream
from composer.model.layer import FileChange
from composer.model.recipe import Stub
from composer.steps.base import OwnFile
from composer.steps.outline import Outline
from composer.steps.survey import Survey, WheelFile, mapped, mapped_wheel
from composer.store import Store, key_of

_VERSION = 1


class Interface(msgspec.Struct, frozen=True, kw_only=True):
    """What a stub takes over from the real library."""

    soname: str
    machine: Machine
    symbols: Sequence[Definition]


def stub_files(outline: Outline, wheels: Mapping[str, WheelFile], surveys: Mapping[str, Survey],
               store: Store) -> list[OwnFile]:  # fmt: skip
    """The stubs of the recipe as files of the bundle itself.

    RecipeError for a stub that stands in for nothing, ElfError for a library that no stub can stand in for.
    """
    site = f"lib/python{outline.target.python}/site-packages/"
    files = []
    for number, stub in enumerate(outline.recipe.stub):
        member = _member(stub, surveys, site, f"stub[{number}]")
        interface = _interface(store, stub, wheels[stub.distribution], member)
        for key, patterns in (("symbols", stub.symbols), ("texts", stub.texts)):
            _check_patterns(stub, interface, patterns, f"stub[{number}].{key}")
        data = render_library(interface.soname, interface.symbols, _answer(outline.name, stub, interface),
                              interface.machine)  # fmt: skip
        files.append(OwnFile(path=site + stub.library, data=data, mode=0o755, change=_change(stub, interface, site)))
    return files


def _member(stub: Stub, surveys: Mapping[str, Survey], site: str, where: str) -> Member:
    survey = surveys.get(stub.distribution)
    if survey is None:
        raise RecipeError(f"{stub.distribution!r} is not in the bundle", where=f"{where}.distribution",
                          fix="Remove the stub, or correct the name.")  # fmt: skip
    for file in survey.files:
        if file.path == site + stub.library and file.is_elf:
            return file.member
    raise RecipeError(f"{stub.distribution} has no library {stub.library!r}", where=f"{where}.library",
                      fix="Correct the path.")  # fmt: skip


def _interface(store: Store, stub: Stub, wheel: WheelFile, member: Member) -> Interface:
    """From the store, or read: for that the library is inflated once, because its tables may be anywhere in it."""
    key = key_of("interface", _VERSION, artifact=wheel.sha256, library=stub.library, symbols=stub.symbols)
    known = store.load("interface", key, Interface)
    if known is None:
        with store.scratch() as scratch:
            path = scratch / "library"
            with mapped_wheel(wheel.path, wheel.sha256) as view, host_errors(path), path.open("wb") as out:
                for piece in stream(view, member, where=stub.library):
                    out.write(piece)
            with mapped(path) as library:
                known = _read(library, stub)
        store.save("interface", key, known)
    return known


def _read(library: mmap.mmap, stub: Stub) -> Interface:
    elf = read_elf(library, stub.library)
    if elf.machine not in ("x86_64", "aarch64"):
        raise ElfError("no stub can be made for this machine", where=stub.library, why=elf.machine)
    machine: Machine = "aarch64" if elf.machine == "aarch64" else "x86_64"
    symbols = [
        one for one in defined_symbols(library, stub.library)
        if any(fnmatchcase(one.name, pattern) for pattern in stub.symbols)
    ]  # fmt: skip
    return Interface(soname=elf.soname or Path(stub.library).name, machine=machine, symbols=symbols)


def _answer(bundle: str, stub: Stub, interface: Interface) -> Answer:
    names = (one.name for one in interface.symbols if one.kind == "function")
    return Answer(
        status=stub.status,
        message=f"{bundle}: {{name}} of {interface.soname} is not in this bundle: {stub.message}",
        text=f"not in the bundle {bundle}: {stub.message}",
        texts=frozenset(name for name in names if any(fnmatchcase(name, pattern) for pattern in stub.texts)),
    )


def _check_patterns(stub: Stub, interface: Interface, patterns: Sequence[str], where: str) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(one.name, pattern) for one in interface.symbols):
            raise RecipeError(f"{stub.library} defines nothing that matches {pattern!r}", where=where,
                              fix="Correct or remove the pattern.")  # fmt: skip


def _change(stub: Stub, interface: Interface, site: str) -> FileChange:
    count = sum(one.kind == "function" for one in interface.symbols)
    does = "end the process" if stub.status is None else f"return {stub.status}"
    detail = f"generated, in place of the library of {stub.distribution}; its {count} functions {does}"
    return FileChange(kind="stub", path=site + stub.library, detail=detail, reason=stub.reason)
