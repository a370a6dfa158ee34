"""What a source build will take on this machine, and whether one that nobody asked for by name may be started."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from composer._fs import host_errors
from composer.errors import FetchError, HostError
from composer.formats.wheel import parse_wheel_name
from composer.model.estimate import Estimate, Machine, Record, build_work, estimate, parse_records, spoken_time
from composer.model.lock import LockedPackage
from composer.steps.artifact import artifact_path
from composer.steps.download import find_sdist, is_reachable
from composer.steps.load import _parse, _read, data_root
from composer.steps.source import BuiltWheel, Job, find_built
from composer.steps.source_machine import check_room, memory_here
from composer.store import Store

_KIND = "source"
_ALMOST = 0.99
_NINJA = re.compile(rb"^\s*\[(\d+)/(\d+)\]", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Whether to build, why in plain words, and what is expected, where it came to that."""

    build: bool
    reason: str
    expected: Estimate | None = None


def load_records() -> tuple[Record, ...]:
    """The records that composer brings along."""
    path = data_root() / "recipes" / "measured.toml"
    return parse_records(_parse(_read(path), path), path.name)


def records_here(store: Store) -> tuple[Record, ...]:
    """What builds took whose records are in the store.

    Of several of one kind the longest counts: the others may have used what an earlier one had compiled.
    """
    longest: dict[bytes, Record] = {}
    for wheel in _built(store):
        if record := _record(wheel):
            kind = msgspec.json.encode(msgspec.structs.replace(record, how="", cpu_seconds=0, job_memory=0, disk=0))
            longest[kind] = max(longest.get(kind, record), record, key=lambda one: one.cpu_seconds or 0)
    return tuple(longest.values())


def _built(store: Store) -> Iterator[BuiltWheel]:
    folder = store.root / "objects" / _KIND
    with host_errors(folder):
        keys = sorted(path.stem for path in folder.glob("*/*.json"))
    yield from (wheel for key in keys if (wheel := store.load(_KIND, key, BuiltWheel)))


def _record(wheel: BuiltWheel) -> Record | None:
    """None for one that says nothing of its time, or was built for `all` GPUs and does not say how many that are."""
    name = parse_wheel_name(wheel.filename)
    labels = (name.version.local or "").split(".")
    if not wheel.cpu_seconds or "all" in labels:
        return None
    return Record(
        name=name.name, versions=f"=={name.version.public}", cuda="toolchain" in wheel.inputs.get("tools", {}),
        machine=str(wheel.inputs.get("machine", "")), gpus=sum(one.startswith("sm") for one in labels) or None,
        settings={**wheel.inputs.get("environment", {}), **wheel.inputs.get("config", {})}, basis="here",
        by="this machine",
        how=f"{name.name} {name.version}: {spoken_time(wheel.seconds)} with {wheel.jobs} jobs",
        cpu_seconds=wheel.cpu_seconds, job_memory=wheel.memory or None, disk=wheel.disk or None,
    )  # fmt: skip


def machine_here(store: Store) -> Machine:
    """This machine, as far as a build may use it; the disk is the store's."""
    with host_errors(store.root):
        free = shutil.disk_usage(store.root).free
    return Machine(cores=len(os.sched_getaffinity(0)), memory=memory_here(), disk=free)


def estimate_build(job: Job) -> Estimate:
    """What a build, or what is left of it, will take here."""
    request = job.request
    work = build_work(request.component, request.target, jobs=job.jobs, done=share_done(job))
    return estimate((*records_here(job.store), *load_records()), [work], machine_here(job.store))


def share_done(job: Job) -> float:
    """How much of a build an earlier run has done: 1.0 when its wheel is there, else as far as ninja told."""
    if find_built(job):
        return 1.0
    if not (job.folder.is_dir() and job.log.is_file()):
        return 0.0
    with host_errors(job.log):
        told = [(int(done), int(total)) for done, total in _NINJA.findall(job.log.read_bytes())]
    if not told:
        return 0.0
    # A run that goes on counts only what is left.
    done, total = told[-1]
    # Failed steps count as done, too: what is left to link and to pack is never nothing.
    return min(_ALMOST, 1 - (total - done) / max(of for _, of in told))


def within_budget(job: Job, seconds: float) -> str | None:
    """Why a build may not be made here that nobody asked for by name; None if it may. seconds: of wall clock."""
    decision = consider(job, seconds)
    return None if decision.build else decision.reason


def consider(job: Job, seconds: float) -> Decision:
    """Whether a build may be made within so many seconds of wall clock.

    What is known at once is looked at first, and last whether a server has the source.
    """
    if find_built(job):
        return Decision(build=True, reason="it was built before")
    expected = estimate_build(job)
    reason = _too_small(job, expected) or _too_long(expected, seconds) or _out_of_reach(job)
    return Decision(build=reason is None, expected=expected,
                    reason=reason or f"{_time(expected)}, within the budget of {spoken_time(seconds)}")  # fmt: skip


def _too_small(job: Job, expected: Estimate) -> str | None:
    """Why this machine has not the memory or the disk."""
    (step,) = expected.steps
    least = max(one.ram(1) or 0 for one in step.records) if step.records else 0
    if expected.machine.memory < (needed := max(job.build.memory, least)):
        return f"too little memory: {expected.machine.memory / 1e9:.1f} of {needed / 1e9:.1f} GB"
    try:
        check_room(job.build, job.subject, job.store.root, job.folder, job.source.size)
    except HostError as fault:
        return f"{fault.what}: {fault.why}"
    return None


def _too_long(expected: Estimate, seconds: float) -> str | None:
    (step,) = expected.steps
    if step.seconds is None:
        return "no record says how long it takes"
    late = step.seconds > seconds
    return f"{_time(expected)} is more than the budget of {spoken_time(seconds)}" if late else None


def _time(expected: Estimate) -> str:
    return f"{'at least' if expected.at_least else 'estimated'} {spoken_time(expected.seconds)}"


def _out_of_reach(job: Job) -> str | None:
    """Why what it is made of cannot be had; None when all is at hand, or whoever has the source answers."""
    missing = [one for one in [*job.packages(), *_toolkit(job)] if not _is_at_hand(job, one)]
    if job.request.lock.offline and (missing or job.source.git):
        names = sorted({one.name for one in missing} | ({job.request.component.name} if job.source.git else set()))
        return f"offline, and not at hand: {', '.join(names)}"
    asked = job.source.git is not None or job.source.package in missing
    return "its source cannot be reached" if asked and not _answers(job) else None


def _toolkit(job: Job) -> list[LockedPackage]:
    """The wheels of a toolchain that is not made yet."""
    candidate = job.choice.candidate if job.choice else None
    if candidate is None or candidate.wheels is None or candidate.made:
        return []
    return [one for one in candidate.wheels.lock.packages if one.name in candidate.wheels.packages]


def _is_at_hand(job: Job, package: LockedPackage) -> bool:
    return all(
        artifact_path(job.store.root, one).is_file()
        or any((folder / one.filename).is_file() for folder in job.request.wheelhouses)
        for one in package.artifacts
    )


def _answers(job: Job) -> bool:
    """Whether the source is where the recipe says. A repository is asked as git asks (gitprotocol-http)."""
    component, indexes = job.request.component, job.request.loaded.recipe.indexes
    if job.source.git is not None:
        return is_reachable(f"{job.source.git.rstrip('/')}/info/refs?service=git-upload-pack")
    if job.build.url is not None:
        return is_reachable(job.build.release(component.version or "")[0])
    try:
        return bool(find_sdist(component.name, component.version or "", component.index, indexes))
    except FetchError:
        return False
