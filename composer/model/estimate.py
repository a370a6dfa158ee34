"""What work will take, from records of what such work took: CPU time, wall time on a machine, memory and disk.

Nothing is made up: a quantity that no record holds stays unknown, and every figure keeps the word for how it is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import Version

from composer.errors import RecipeError
from composer.model._strict import Record as StrictRecord
from composer.model._strict import convert
from composer.model.recipe import Component
from composer.model.source import Build, jobs_for
from composer.model.target import Target

#: How a figure is known, the best first. here: on this machine, by this store. measured: whole, on another one.
#: scaled: from measured parts of it. reported: by others.
Basis = Literal["here", "measured", "scaled", "reported"]
_BASES: tuple[Basis, ...] = ("here", "measured", "scaled", "reported")
_QUANTITIES = ("cpu_seconds", "cpu_seconds_per_sm", "cpu_seconds_per_gb", "job_memory", "memory", "disk", "disk_per_gb")


class Record(StrictRecord, frozen=True, kw_only=True):
    """What one component's build, or one step, took. Quantities that were not recorded are None.

    basis, by, date, how: how it is known; by: the class of machine, or who says so; how: the command or the method.
    For which work it holds: versions (PEP 440), cuda (compiled with nvcc or not), machine, sm and settings (the
    variables and settings of the build, or options of the step, by their values); empty is any. gpus: so many
    architectures.
    cpu_seconds: of everything that there is once; plus per architecture, plus per GB (10^9 bytes) of what is read.
    serial: the share of the CPU time that only one core can do. job_memory: bytes of one compiler; memory: of all.
    disk: bytes while it runs; keeps: the share of them that stays. at_least: what is not in these figures.
    """

    name: str
    basis: Basis
    by: str
    how: str
    date: str = ""
    versions: str = ""
    cuda: bool | None = None
    machine: str = ""
    sm: tuple[int, ...] = ()
    gpus: int | None = None
    settings: Mapping[str, str] = {}
    cpu_seconds: float | None = None
    cpu_seconds_per_sm: float | None = None
    cpu_seconds_per_gb: float | None = None
    serial: float = 0.0
    job_memory: int | None = None
    memory: int | None = None
    disk: int | None = None
    disk_per_gb: float | None = None
    keeps: float = 0.0
    at_least: str | None = None

    def cpu(self, work: Work) -> float | None:
        """CPU seconds that the work takes by this record."""
        terms = ((self.cpu_seconds, 1), (self.cpu_seconds_per_sm, len(work.sms)), (self.cpu_seconds_per_gb, work.gb))
        return _sum(terms)

    def room(self, work: Work) -> int | None:
        """Bytes of disk that the work needs by this record."""
        found = _sum(((self.disk, 1), (self.disk_per_gb, work.gb)))
        return None if found is None else round(found)

    def ram(self, jobs: int) -> int | None:
        """Bytes of memory at the most, with so many compilers at a time."""
        known = [one for one in (self.memory, self.job_memory and self.job_memory * jobs) if one is not None]
        return max(known, default=None)

    def is_for(self, work: Work) -> bool:
        """Whether it says something about this work."""
        return (
            self.name == work.name
            and (not self.versions or work.version in SpecifierSet(self.versions, prereleases=True))
            and self.cuda in (None, work.cuda)
            and self.machine in ("", work.machine)
            and (not self.sm or set(work.sms) <= set(self.sm))
            and self.gpus in (None, len(work.sms))
            and all(_agree(text, work.settings.get(name, "")) for name, text in self.settings.items())
        )


def _agree(recorded: str, wanted: str) -> bool:
    """Whether a setting is as it was. What has a placeholder is another value for each target, not another build."""
    return recorded == wanted or "{" in wanted


class Records(StrictRecord, frozen=True, kw_only=True):
    """What recipes/measured.toml holds: builds of components, and the steps of composer itself."""

    component: tuple[Record, ...]
    step: tuple[Record, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One thing to be done. build: the component's; None for a step of composer itself.

    size: bytes that it reads. sms: architectures that it compiles for; none if it depends on none. done: share that an
    earlier run did. jobs: at most so many at a time. disk, memory: bytes that the recipe asks for.
    """

    name: str
    what: str
    version: str = "0"
    machine: str = ""
    sms: tuple[int, ...] = ()
    cuda: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)
    size: int = 0
    build: Build | None = None
    jobs: int | None = None
    done: float = 0.0
    disk: int = 0
    memory: int = 0

    @property
    def gb(self) -> float:
        """10^9 bytes that it reads."""
        return self.size / 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where the work is to be done. memory, disk: bytes, of disk those that are free; None: as much as is needed."""

    cores: int
    memory: int
    disk: int | None = None

    def jobs(self, work: Work) -> int:
        """How much of the work is done at a time."""
        if work.build is not None:
            return jobs_for(work.build, cores=self.cores, memory=self.memory, wanted=work.jobs)
        return max(1, min(self.cores, work.jobs or self.cores))


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one piece of work will take; None for what no record holds.

    cpu_seconds: of CPU time; basis: how it is known; at_least: what is not in it. seconds: of wall clock on the machine
    with these jobs, if it does nothing else. memory, disk: bytes; keeps: bytes of disk that stay. records: what this
    was derived from, the best first; also: what else is recorded of such work.
    """

    work: Work
    jobs: int
    cpu_seconds: float | None = None
    seconds: float | None = None
    memory: int | None = None
    disk: int | None = None
    keeps: int = 0
    basis: Basis | None = None
    at_least: str | None = None
    records: tuple[Record, ...] = ()
    also: tuple[Record, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """All steps, one after the other. download: bytes that have to be fetched before, which stay on the disk."""

    machine: Machine
    steps: tuple[Step, ...]
    download: int = 0

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds of all that is known."""
        return sum(step.cpu_seconds or 0 for step in self.steps)

    @property
    def seconds(self) -> float:
        """Seconds of wall clock of all that is known."""
        return sum(step.seconds or 0 for step in self.steps)

    @property
    def memory(self) -> int:
        """Bytes at the most."""
        return max((step.memory or 0 for step in self.steps), default=0)

    @property
    def disk(self) -> int:
        """Bytes at the most: what earlier steps leave, and the folder of the one that runs."""
        kept = highest = self.download
        for step in self.steps:
            highest = max(highest, kept + max(step.disk or 0, step.keeps))
            kept += step.keeps
        return highest

    @property
    def at_least(self) -> bool:
        """Whether something is not in the sums."""
        return any(step.at_least or step.cpu_seconds is None for step in self.steps)

    @property
    def lacks(self) -> tuple[str, ...]:
        """What the machine has too little of."""
        found = [("memory", self.memory, self.machine.memory), ("disk", self.disk, self.machine.disk)]
        return tuple(f"too little {what}: {has / 1e9:.1f} of {needed / 1e9:.1f} GB"
                     for what, needed, has in found if has is not None and has < needed)  # fmt: skip

    @property
    def longest(self) -> Step | None:
        """The step that takes most of the time, if it is known."""
        return max((one for one in self.steps if one.seconds), key=lambda one: one.seconds or 0, default=None)


def build_work(component: Component, target: Target, *, jobs: int | None = None, done: float = 0.0) -> Work:
    """The build of a component from source. jobs: at most; done: share that is there already."""
    assert component.build is not None
    build = component.build.for_target(target.sms, target.isa)
    return Work(
        name=component.name, what=f"build {component.name} {component.version or ''}".rstrip(),
        version=component.version or "0", machine=target.machine, sms=target.sms if component.build.uses("sm") else (),
        cuda=build.cuda, settings={**build.environment, **build.config}, build=build, jobs=jobs, done=done,
        disk=build.disk, memory=build.memory,
    )  # fmt: skip


def parse_records(data: Mapping[str, Any], where: str) -> tuple[Record, ...]:
    """Records from parsed TOML; RecipeError lists what is wrong."""
    found = convert(data, Records, where)
    rows = [(f"{table}[{index}]", row) for table in ("component", "step")
            for index, row in enumerate(getattr(found, table))]  # fmt: skip
    RecipeError.collect([
        RecipeError(f"{key}: {fault}", where=f"{where}: {path}")
        for path, row in rows for key, fault in _faults(row)
    ])  # fmt: skip
    return (*found.component, *found.step)


def _faults(row: Record) -> Iterator[tuple[str, str]]:
    try:
        SpecifierSet(row.versions)
    except InvalidSpecifier:
        yield "versions", f"{row.versions!r} is not a version specifier (PEP 440)"
    for key in _QUANTITIES:
        if (value := getattr(row, key)) is not None and value < 0:
            yield key.replace("_", "-"), "must not be negative"
    for key in ("serial", "keeps"):
        if not 0 <= getattr(row, key) <= 1:
            yield key, "must be a share, from 0 to 1"
    if row.basis == "here":
        yield "basis", "'here' is said of this machine's own builds only"


def estimate(records: Iterable[Record], works: Iterable[Work], machine: Machine, *, download: int = 0) -> Estimate:
    """What the works will take on a machine, one after the other.

    Of each quantity the best known record counts: this machine's own, then measured, scaled and reported ones; of these
    one that holds for fewer cases, then the later one.
    """
    known = tuple(records)
    return Estimate(machine=machine, steps=tuple(_step(known, work, machine) for work in works),
                    download=download)  # fmt: skip


def _step(records: Sequence[Record], work: Work, machine: Machine) -> Step:
    if work.done == 1.0:
        return Step(work=work, jobs=machine.jobs(work), cpu_seconds=0, seconds=0, memory=0, disk=0)
    fitting = sorted((one for one in reversed(records) if one.is_for(work)), key=_rank)
    jobs = machine.jobs(work)
    time = _first(fitting, lambda one: one.cpu(work))
    ram = _first(fitting, lambda one: one.ram(jobs))
    room = _first(fitting, lambda one: one.room(work))
    used = tuple(one for one in fitting if one in (time, ram, room))
    disk = room.room(work) if room else None
    step = Step(
        work=work, jobs=jobs, memory=_larger(ram.ram(jobs) if ram else None, work.memory),
        disk=_larger(disk, work.disk), keeps=round((disk or 0) * room.keeps) if room else 0, records=used,
        also=tuple(one for one in fitting if one not in used),
    )  # fmt: skip
    if time is None:
        return step
    cpu = (time.cpu(work) or 0) * (1 - work.done)
    return replace(step, cpu_seconds=cpu, seconds=_wall(cpu, time.serial, jobs), basis=time.basis,
                   at_least=time.at_least)  # fmt: skip


def _first(records: Sequence[Record], quantity: Callable[[Record], float | None]) -> Record | None:
    """The first that holds a quantity."""
    return next((one for one in records if quantity(one) is not None), None)


def _rank(one: Record) -> tuple[int, int]:
    bounds = (one.versions, one.cuda is not None, one.sm, one.machine, one.gpus)
    narrow = sum(map(bool, bounds)) + len(one.settings)
    return _BASES.index(one.basis), -narrow


def _wall(cpu: float, serial: float, jobs: int) -> float:
    """Amdahl's law: one core does the serial share, all jobs the rest."""
    return cpu * (serial + (1 - serial) / jobs)


def _larger(known: int | None, asked: int) -> int | None:
    return max(known or 0, asked) or known


def _sum(terms: Iterable[tuple[float | None, float]]) -> float | None:
    known = [value * times for value, times in terms if value is not None]
    return sum(known) if known else None


def spoken_time(seconds: float) -> str:
    """A duration for a person: `4.2 h`, `35 min`, `94 s`."""
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h".replace(".0 h", " h")
    return f"{seconds / 60:.0f} min" if seconds >= 600 else f"{seconds:.0f} s"


def release_of(version: str) -> str:
    """A version without its local label: records hold for all builds of a release."""
    return Version(version).public
