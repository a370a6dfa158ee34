"""What the instructions of a tree's objects say about the instruction set that it was built for.

Libraries such as libtorch_cpu hold kernels for several instruction sets and choose when they run, whatever they were
compiled with. So they prove nothing. Canaries do: libraries that never choose, of which PyTorch's official builds have
no VEX or EVEX instruction (measured on 2.9.1).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["canary", "dispatch", "plain"]
Verdict = Literal["applied", "run-time dispatch only", "not used", "needs more than ISA"]

#: Libraries of PyTorch that are compiled with the flags of the build and choose nothing when they run.
CANARIES = frozenset({"libc10.so", "libc10_cuda.so", "libtorch_python.so"})

_X86 = (
    "avx", "avx2", "fma", "f16c", "bmi", "avxvnni", "avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512cd",
    "avx512vnni", "avx512bf16", "avx512fp16", "avx512other", "amx",
)  # fmt: skip
_ARM = ("lse", "fp16", "dotprod", "i8mm", "bf16", "sve", "sve2")
#: Kinds of instructions that some CPUs of a machine lack.
FEATURES: Mapping[str, tuple[str, ...]] = {"x86_64": _X86, "aarch64": _ARM}

_AVX2 = frozenset({"avx", "avx2", "fma", "f16c", "bmi"})
_V4 = _AVX2 | {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512cd"}
# What a CPU has that has the feature of a flag: no CPU has AVX2 without BMI, or AVX-512F without CD and FMA.
_IMPLIED: Mapping[str, Collection[str]] = {
    "avx": {"avx"},
    "avx2": _AVX2,
    "fma": {"avx", "fma"},
    "f16c": {"avx", "f16c"},
    "avx512f": _AVX2 | {"avx512f", "avx512cd"},
    "arch=x86-64-v3": _AVX2,
    "arch=x86-64-v4": _V4,
    "armv8.2-a": {"lse"},
    "armv9-a": {"lse", "fp16", "dotprod", "sve", "sve2"},
}
# A file that is named for an instruction set is one of several, of which its user takes one.
_CHOSEN = re.compile(r"avx|sse4|haswell|skylake|icelake|sapphire|zen\d|sve|neoverse", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One object: its path in the tree, its machine, and how many instructions of each kind it has.

    asks: it can know what the CPU has, by an instruction of its own or from another library.
    """

    path: str
    machine: str
    counts: Mapping[str, int]
    asks: bool = False

    @property
    def role(self) -> Role:
        """Whether it is a canary, can choose its code when it runs, or neither."""
        name = self.path.rpartition("/")[2]
        if name in CANARIES:
            return "canary"
        return "dispatch" if self.asks or _CHOSEN.search(name) else "plain"

    @property
    def needs(self) -> frozenset[str]:
        """The features of which it has instructions."""
        return frozenset(name for name in FEATURES[self.machine] if self.counts.get(name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """A verdict for one instruction set. witnesses: the paths that led to it. excess: features by path, beyond it."""

    verdict: Verdict
    witnesses: tuple[str, ...]
    excess: Mapping[str, tuple[str, ...]]


def features_of(flags: Sequence[str]) -> frozenset[str]:
    """The features that compilers may use with `-m` flags."""
    found: set[str] = set()
    for flag in flags:
        name = flag.removeprefix("-m")
        parts = name.removeprefix("arch=").split("+") if name.startswith("arch=arm") else [name]
        for part in parts:
            found.update(_IMPLIED.get(part, {part}))
    return frozenset(found)


def judge(seen: Sequence[Seen], flags: Sequence[str], machine: str) -> Judgement:
    """Whether objects were compiled with an instruction set's flags.

    `applied`: every canary uses it; in a tree without canaries, an object that never chooses. `needs more than ISA`: an
    object that never chooses has instructions that a CPU of this instruction set may lack. `run-time dispatch only`:
    only objects that choose use it. Objects of another machine do not count.
    """
    allowed = features_of(flags)
    proof = allowed - _common(allowed)
    here = [one for one in seen if one.machine == machine]
    fixed = [one for one in here if one.role != "dispatch"]
    excess = {one.path: tuple(sorted(one.needs - allowed)) for one in fixed if one.needs - allowed}
    if excess:
        return Judgement(verdict="needs more than ISA", witnesses=tuple(excess), excess=excess)
    canaries = [one for one in fixed if one.role == "canary"]
    users = tuple(one.path for one in canaries or fixed if one.needs & proof)
    if users and len(users) >= len(canaries):
        return Judgement(verdict="applied", witnesses=users, excess={})
    choosing = tuple(one.path for one in here if one.role == "dispatch" and one.needs & proof)
    return Judgement(verdict="run-time dispatch only" if choosing else "not used", witnesses=choosing, excess={})


def _common(allowed: frozenset[str]) -> frozenset[str]:
    """What lesser instruction sets of targets.toml use too, and so proves nothing."""
    if "avx512f" in allowed:
        return _AVX2
    if "avx2" in allowed:
        return frozenset({"avx"})
    # Calls of libgcc that choose atomics when they run put LSE into every object.
    return frozenset({"lse", "fp16", "dotprod"} if "sve" in allowed else {"lse"})
