"""Where a bundle's CPython comes from: one interface, two ways, the same result."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Final, Protocol

from composer._fs import host_errors
from composer.errors import HostError
from composer.interpreter.archive import unpack
from composer.interpreter.find import Installation, inspect_python
from composer.interpreter.foreign import read_python
from composer.interpreter.licences import notices
from composer.interpreter.objects import Objects, gather, glibc_floor, host_runtime, read_object, relocated, version_key
from composer.interpreter.stdlib import is_debian, names_its_place, relocate_text, travels
from composer.interpreter.tree import (
    PROGRAM_MODE,
    InterpreterTree,
    TreeEntry,
    file_entry,
    link_entry,
    tree_digest,
)

# An empty folder cannot be in a tar layer by files alone; without this one, site.py would not make it a site folder.
_SITE_README: Final = b"The distributions of this bundle.\n"
_FALLBACK: Final = "_compose_fallback"
_HOST: Final = "_compose_host"
# Without `home`, which would be a fixed folder of one host: CPython 3.10 to 3.13 then take the standard library from
# PYTHONHOME or from where they were installed, and this folder as the prefix. 3.14 moved the decision to getpath.
_PYVENV: Final = b"include-system-site-packages = false\n"
_HOST_MINORS: Final = ("3.10", "3.11", "3.12", "3.13")


class Provider(Protocol):
    """A source of relocatable CPythons."""

    def tree(self, minor: str, work: Path) -> InterpreterTree:
        """The prefix of a CPython of this minor version; edited files are written below `work`, an empty folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PathProvider:
    """A CPython that is installed on this machine, by its program: Debian's, pyenv's, uv's or a virtual environment's.

    Left behind: tests, Tk, pip, the static library, and everything in site-packages. `digest` of the result depends on
    the installation's bytes alone, not on the place of `work`.
    """

    python: Path
    name: str = "path"

    def tree(self, minor: str, work: Path) -> InterpreterTree:
        """Make the installation a prefix that runs wherever it lies.

        Raises HostError if it cannot be had here or is of another minor version, ElfError if an edit fails.
        """
        found = inspect_python(self.python)
        if found.minor != minor:
            raise HostError(
                f"Python {found.minor}, not {minor}",
                where=str(self.python),
                fix=f"Give --python a CPython {minor}, or build for {found.minor}.",
            )
        objects = gather(found.program, found.dynload, minor)
        runtime = {
            name: path for name, path in host_runtime(found.program).items() if f"lib/{name}" not in objects.files
        }
        return _prefix(found, objects, runtime, work, self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveProvider:
    """An `install_only` archive of python-build-standalone (.tar.gz or .tar.zst), already fetched and verified.

    It runs anywhere as it is; it goes through the same steps for its build settings and what is left behind. One for
    another `machine` is not run here, but read; it gets no libstdc++, because this machine's is of no use there.
    """

    archive: Path
    machine: str = field(default_factory=platform.machine)

    def tree(self, minor: str, work: Path) -> InterpreterTree:
        """Unpack below `work` and relocate. Raises IntegrityError for a hostile archive, else as PathProvider."""
        unpack(self.archive, work / "archive")
        prefix = work / "archive" / "python"
        python = prefix / "bin" / f"python{minor}"
        if not python.exists():
            raise HostError(f"holds no python/bin/python{minor}", where=str(self.archive))
        if self.machine == platform.machine():
            return PathProvider(python=python, name="archive").tree(minor, work / "edited")
        found = read_python(prefix, minor, self.machine)
        objects = gather(found.program, found.dynload, minor, libraries_in=prefix / "lib")
        return _prefix(found, objects, {}, work / "edited", "archive")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostProvider:
    """No CPython in the bundle: bin/python finds the host's when it is started, and starts it as if it lay here.

    To Python it is a virtual environment: sys.prefix and sys.executable are the bundle's, sys.base_prefix the host's;
    the host's distributions and .pth files are not seen, its sitecustomize is, and `-I` works. Only a CPython that was
    moved after it was built (python-build-standalone, uv) does not start with `-I` or `-E`: it needs PYTHONHOME.
    """

    machine: str = field(default_factory=platform.machine)

    def tree(self, minor: str, work: Path) -> InterpreterTree:
        """A launcher, the mark of a prefix and, for a `machine` like this one, its libstdc++ for hosts without.

        `version` of the result is the minor. `work` is not used. Raises HostError for a minor version whose start is
        not known to work this way.
        """
        del work
        if minor not in _HOST_MINORS:
            raise HostError(f"CPython {minor} of a host cannot be used without bundling it", where="--python host",
                            fix=f"Bundle one (--python PATH); known are {', '.join(_HOST_MINORS)}.")  # fmt: skip
        own = self.machine == platform.machine()
        runtime = host_runtime(Path(sys.executable).resolve()) if own else {}
        entries = sorted(
            [*_host_entries(minor), *_fallback_libraries(runtime, f"lib/python{minor}/site-packages"),
             *_notices(runtime)],
            key=lambda entry: entry.path,
        )  # fmt: skip
        return InterpreterTree(
            version=minor,
            minor=minor,
            provider="host",
            glibc_floor=glibc_floor(()),
            digest=tree_digest(entries),
            entries=tuple(entries),
            warnings=(
                f"no interpreter in the bundle: it needs a CPython {minor} on the host",
                *_library_warnings(runtime, runtime, glibc_floor(())),
            ),
        )


def _prefix(found: Installation, objects: Objects, runtime: dict[str, Path], work: Path,
            provider: str) -> InterpreterTree:  # fmt: skip
    """All files of an installation that travel; runtime: the libraries for hosts without."""
    entries = sorted(
        [
            *_programs(objects, found.minor, work),
            *_stdlib(found),
            *_headers(found),
            *_fallback_libraries(runtime, f"lib/python{found.minor}"),
            *_notices(_copied(objects, runtime)),
        ],
        key=lambda entry: entry.path,
    )
    return InterpreterTree(
        version=found.version,
        minor=found.minor,
        provider=provider,
        glibc_floor=objects.glibc_floor,
        digest=tree_digest(entries),
        entries=tuple(entries),
        warnings=(*objects.warnings, *_warnings(found, objects, runtime)),
    )


def _host_entries(minor: str) -> Iterator[TreeEntry]:
    launcher = _travelling("host_python.sh").replace(b"@MINOR@", minor.encode())
    site = f"lib/python{minor}/site-packages"
    for suffix in ("", "3", minor):  # not links: to follow one, sh would need a program of the host
        yield file_entry(f"bin/python{suffix}", launcher, mode=PROGRAM_MODE)
    yield file_entry("pyvenv.cfg", _PYVENV)
    yield file_entry(f"{site}/{_HOST}.py", _travelling("host_home.py"))
    yield file_entry(f"{site}/{_HOST}.pth", f"import {_HOST}\n".encode())
    yield file_entry(f"{site}/README.txt", _SITE_README)


def _programs(objects: Objects, minor: str, work: Path) -> Iterator[TreeEntry]:
    for place, item in objects.files.items():
        yield file_entry(place, relocated(place, item, work), mode=PROGRAM_MODE)
    yield link_entry("bin/python3", f"python{minor}")
    yield link_entry("bin/python", "python3")


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every file below a folder by its relative path; links to files count as files, links to folders do not."""

    def fail(fault: OSError) -> None:
        raise fault

    with host_errors(folder):
        for parent, folders, files in os.walk(folder, onerror=fail):
            folders.sort()
            for name in sorted(files):
                path = Path(parent) / name
                yield path.relative_to(folder).as_posix(), path


def _stdlib(found: Installation) -> Iterator[TreeEntry]:
    base = f"lib/python{found.minor}"
    for path, source in _walk(found.stdlib):
        if not travels(path) or path.startswith("lib-dynload/"):
            continue
        content = _edited(path, source, found.minor) if names_its_place(path) else source
        yield file_entry(f"{base}/{path}", content)
    with host_errors(found.stdlib):
        debian = is_debian((found.stdlib / "site.py").read_text(encoding="utf-8", errors="replace"))
    if debian:
        yield file_entry(f"{base}/sitecustomize.py", _travelling("debian_site.py"))
    # The folder is the landmark by which CPython knows its exec_prefix, even where every module is built in.
    yield file_entry(f"{base}/lib-dynload/README.txt", b"Extension modules of the standard library.\n")
    yield file_entry(f"{base}/site-packages/README.txt", _SITE_README)


def _edited(path: str, source: Path, minor: str) -> bytes:
    with host_errors(source):
        text = source.read_text(encoding="utf-8", errors="surrogateescape")
    return relocate_text(path, text, minor).encode(errors="surrogateescape")


def _headers(found: Installation) -> Iterator[TreeEntry]:
    """Python.h and what it includes: Triton compiles against it at run time."""
    if not found.include.is_dir():
        return
    base = f"include/python{found.minor}"
    # Debian's pyconfig.h includes another by a path outside this folder: that one takes its place.
    platform = found.platform_include / "pyconfig.h"
    for path, source in _walk(found.include):
        yield file_entry(f"{base}/{path}", platform if path == "pyconfig.h" and platform.is_file() else source)


def _fallback_libraries(runtime: dict[str, Path], modules: str) -> Iterator[TreeEntry]:
    """libstdc++, libgcc_s and libz for a host without them; what loads them is a module in the folder `modules`.

    Not in lib/: there, the search path would prefer them to a newer libstdc++ of the host, which can not be known when
    a bundle is built, and a Debian 12 libstdc++ would raise the floor to 2.36 for every host (arc4random).
    """
    for name, path in runtime.items():
        yield file_entry(f"lib/fallback/{name}", path, mode=PROGRAM_MODE)
    site = f"{modules.removesuffix('/site-packages')}/site-packages"
    yield file_entry(f"{modules}/{_FALLBACK}.py", _travelling("fallback_libraries.py"))
    yield file_entry(f"{site}/{_FALLBACK}.pth", f"import {_FALLBACK}\n".encode())


def _travelling(name: str) -> bytes:
    return (resources.files("composer") / "runtime" / "launch" / name).read_bytes()


def _copied(objects: Objects, runtime: dict[str, Path]) -> dict[str, Path]:
    libraries = {
        place.removeprefix("lib/"): item.source
        for place, item in objects.files.items()
        if place.count("/") == 1 and place.startswith("lib/lib") and not place.startswith("lib/libpython")
    }
    return {**libraries, **runtime}


def _notices(copied: dict[str, Path]) -> Iterator[TreeEntry]:
    for name, notice in sorted(notices(copied).items()):
        yield file_entry(f"share/licenses/{name}/copyright", notice)


def _warnings(found: Installation, objects: Objects, runtime: dict[str, Path]) -> Iterator[str]:
    if not found.include.is_dir():
        yield f"no Python.h beside {found.program}: code that is compiled at run time will not build"
    yield from _library_warnings(_copied(objects, runtime), runtime, objects.glibc_floor)


def _library_warnings(copied: dict[str, Path], runtime: dict[str, Path], lowest: str) -> Iterator[str]:
    unnoticed = sorted(copied.keys() - notices(copied).keys())
    if unnoticed:
        yield f"no licence notice found for {', '.join(unnoticed)}"
    floor = glibc_floor(read_object(path).elf for path in runtime.values())
    if version_key(floor) > version_key(lowest):
        yield f"a host without libstdc++ needs glibc {floor}: the copy for it comes from this machine"
    if not runtime:
        yield "no libstdc++, libgcc_s and libz that could be taken along: the bundle needs the host's"
