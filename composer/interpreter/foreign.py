"""A CPython for another machine: what its files tell where it cannot be asked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from composer._fs import host_errors
from composer.errors import HostError
from composer.interpreter.find import Installation
from composer.interpreter.objects import read_object
from composer.interpreter.stdlib import build_settings

_VERSION: Final = re.compile(r'^#define\s+PY_VERSION\s+"([^"+]+)\+?"', re.MULTILINE)


def read_python(prefix: Path, minor: str, machine: str) -> Installation:
    """The installation below `prefix`, as `inspect_python` gives it: of CPython `minor`, for `machine`.

    Its version is that of `patchlevel.h`, its build that of `_sysconfigdata`, which under this name only a plain build
    for glibc has. Raises HostError where they do not tell, and for what cannot become part of such a bundle.
    """
    program = (prefix / "bin" / f"python{minor}").resolve()
    made_for = read_object(program).elf.machine
    if made_for != machine:
        raise HostError(f"a CPython for {made_for}, not for {machine}", where=str(program))
    stdlib = prefix / "lib" / f"python{minor}"
    settings = build_settings(_text(stdlib / f"_sysconfigdata__linux_{machine}-linux-gnu.py"))
    include = prefix / "include" / f"python{minor}{settings.get('ABIFLAGS', '')}"
    found = Installation(
        implementation="cpython", minor=minor, version=_version(include / "patchlevel.h"), program=program,
        stdlib=stdlib, dynload=stdlib / "lib-dynload", include=include,
        platform_include=prefix / "include" / str(settings.get("MULTIARCH", "")) / f"python{minor}",
        library_folder=str(settings.get("PLATLIBDIR", "lib")), debug=bool(settings.get("Py_DEBUG")),
        free_threaded=bool(settings.get("Py_GIL_DISABLED")), abi=str(settings.get("SOABI", "")),
    )  # fmt: skip
    if objection := found.objection():
        raise HostError("cannot become part of a bundle", where=str(program), why=objection)
    return found


def _version(header: Path) -> str:
    found = _VERSION.search(_text(header))
    if not found:
        raise HostError("does not say which CPython it is of", where=str(header))
    return found[1]


def _text(path: Path) -> str:
    with host_errors(path):
        return path.read_text(encoding="utf-8", errors="surrogateescape")
