"""What a bundle is built for: GPU architectures, a CPU instruction set, CUDA, Python and a platform."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from composer.errors import RecipeError
from composer.model._strict import Record, convert
from composer.model.toolchain import release_key

T = TypeVar("T")

#: The newest glibc whose manylinux tag a locked wheel may carry; what a bundle really needs is computed from its files.
GLIBC_CEILING = 39
#: The processors of hosts, as `uname -m` says them; their system is Linux.
MACHINES = ("x86_64", "aarch64")


class Sm(Record, frozen=True, kw_only=True):
    """One GPU architecture of recipes/targets.toml.

    own_cpu: which of `gpus` are part of a chip or board with its own CPU, and the instruction sets that this one runs.
    formerly: the number that compilers had for it before CUDA 13.
    """

    name: str
    gpus: tuple[str, ...]
    own_cpu: Mapping[str, tuple[str, ...]] = {}
    formerly: int | None = None

    @property
    def isas(self) -> tuple[str, ...] | None:
        """The instruction sets of the CPUs beside it, if every such GPU has one of its own; None if any CPU can be."""
        if not self.gpus or set(self.gpus) - self.own_cpu.keys():
            return None
        return tuple(dict.fromkeys(isa for isas in self.own_cpu.values() for isa in isas))


class Isa(Record, frozen=True, kw_only=True):
    """One CPU instruction set of recipes/targets.toml: the machine it belongs to and how compilers spell it.

    features: what Linux calls it, in /proc/cpuinfo's `flags` (x86-64) or `Features` (AArch64). properties: features and
    values of wheel variants, where those are not `on` for each of `features`.
    """

    machine: str
    flags: tuple[str, ...]
    features: tuple[str, ...]
    cpus: str
    properties: Mapping[str, str] = {}


class Toolkit(Record, frozen=True, kw_only=True):
    """What a CUDA toolkit emits code for: `90`, `90a` (that GPU alone), `100f` (its family)."""

    emits: tuple[str, ...]


class Drivers(Record, frozen=True, kw_only=True):
    """The oldest branch of NVIDIA's driver for a CUDA.

    compatible: for every version of a major, by minor-version compatibility. native: for `major.minor`; it is the
    first that also compiles that version's PTX. source: who says so.
    """

    source: str
    compatible: Mapping[str, str]
    native: Mapping[str, str]


class Targets(Record, frozen=True, kw_only=True):
    """The vocabulary of targets. cuda: toolkits by `major.minor`. other_gpus: SMs of GPUs that no target is for."""

    sm: Mapping[str, Sm]
    isa: Mapping[str, Isa]
    cuda: Mapping[str, Toolkit]
    driver: Drivers
    other_gpus: Mapping[str, int] = {}

    def codes(self, sm: int, cuda: str) -> tuple[str, ...]:
        """What a toolkit emits for an architecture, the plainest first; nothing for a CUDA that is not listed."""
        known = self.cuda.get(cuda)
        return tuple(code for code in known.emits if code.rstrip("af") == str(sm)) if known else ()

    def releases(self, sm: int) -> tuple[str, ...]:
        """The listed CUDA releases that emit code for an architecture, the oldest first."""
        return tuple(cuda for cuda in sorted(self.cuda, key=release_key) if self.codes(sm, cuda))

    def oldest_driver(self, sm: int, cuda: str) -> str | None:
        """The oldest driver branch that runs a CUDA's code on a GPU; None if the CUDA is not known.

        It is that of minor-version compatibility, unless the GPU is newer: a driver that is older than the first CUDA
        which emits code for a GPU does not know it.
        """
        branches = [self.driver.compatible.get(cuda.partition(".")[0])]
        first = next(iter(self.releases(sm)), None)
        if first and first != min(self.cuda, key=release_key):  # what the oldest listed one emits may be older still
            branches.append(self.driver.native.get(first))
        return max(filter(None, branches), key=int, default=None) if branches[0] else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU by its name. isas: the instruction sets of the CPU that is part of it; None beside which any can be."""

    name: str
    sm: int
    isas: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is built for, as opposed to the host, where it runs.

    sms: GPU architectures as ten times the compute capability (9.0 is 90); kept ascending, each once, so that equal
    targets are equal however they were spelled. cuda and python: `major.minor`.
    """

    sms: tuple[int, ...]
    isa: str
    cuda: str
    python: str
    machine: str = "x86_64"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sms", tuple(sorted({*self.sms})))

    @property
    def slug(self) -> str:
        """The part of a bundle's name that says what it is for: `python312-cuda12_8-sm90-avx512`; of two, `sm80_90`."""
        python, cuda = self.python.replace(".", ""), self.cuda.replace(".", "_")
        return f"python{python}-cuda{cuda}-{sm_label(self.sms)}-{self.isa}"

    @property
    def platforms(self) -> tuple[str, ...]:
        """Wheel platform tags the target accepts, best first (PEP 600: every manylinux of an older glibc)."""
        modern = [f"manylinux_2_{minor}_{self.machine}" for minor in range(GLIBC_CEILING, 4, -1)]
        legacy = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
        aliases = [f"{alias}_{self.machine}" for alias in legacy.values()]
        return (*modern, *aliases, f"linux_{self.machine}")


def parse_targets(data: Mapping[str, Any], where: str) -> Targets:
    """The vocabulary from the parsed TOML of recipes/targets.toml; RecipeError lists what is wrong with it."""
    targets = convert(data, Targets, where)
    RecipeError.collect([RecipeError(what, where=f"{where}: {path}") for path, what in _faults(targets)])
    return targets


def _faults(targets: Targets) -> Iterator[tuple[str, str]]:
    """(dotted path, fault) of every value that has the right type and cannot be meant."""
    yield from _unsortable(targets)
    owners: dict[str, str] = {}
    named = [(f"sm.{sm}.gpus", sm, name) for sm, row in targets.sm.items() for name in row.gpus]
    named += [(f"other-gpus.{name}", str(sm), name) for name, sm in targets.other_gpus.items()]
    for path, sm, name in named:
        if (owner := owners.setdefault(_unpunctuated(name), sm)) != sm:
            yield path, f"{name!r} is a GPU of SM {owner}, too"
    for sm, row in targets.sm.items():
        for name, isas in row.own_cpu.items():
            if name not in row.gpus:
                yield f"sm.{sm}.own-cpu", f"{name!r} is not one of gpus"
            if not isas or set(isas) - targets.isa.keys():
                yield f"sm.{sm}.own-cpu.{name}", "must name instruction sets of this file"
    for name, isa in targets.isa.items():
        if isa.machine not in MACHINES:
            yield f"isa.{name}.machine", f"{isa.machine!r} is none of {', '.join(MACHINES)}"


def _unsortable(targets: Targets) -> Iterator[tuple[str, str]]:
    """Keys and values that are compared as numbers and are none."""
    integers = {f"sm.{sm}": sm for sm in targets.sm}
    integers |= {f"driver.compatible.{cuda}": branch for cuda, branch in targets.driver.compatible.items()}
    integers |= {f"driver.native.{cuda}": branch for cuda, branch in targets.driver.native.items()}
    yield from ((path, f"{text!r} is not a number") for path, text in integers.items() if not _is_number(text))
    for cuda in targets.cuda:
        if not all(map(_is_number, cuda.split("."))) or cuda.count(".") != 1:
            yield f"cuda.{cuda}", f"{cuda!r} is not a release such as '12.8'"


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def parse_sm(text: str, targets: Targets) -> int:
    """`90`, `sm90`, `sm_90` and `9.0` as 90; RecipeError for an architecture that targets.toml does not list."""
    found = re.fullmatch(r"(?:sm_?)?(\d{2,3})|(\d{1,2})\.(\d)", text.strip().lower())
    digits = (found[1] or f"{found[2]}{found[3]}") if found else ""
    if digits not in targets.sm:
        raise RecipeError(f"unknown GPU architecture {text!r}", where="--sm", fix=_meant_sm(text, targets))
    return int(digits)


def _meant_sm(text: str, targets: Targets) -> str:
    known = f"Known: {', '.join(sorted(targets.sm, key=int))} (compute capability 9.0 is 90)."
    if gpu := _find_gpu(text, targets):
        return f"Did you mean --gpu {gpu.name!r}, which is of SM {gpu.sm}? {known}"
    digits = "".join(re.findall("[0-9]", text))[:3]
    renamed = [sm for sm, row in targets.sm.items() if str(row.formerly) == digits]
    near = renamed or difflib.get_close_matches(digits, targets.sm, n=1, cutoff=0.5)
    return f"Did you mean {near[0]}? {known}" if near else known


def parse_sms(text: str, targets: Targets) -> tuple[int, ...]:
    """`90`, `80,9.0`, `80+90` as sorted architectures and `all` as none; RecipeError with every fault of `parse_sm`."""
    if text.strip().lower() == "all":
        return ()
    faults: list[RecipeError] = []
    found = [tried(parse_sm, one, targets, faults) for one in re.split("[,+]", text)]
    RecipeError.collect(faults)
    return tuple(sorted({sm for sm in found if sm is not None}))


def sm_label(sms: Iterable[int]) -> str:
    """Architectures in a name, as the references spell them: `sm90`, `sm80_90`."""
    return f"sm{'_'.join(map(str, sms))}"


def sm_text(sms: Iterable[int | str]) -> str:
    """Architectures in a sentence: `SM 90`, `SM 80, 90`; as words they may say more of themselves: `SM 90+PTX`."""
    return f"SM {', '.join(map(str, sms))}"


def parse_isa(text: str, targets: Targets) -> str:
    """A known instruction set, however it is punctuated (`x86_64_v3`, `AVX-512`), or RecipeError with the nearest."""
    known = {_unpunctuated(name): name for name in targets.isa}
    name = known.get(_unpunctuated(text.strip()))
    if name is None:
        near = difflib.get_close_matches(text.strip().lower(), targets.isa, n=1)
        raise RecipeError(
            f"unknown CPU instruction set {text!r}", where="--isa",
            fix=f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(targets.isa)}.",
        )  # fmt: skip
    return name


def parse_gpu(text: str, targets: Targets) -> Gpu:
    """A GPU by a name that people or NVML have for it: `H100`, `NVIDIA H100 80GB HBM3`, `rtx-4090`, `RTX4090`.

    RecipeError for one that targets.toml does not list, with the nearest spelling, or its SM where no target is for it.
    """
    if found := _find_gpu(text, targets):
        return found
    other = _named(text, targets.other_gpus)
    if other:
        raise RecipeError(f"{other} is of SM {targets.other_gpus[other]}, which is no target", where="--gpu",
                          fix=f"Targets: SM {', '.join(sorted(targets.sm, key=int))}.")  # fmt: skip
    names = {_plain(name): name for row in targets.sm.values() for name in row.gpus}
    near = difflib.get_close_matches(_plain(text), names, n=1)
    fix = f"Did you mean {names[near[0]]!r}?" if near else "Name its architecture: --sm 90."
    raise RecipeError(f"unknown GPU {text!r}", where="--gpu", fix=fix)


def parse_gpus(texts: Iterable[str], targets: Targets) -> tuple[Gpu, ...]:
    """Several GPUs; RecipeError with every fault of `parse_gpu`."""
    faults: list[RecipeError] = []
    found = [tried(parse_gpu, text, targets, faults) for text in texts]
    RecipeError.collect(faults)
    return tuple(gpu for gpu in found if gpu)


def tried(parse: Callable[[str, Targets], T], text: str, targets: Targets, faults: list[RecipeError]) -> T | None:
    """What `parse` makes of a text; None for one that it refuses, which adds to `faults`."""
    try:
        return parse(text, targets)
    except RecipeError as fault:
        faults.append(fault)
        return None


def _find_gpu(text: str, targets: Targets) -> Gpu | None:
    rows = {name: (int(sm), row.own_cpu.get(name)) for sm, row in targets.sm.items() for name in row.gpus}
    name = _named(text, rows)
    return Gpu(name=name, sm=rows[name][0], isas=rows[name][1]) if name else None


def _named(text: str, names: Iterable[str]) -> str | None:
    """The longest of the names whose words are in the text, side by side; or that are it but for its punctuation."""
    words, solid = f" {_plain(text)} ", _unpunctuated(text.strip())
    found = [name for name in names if f" {_plain(name)} " in words or _unpunctuated(name) == solid]
    return max(found, key=len, default=None)


def _plain(name: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", name.lower()))


def _unpunctuated(name: str) -> str:
    return re.sub(r"[-_. ]", "", name.lower())


def target_faults(target: Target, targets: Targets) -> Iterator[RecipeError]:
    """How a target contradicts itself, whatever the recipe: its GPUs and its CPU, and its GPUs and its CUDA."""
    for sm in target.sms:
        row = targets.sm.get(str(sm))
        if row is None:
            yield RecipeError(f"unknown GPU architecture '{sm}'", where="--sm", fix=_meant_sm("", targets))
            continue
        if row.isas is not None and target.isa not in row.isas:
            yield _other_cpu(" or ".join(row.gpus), target.isa, row.isas, targets)
        if target.cuda in targets.cuda and not targets.codes(sm, target.cuda):
            yield _not_emitted(sm, target.cuda, row, targets)


def gpu_faults(gpu: Gpu, isa: str, targets: Targets) -> Iterator[RecipeError]:
    """How a GPU by name and a CPU contradict each other."""
    if gpu.isas is not None and isa not in gpu.isas:
        yield _other_cpu(gpu.name, isa, gpu.isas, targets)


def _other_cpu(what: str, isa: str, runs: tuple[str, ...], targets: Targets) -> RecipeError:
    machine = targets.isa[runs[0]].machine
    return RecipeError(f"the CPU of {what} does not run {isa}", where="--isa",
                       why=f"{what} has a CPU of its own: {machine}, with {', '.join(runs)}",
                       fix=f"Choose --isa {' or '.join(reversed(runs))}.")  # fmt: skip


def _not_emitted(sm: int, cuda: str, row: Sm, targets: Targets) -> RecipeError:
    releases = targets.releases(sm)
    renamed = row.formerly and targets.codes(row.formerly, cuda)
    why = f"CUDA {cuda} calls it sm_{row.formerly}; the first system for it has CUDA 13" if renamed else None
    return RecipeError(f"CUDA {cuda} emits no code for SM {sm}", where="--sm", why=why,
                       fix=f"Choose a recipe of CUDA {' or '.join(releases)}." if releases else None)  # fmt: skip
