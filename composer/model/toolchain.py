"""Toolchains as data: what recipes/toolchains/toolchains.toml holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from composer.errors import RecipeError
from composer.model._strict import Record, convert

_SPECIFIC_FROM = 90


class PinnedToolchain(Record, frozen=True, kw_only=True):
    """A CUDA toolkit that is put together from locked wheels.

    cuda: `major.minor`. root: what is CUDA_HOME in the unpacked wheels. requires, constraints: what is locked.
    compiler: the distributions that compile and link without NVIDIA's libraries. sms, gcc_newest, clang_oldest,
    clang_newest: what the toolkit says of itself once it is here.
    """

    cuda: str
    root: str
    requires: tuple[str, ...]
    constraints: tuple[str, ...] = ()
    compiler: tuple[str, ...]
    sms: tuple[int, ...]
    gcc_newest: int
    clang_oldest: int
    clang_newest: int


class Span(Record, frozen=True, kw_only=True):
    """The first and the last CUDA release that emits code for an architecture; no `until`: every newer one."""

    since: str
    until: str | None = None

    def has(self, cuda: str) -> bool:
        """Whether a release, `major.minor`, is one of them."""
        after = release_key(cuda) >= release_key(self.since)
        return after and (self.until is None or release_key(cuda) <= release_key(self.until))

    def __str__(self) -> str:
        return f"CUDA {self.since} or newer" if self.until is None else f"CUDA {self.since} to {self.until}"


class Toolchains(Record, frozen=True, kw_only=True):
    """The toolchains that are known by name, and what CUDA releases can emit."""

    toolchain: Mapping[str, PinnedToolchain]
    sm: Mapping[str, Span]


def parse_toolchains(data: Mapping[str, Any], where: str) -> Toolchains:
    """The known toolchains from parsed TOML; RecipeError lists what is wrong."""
    return convert(data, Toolchains, where)


def code_name(sm: int) -> str:
    """An architecture with its own instructions, as NVIDIA's compilers name it: 90 is `90a`, 80 is `80`.

    Source: PTX ISA, architecture-specific targets.
    """
    return f"{sm}a" if sm >= _SPECIFIC_FROM else str(sm)


def release_key(cuda: str) -> tuple[int, int]:
    """`12.8` as something that sorts; RecipeError for anything else."""
    major, _, minor = cuda.partition(".")
    if not (major.isascii() and major.isdigit() and minor.isascii() and minor.isdigit()):
        raise RecipeError(f"not a CUDA release: {cuda!r}", where="cuda", fix="Write it like 12.8.")
    return int(major), int(minor)
