"""What a bundle is built for: GPU architectures, a CPU instruction set, CUDA, Python and a platform."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from composer.errors import RecipeError
from composer.model._strict import Record, convert

#: The newest glibc whose manylinux tag a locked wheel may carry; what a bundle really needs is computed from its files.
GLIBC_CEILING = 39


class Sm(Record, frozen=True, kw_only=True):
    """One GPU architecture of recipes/targets.toml."""

    name: str
    gpus: tuple[str, ...]


class Isa(Record, frozen=True, kw_only=True):
    """One CPU instruction set of recipes/targets.toml: the machine it belongs to and how compilers spell it.

    features: what Linux calls it, in /proc/cpuinfo's `flags` (x86-64) or `Features` (AArch64).
    """

    machine: str
    flags: tuple[str, ...]
    features: tuple[str, ...]
    cpus: str


class Drivers(Record, frozen=True, kw_only=True):
    """The oldest branch of NVIDIA's driver for a CUDA.

    compatible: for every version of a major, by minor-version compatibility. native: for `major.minor`; it is the
    first that also compiles that version's PTX. source: who says so.
    """

    source: str
    compatible: Mapping[str, str]
    native: Mapping[str, str]


class Targets(Record, frozen=True, kw_only=True):
    """The vocabulary of targets."""

    sm: Mapping[str, Sm]
    isa: Mapping[str, Isa]
    driver: Drivers


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is built for, as opposed to the host, where it runs.

    sm: GPU architecture as ten times the compute capability (9.0 is 90). cuda and python: `major.minor`.
    """

    sm: int
    isa: str
    cuda: str
    python: str
    machine: str = "x86_64"

    @property
    def slug(self) -> str:
        """The part of a bundle's name that says what it is for: `python312-cuda12_8-sm90-avx512`."""
        return f"python{self.python.replace('.', '')}-cuda{self.cuda.replace('.', '_')}-sm{self.sm}-{self.isa}"

    @property
    def platforms(self) -> tuple[str, ...]:
        """Wheel platform tags the target accepts, best first (PEP 600: every manylinux of an older glibc)."""
        modern = [f"manylinux_2_{minor}_{self.machine}" for minor in range(GLIBC_CEILING, 4, -1)]
        legacy = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
        aliases = [f"{alias}_{self.machine}" for alias in legacy.values()]
        return (*modern, *aliases, f"linux_{self.machine}")


def parse_targets(data: Mapping[str, Any], where: str) -> Targets:
    """The vocabulary from the parsed TOML of recipes/targets.toml."""
    return convert(data, Targets, where)


def parse_sm(text: str, targets: Targets) -> int:
    """`90`, `sm90`, `sm_90` and `9.0` as 90; RecipeError for an architecture that targets.toml does not list."""
    found = re.fullmatch(r"(?:sm_?)?(\d{2,3})|(\d{1,2})\.(\d)", text.strip().lower())
    digits = (found[1] or f"{found[2]}{found[3]}") if found else ""
    if digits not in targets.sm:
        raise RecipeError(
            f"unknown GPU architecture {text!r}", where="--sm",
            fix=f"Known: {', '.join(sorted(targets.sm, key=int))} (compute capability 9.0 is 90).",
        )  # fmt: skip
    return int(digits)


def parse_sms(text: str, targets: Targets) -> tuple[int, ...]:
    """`90`, `80,9.0` as sorted architectures and `all` as none; RecipeError as of `parse_sm`."""
    if text.strip().lower() == "all":
        return ()
    return tuple(sorted({parse_sm(one, targets) for one in text.split(",")}))


def parse_isa(text: str, targets: Targets) -> str:
    """A known instruction set, or RecipeError with the nearest spelling."""
    name = text.strip().lower()
    if name not in targets.isa:
        near = difflib.get_close_matches(name, targets.isa, n=1)
        raise RecipeError(
            f"unknown CPU instruction set {text!r}", where="--isa",
            fix=f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(targets.isa)}.",
        )  # fmt: skip
    return name
