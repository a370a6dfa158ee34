"""The C++ compiler of this machine that nvcc hands host code to."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from composer._proc import clean_environ, run
from composer.errors import HostError
from composer.formats.nvcc import CompilerVersion, Family, HostLimits, parse_compiler

#: What names a compiler, first come, first served; it is then used for C, C++ and CUDA alike.
VARIABLES = ("CUDAHOSTCXX", "CXX", "CC")

_LAUNCHERS = frozenset({"ccache", "sccache", "distcc"})
_OLDEST_GCC = 9  # no stack of CUDA 12 or newer compiles with an older one: PyTorch asks for 9.3
_TIMEOUT = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCompiler:
    """A C++ compiler and the C compiler that belongs to it. version: all of it, `12.2.0`."""

    cxx: Path
    cc: Path
    family: Family
    version: str

    def __str__(self) -> str:
        return f"{self.cxx} ({self.family} {self.version})"

    def environ(self) -> dict[str, str]:
        """The variables by which build systems find it, also below nvcc."""
        return {"CUDAHOSTCXX": str(self.cxx), "CC": str(self.cc), "CXX": str(self.cxx)}


def find_host_compiler(limits: HostLimits, environ: Mapping[str, str]) -> HostCompiler:
    """The compiler that CUDAHOSTCXX, CXX or CC names, else the first g++ or clang++ of PATH that `limits` takes.

    HostError for a named one that is not there or not taken, and where there is none at all.
    """
    path = environ.get("PATH", "")
    for variable in VARIABLES:
        if words := _words(environ.get(variable, "")):
            return _named(variable, words[0], limits, path)
    refused = []
    for name in _names(limits):
        if (cxx := shutil.which(name, path=path)) and (cc := shutil.which(_c_name(name), path=path)):
            version = _version(Path(cxx))
            if limits.takes(version.family, version.major):
                return _compiler(Path(cxx), Path(cc), version)
            refused.append(f"{cxx} is {version.family} {version.full}")
    raise HostError(
        "no host compiler that nvcc takes", where="PATH", why="; ".join(refused) or "neither g++ nor clang++ is there",
        fix=f"Install one ({limits}; Debian: apt install g++), or name it with CUDAHOSTCXX.",
    )  # fmt: skip


def _words(text: str) -> list[str]:
    """A compiler's command without what launches it."""
    try:
        words = shlex.split(text)
    except ValueError:
        words = [text]
    return words[1:] if words and Path(words[0]).name in _LAUNCHERS else words


def _named(variable: str, word: str, limits: HostLimits, path: str) -> HostCompiler:
    cxx = shutil.which(_cxx_word(word), path=path)
    cc = shutil.which(_c_word(_cxx_word(word)), path=path)
    fix = f"Name another one ({limits}), or unset {variable}."
    if cxx is None or cc is None:
        missing = _cxx_word(word) if cxx is None else _c_word(_cxx_word(word))
        raise HostError("no such compiler", where=f"{variable}={word}", why=f"{missing} is not there", fix=fix)
    version = _version(Path(cxx))
    if not limits.takes(version.family, version.major):
        raise HostError("nvcc does not take this host compiler", where=f"{variable}={word}",
                        why=f"it is {version.family} {version.full}; nvcc takes {limits}", fix=fix)  # fmt: skip
    return _compiler(Path(cxx), Path(cc), version)


def _names(limits: HostLimits) -> Iterator[str]:
    yield "g++"
    yield from (f"g++-{major}" for major in range(limits.gcc_newest, _OLDEST_GCC - 1, -1))
    yield "clang++"
    yield from (f"clang++-{major}" for major in range(limits.clang_newest, limits.clang_oldest - 1, -1))


def _cxx_word(word: str) -> str:
    """`gcc-12` as `g++-12`: a C compiler does not link C++."""
    folder, slash, name = word.rpartition("/")
    if "++" not in name:
        name = re.sub(r"clang|gcc|cc$", lambda found: {"clang": "clang++", "gcc": "g++"}.get(found[0], "c++"), name)
    return f"{folder}{slash}{name}"


def _c_word(cxx: str) -> str:
    folder, slash, name = cxx.rpartition("/")
    return f"{folder}{slash}{_c_name(name)}"


def _c_name(cxx: str) -> str:
    return cxx.replace("clang++", "clang").replace("g++", "gcc").replace("c++", "cc")


def _version(cxx: Path) -> CompilerVersion:
    macros = run([cxx, "-dM", "-E", "-x", "c++", "/dev/null"], env=clean_environ(), timeout=_TIMEOUT, error=HostError)
    return parse_compiler(macros.decode(errors="replace"), str(cxx))


def _compiler(cxx: Path, cc: Path, version: CompilerVersion) -> HostCompiler:
    return HostCompiler(cxx=cxx.absolute(), cc=cc.absolute(), family=version.family, version=version.full)
