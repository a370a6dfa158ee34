"""What a CUDA toolkit says of itself: `nvcc --version`, `nvcc --list-gpu-code`, crt/host_config.h and cuda.h.

Read in the toolkits 12.4 and 13.0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from composer.errors import HostError

Family = Literal["gcc", "clang"]

_RELEASE = re.compile(r"release (\d+\.\d+), V(\d+(?:\.\d+)+)")
_CODE = re.compile(r"^sm_(\d+)$", re.MULTILINE)
_REFUSAL = r"#\s*if([^\n]*)\n(?:[ \t]*\n)*#\s*error\s+--\s+unsupported {} version!"
_MACRO = re.compile(r"^#define (\w+) (\d+)$", re.MULTILINE)
# Functions and, where a macro renames them, what they are called in the driver.
_DECLARED = re.compile(r"\bCUDAAPI\s+(cu[A-Z]\w*)\s*\(")
_RENAMED = re.compile(r"^\s*#\s*define\s+cu[A-Z]\w*\s+(?:(__CUDA_API_PT[DS][SZ])\()?(cu[A-Z]\w*)\)?\s*$", re.MULTILINE)
_SUFFIXES = {"__CUDA_API_PTDS": "_ptds", "__CUDA_API_PTSZ": "_ptsz"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A toolkit's release, `13.0`, and its compiler's full version, `13.0.88`."""

    cuda: str
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLimits:
    """The major versions of host compilers that an nvcc takes, ends included."""

    gcc_newest: int
    clang_oldest: int
    clang_newest: int

    def takes(self, family: Family, major: int) -> bool:
        """Whether a host compiler will do."""
        if family == "gcc":
            return major <= self.gcc_newest
        return self.clang_oldest <= major <= self.clang_newest

    def __str__(self) -> str:
        return f"g++ up to {self.gcc_newest}, clang++ {self.clang_oldest} to {self.clang_newest}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompilerVersion:
    """What a host compiler says that it is; clang also claims to be an old gcc."""

    family: Family
    major: int
    full: str


def parse_release(text: str, where: str) -> Release:
    """The release from what `nvcc --version` prints; HostError if that is not in it."""
    found = _RELEASE.search(text)
    if found is None:
        raise HostError("does not tell its release", where=where, why=text.strip()[-200:] or "it prints nothing")
    return Release(cuda=found[1], version=found[2])


def parse_gpu_codes(text: str, where: str) -> tuple[int, ...]:
    """The architectures of `nvcc --list-gpu-code`, ascending; HostError if there are none."""
    sms = tuple(sorted({int(digits) for digits in _CODE.findall(text)}))
    if not sms:
        raise HostError("does not tell its GPU architectures", where=where, why=text.strip()[-200:] or None)
    return sms


def parse_host_limits(text: str, where: str) -> HostLimits:
    """The limits that crt/host_config.h enforces: the conditions before its `#error` lines, which nvcc compiles first.

    HostError if they are not there or not of a form known.
    """
    gcc, clang = _condition(text, "GNU", where), _condition(text, "clang", where)
    newest = re.search(r"__GNUC__\s*>\s*(\d+)", gcc)
    below = re.search(r"__clang_major__\s*>=\s*(\d+)", clang)
    oldest = re.search(r"__clang_major__\s*<\s*(\d+)", clang)
    if not (newest and below and oldest):
        raise HostError("states its host compilers in an unknown form", where=where, why=f"{gcc.strip()}; {clang}")
    return HostLimits(gcc_newest=int(newest[1]), clang_oldest=int(oldest[1]), clang_newest=int(below[1]) - 1)


def _condition(text: str, compiler: str, where: str) -> str:
    found = re.search(_REFUSAL.format(compiler), text)
    if found is None:
        raise HostError(f"does not say which {compiler} versions nvcc takes", where=where)
    return found[1]


def parse_compiler(macros: str, where: str) -> CompilerVersion:
    """Family and version from what `-dM -E` prints; HostError for another compiler than gcc or clang."""
    defined = dict(_MACRO.findall(macros))
    for family, names in (
        ("clang", ("__clang_major__", "__clang_minor__", "__clang_patchlevel__")),
        ("gcc", ("__GNUC__", "__GNUC_MINOR__", "__GNUC_PATCHLEVEL__")),
    ):
        if names[0] in defined:
            parts = [defined.get(name, "0") for name in names]
            known: Family = "clang" if family == "clang" else "gcc"
            return CompilerVersion(family=known, major=int(parts[0]), full=".".join(parts))
    raise HostError("neither gcc nor clang", where=where, fix="Name a g++ or clang++ with CUDAHOSTCXX.")


def driver_functions(header: str) -> tuple[str, ...]:
    """The driver functions that code compiled with this cuda.h may be linked with, sorted."""
    return tuple(sorted({*_DECLARED.findall(header), *_renamed(header)}))


def _renamed(header: str) -> Iterator[str]:
    for macro, name in _RENAMED.findall(header):
        yield name
        if macro:
            yield name + _SUFFIXES[macro]
