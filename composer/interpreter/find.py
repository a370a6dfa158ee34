"""The CPythons of this machine that a bundle could be made of, best first."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from packaging.version import Version

from composer import _proc
from composer.errors import ComposerError, HostError
from composer.interpreter.objects import gather, version_key

_PROBE: Final = """
import json, os, sys, sysconfig
value = sysconfig.get_config_var
minor = "%d.%d" % sys.version_info[:2]
stages = {"alpha": "a%d", "beta": "b%d", "candidate": "rc%d"}
stage = stages[sys.version_info[3]] % sys.version_info[4] if sys.version_info[3] in stages else ""
programs = [os.path.join(sys.base_exec_prefix, "bin", "python" + minor)]
programs.append(os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable))
print(json.dumps({
    "implementation": sys.implementation.name,
    "minor": minor,
    "version": "%d.%d.%d" % sys.version_info[:3] + stage,
    "program": os.path.realpath(next(filter(os.path.exists, programs))),
    "stdlib": os.path.dirname(os.path.realpath(os.__file__)),
    "dynload": os.path.join(sys.base_exec_prefix, sys.platlibdir, "python" + minor, "lib-dynload"),
    "include": os.path.join(sys.base_prefix, "include", "python" + minor + sys.abiflags),
    "platform_include": os.path.join(sys.base_prefix, "include", value("MULTIARCH") or "", "python" + minor),
    "library_folder": sys.platlibdir,
    "debug": bool(value("Py_DEBUG")),
    "free_threaded": bool(value("Py_GIL_DISABLED")),
    "abi": value("SOABI") or "",
}))
"""
_SECONDS: Final = 20.0
# Builds made to be moved come first, then those made for one user, then the system's.
_ORIGINS: Final = ("uv", "pyenv", "system", "PATH")


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    """What one interpreter says of itself; in a virtual environment, of the interpreter it was made from."""

    implementation: str
    minor: str
    version: str
    program: Path
    stdlib: Path
    dynload: Path
    include: Path
    platform_include: Path
    library_folder: str
    debug: bool
    free_threaded: bool
    abi: str

    def objection(self) -> str | None:
        """Why no bundle can be made of it; None if one can."""
        reasons = {
            f"it is {self.implementation}, not CPython": self.implementation != "cpython",
            "it is a debug build, which loads other extension modules": self.debug,
            "it is a free-threaded build, which loads other extension modules": self.free_threaded,
            "it is built for musl, the wheels for glibc": "musl" in self.abi,
            f"its library folder is {self.library_folder}, not lib": self.library_folder != "lib",
        }
        return next((reason for reason, holds in reasons.items() if holds), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A usable CPython. origin: `uv`, `pyenv`, `system` or `PATH`; glibc_floor: of its kept objects, such as `2.35`."""

    minor: str
    version: str
    path: Path
    origin: str
    glibc_floor: str


def inspect_python(python: Path) -> Installation:
    """Ask an interpreter about itself. Raises HostError if it does not run or cannot become part of a bundle."""
    answer = _proc.run([python, "-I", "-S", "-c", _PROBE], timeout=_SECONDS, error=HostError)
    try:
        found = msgspec.json.decode(answer, type=Installation, dec_hook=lambda kind, value: kind(value))
    except msgspec.MsgspecError as fault:
        raise HostError("does not answer as a Python would", where=str(python), why=str(fault)) from fault
    objection = found.objection()
    if objection:
        raise HostError("cannot become part of a bundle", where=str(python), why=objection)
    return found


def find_pythons(minors: Sequence[str], environ: Mapping[str, str] = os.environ) -> tuple[Candidate, ...]:
    """Every usable CPython of these minor versions on this machine, in order of preference.

    Looked at: PATH, pyenv's and uv's folders and the system's. Order: as `minors` are given; then the lowest glibc
    floor, because it decides where a bundle runs; the newest patch release; the origin; the path. What does not run,
    or cannot travel, is passed over.
    """
    found: dict[Path, Candidate] = {}
    for program in dict.fromkeys(path.resolve() for path in _programs(minors, environ) if path.is_file()):
        candidate = _candidate(program, minors, environ)
        if candidate:
            found.setdefault(candidate.path, candidate)
    return tuple(sorted(found.values(), key=lambda candidate: _preference(candidate, minors)))


def choose_python(minors: Sequence[str], environ: Mapping[str, str] = os.environ) -> Candidate:
    """The best of `find_pythons`. Raises HostError, naming both ways out, if there is none."""
    candidates = find_pythons(minors, environ)
    if not candidates:
        raise HostError(
            f"no CPython {' or '.join(minors)} on this machine that a bundle could be made of",
            why="Looked on PATH, in pyenv's and uv's folders, /usr/bin and /usr/local/bin.",
            fix="Give --python PATH, or make the python-build-standalone archive that the recipe names reachable.",
        )
    return candidates[0]


def _candidate(program: Path, minors: Sequence[str], environ: Mapping[str, str]) -> Candidate | None:
    try:
        found = inspect_python(program)
        if found.minor not in minors:
            return None
        floor = gather(found.program, found.dynload, found.minor).glibc_floor
    except ComposerError:
        return None
    return Candidate(
        minor=found.minor,
        version=found.version,
        path=found.program,
        origin=_origin(found.program, environ),
        glibc_floor=floor,
    )


def _preference(candidate: Candidate, minors: Sequence[str]) -> tuple[object, ...]:
    release = Version(candidate.version)
    # Negated numbers: a tuple sorts upwards, and the newest release comes first. A final one has no pre-release part.
    newest = (release.is_prerelease, *(-number for number in release.release))
    floor = version_key(candidate.glibc_floor)
    return (minors.index(candidate.minor), floor, newest, _ORIGINS.index(candidate.origin), str(candidate.path))


def _roots(environ: Mapping[str, str]) -> dict[str, Path]:
    home = Path(environ.get("HOME", "/nonexistent"))
    data = Path(environ.get("XDG_DATA_HOME") or home / ".local" / "share")
    return {
        "uv": Path(environ.get("UV_PYTHON_INSTALL_DIR") or data / "uv" / "python"),
        "pyenv": Path(environ.get("PYENV_ROOT") or home / ".pyenv"),
    }


def _origin(program: Path, environ: Mapping[str, str]) -> str:
    for origin, root in _roots(environ).items():
        if program.is_relative_to(root.resolve()):
            return origin
    return "system" if program.parent in (Path("/usr/bin"), Path("/usr/local/bin")) else "PATH"


def _programs(minors: Sequence[str], environ: Mapping[str, str]) -> Iterator[Path]:
    roots = _roots(environ)
    names = [f"python{minor}" for minor in minors]
    for pattern, root in (("*", roots["uv"]), ("versions/*", roots["pyenv"])):
        for folder in sorted(root.glob(pattern)):
            yield from (folder / "bin" / name for name in names)
    for text in [*environ.get("PATH", "").split(os.pathsep), "/usr/local/bin", "/usr/bin"]:
        # pyenv's shims start whatever the working folder asks for; the real programs were yielded above.
        if text and Path(text) != roots["pyenv"] / "shims":
            yield from (Path(text) / name for name in [*names, "python3", "python"])
