"""What a worker does for one step of a matrix of targets, on this machine or another.

A step leaves what it makes in the store, under a key that only depends on its inputs. Its value says what it was.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import composer
from composer.errors import HostError
from composer.events import Event, Listener
from composer.model.finding import Finding
from composer.model.lock import LockedPackage
from composer.model.plan import WheelPlan
from composer.remote import Traffic
from composer.steps.artifact import artifact_path
from composer.steps.base import compiler, find_interpreter, interpreter_key, interpreter_layer
from composer.steps.build import (
    Settings,
    build,
    compose_layer,
    fetch_some,
    known_layer,
    prepare,
    read_patches,
    sources,
    wanted_objects,
)
from composer.steps.edit import Tools
from composer.steps.layer import find_layer
from composer.steps.outline import Outline, Request, outline
from composer.steps.plan import Options, draft_wheels, wheel_key
from composer.steps.source import find_built
from composer.steps.survey import (
    Survey,
    Wanted,
    WheelFile,
    objects_key,
    read_objects,
    survey_key,
    survey_wheels,
)
from composer.store import Store

Step = Literal["fetch", "source", "interpreter", "survey", "objects", "plan", "layer", "pack"]
#: The kind of an object that is left in the store for workers, to check that they see it.
MEETING = "meeting"
#: Outlines that a worker remembers.
_REMEMBERED = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One target of a matrix. output: the folder of its bundle. store: its root, None for the worker's own.

    remote, remote_key: behind the store, as of `Store.here`.
    """

    request: Request
    options: Options
    settings: Settings
    output: Path
    store: Path | None = None
    remote: str | None = None
    remote_key: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One step for a worker. subject: its distribution or target. key: of what it makes.

    digests: of `fetch`, sha256 of what is fetched. plan: of `layer`. tried: of `plan`, keys of what it was to wait for
    and that were made, wherever that was.
    """

    step: Step
    subject: str
    key: str
    order: Order
    digests: frozenset[str] = frozenset()
    plan: WheelPlan | None = None
    tried: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Lack:
    """Something that must be made before a plan. size: bytes that are to be read for it. memory: bytes it takes."""

    step: Step
    key: str
    subject: str
    size: int
    memory: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A step's result is in the store. size: its bytes. known: it was there already."""

    size: int
    known: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLayer:
    """A layer of a plan. size: bytes of the wheel's files. known: compressed bytes of one that the store has."""

    key: str
    plan: WheelPlan
    size: int
    known: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A plan that was made. name: of the bundle."""

    name: str
    layers: tuple[PlannedLayer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A bundle. parts: compressed bytes of its layers' parts, by their digest. proving: seconds that imports took."""

    path: Path
    sha256: str
    size: int
    up_to_date: bool
    parts: Mapping[str, int]
    proving: float
    findings: tuple[Finding, ...]


Value = Made | Planned | Packed | tuple[Lack, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of a step. traffic: what it took from the remote and put there."""

    value: Value
    traffic: Traffic


def perform(task: Task, listener: Listener) -> Outcome:
    """Do one step. `plan` returns what it lacks instead, if that can be made by others. Raises as the step does.

    What it made is where others find it when this returns: with a remote, uploaded.
    """
    value = _STEPS[task.step](task, listener)
    traffic = _store(task.order).finish()
    for warning in traffic.warnings:
        listener(Event(step=task.step, subject=task.subject, note=warning))
    return Outcome(value=value, traffic=traffic)


def meet(key: str, remote: str | None, remote_key: Path | None) -> tuple[str, str, bool]:
    """What must be the same on all workers: composer's version, SOURCE_DATE_EPOCH, and the store: it has this value."""
    seen = Store.here(None, remote, remote_key).load(MEETING, key, str) == key
    return composer.__version__, os.environ.get("SOURCE_DATE_EPOCH", ""), seen


# --- what a worker remembers ------------------------------------------------------------------------------------------


def _store(order: Order) -> Store:
    return _opened(order.store, order.remote, order.remote_key)


@functools.lru_cache(maxsize=_REMEMBERED)
def _opened(root: Path | None, remote: str | None, remote_key: Path | None) -> Store:
    return Store.here(root, remote, remote_key)


@functools.lru_cache(maxsize=_REMEMBERED)
def _outline(order: Order) -> Outline:
    return outline(order.request, _store(order))


@functools.lru_cache(maxsize=_REMEMBERED)
def _compiler(order: Order) -> Path | None:
    """The interpreter that compiles modules. An archive is unpacked once, into scratch that ends with the process."""
    return _KEPT.enter_context(compiler(_store(order), _outline(order).interpreter))


_KEPT = contextlib.ExitStack()


# --- steps ------------------------------------------------------------------------------------------------------------


def _fetch(task: Task, listener: Listener) -> Made:
    order, decided = task.order, _outline(task.order)
    wanted = [one for one in sources(decided) if any(file.sha256 in task.digests for file in one.artifacts)]
    fetched = fetch_some(wanted, decided, _store(order), order.settings, listener)
    return Made(size=sum(path.stat().st_size for path in fetched.paths.values()))


def _source(task: Task, listener: Listener) -> Made:
    job = _outline(task.order).sourcing.builds[task.subject]
    result = replace(job, listener=listener).run()
    return Made(size=result.path.stat().st_size, known=result.cached)


def _interpreter(task: Task, _listener: Listener) -> Made:
    store = _store(task.order)
    facts = interpreter_layer(store, _outline(task.order).interpreter, task.order.options)
    layer = find_layer(store, facts.key)
    return Made(size=layer.compressed if layer else 0)


def _survey(task: Task, listener: Listener) -> Made:
    wheel = _wheel(task, listener)
    _surveyed(task, wheel, listener)
    return Made(size=wheel.path.stat().st_size)


def _objects(task: Task, listener: Listener) -> Made:
    wheel = _wheel(task, listener)
    wanted = _wanted(task.order, task.subject, wheel, _surveyed(task, wheel, listener))
    read_objects(_store(task.order), {task.subject: wanted}, task.order.options.level, jobs=1, listener=listener)
    return Made(size=wheel.path.stat().st_size)


def _plan(task: Task, listener: Listener) -> Planned | tuple[Lack, ...]:
    order, decided = task.order, _outline(task.order)
    for stage in (_artifacts, _looks, _object_reads):
        if lacks := tuple(one for one in stage(order, decided) if one.key not in task.tried):
            return lacks
    prepared = prepare(decided, _store(order), order.settings, order.options, listener)
    layers = []
    for key, plan in prepared.wheels.items():
        layer = prepared.known[key]
        layers.append(PlannedLayer(key=key, plan=plan, size=prepared.sizes[key],
                                   known=layer.compressed if layer else None))  # fmt: skip
    return Planned(name=prepared.outline.name, layers=tuple(layers))


def _layer(task: Task, listener: Listener) -> Made:
    plan, store = task.plan, _store(task.order)
    assert plan is not None
    if wheel_key(plan) != task.key:
        raise HostError("this worker would make another layer", where=task.subject,
                        why="its zstandard, patchelf or composer is of another version",
                        fix="Install the same versions on all workers.")  # fmt: skip
    if layer := known_layer(store, task.key, told=True):
        return Made(size=layer.compressed, known=True)
    tools = Tools(python=_compiler(task.order), patches=read_patches(_outline(task.order), [plan]))
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        listener(Event(step="layer", subject=plan.name, done=done))

    return Made(size=compose_layer(store, task.key, plan, _wheel(task, listener).path, tools, progress).compressed)


def _pack(task: Task, listener: Listener) -> Packed:
    order, store = task.order, _store(task.order)
    proving = _Stopwatch()

    def told(event: Event) -> None:
        proving.look(event)
        listener(event)

    prepared = prepare(_outline(order), store, order.settings, order.options, told)
    output = order.output.absolute() / f"{prepared.outline.name}.tar.zst"
    built = build(prepared, store, order.settings, output, told)
    parts = {part.digest: part.compressed for layer in built.manifest.layers for part in layer.parts}
    return Packed(path=built.path, sha256=built.digest, size=built.path.stat().st_size, up_to_date=built.up_to_date,
                  parts=parts, proving=proving.seconds, findings=built.findings)  # fmt: skip


_STEPS: Mapping[Step, Callable[[Task, Listener], Value]] = {
    "fetch": _fetch, "source": _source, "interpreter": _interpreter, "survey": _survey, "objects": _objects,
    "plan": _plan, "layer": _layer, "pack": _pack,
}  # fmt: skip


@dataclass(slots=True)
class _Stopwatch:
    """How long the proof by imports took: from unpacking to its end."""

    seconds: float = 0.0
    _begun: float | None = field(default=None)

    def look(self, event: Event) -> None:
        if event.step in ("unpack", "import") and self._begun is None:
            self._begun = time.monotonic()
        if event.step == "import" and event.finished and self._begun is not None:
            self.seconds = time.monotonic() - self._begun


# --- what a plan lacks ------------------------------------------------------------------------------------------------


def _artifacts(order: Order, decided: Outline) -> Iterator[Lack]:
    """Downloads, and builds from source."""
    store = _store(order)
    for package in sources(decided):
        for one in package.artifacts:
            if not artifact_path(store.root, one).is_file():
                yield Lack(step="fetch", key=one.sha256, subject=one.filename, size=one.size or 0)
    for name, job in decided.sourcing.builds.items():
        if find_built(job) is None:
            yield Lack(step="source", key=job.key, subject=name, size=job.source.size, memory=job.build.memory)


def _looks(order: Order, decided: Outline) -> Iterator[Lack]:
    """The interpreter, and surveys of wheels that are here."""
    store, interpreter = _store(order), decided.interpreter
    state = interpreter_key(interpreter, order.options)
    if find_interpreter(store, state) is None:
        yield Lack(step="interpreter", key=state, subject=interpreter.label, size=0)
    for package, wheel in _wheels(order, decided):
        key = survey_key(wheel.sha256, decided.target.python)
        if not store.path("survey", key, ".json").is_file():
            yield Lack(step="survey", key=key, subject=package.name, size=wheel.path.stat().st_size)


def _object_reads(order: Order, decided: Outline) -> Iterator[Lack]:
    """Facts of the shared objects of surveyed wheels."""
    store = _store(order)
    for package, wheel in _wheels(order, decided):
        survey = store.load("survey", survey_key(wheel.sha256, decided.target.python), Survey)
        if survey is None:
            continue
        wanted = _wanted(order, package.name, wheel, survey)
        key = objects_key(wanted)
        if wanted.files and not store.path("objects", key, ".json").is_file():
            largest = max(file.member.size for file in wanted.files)
            yield Lack(step="objects", key=key, subject=package.name, size=sum(f.member.size for f in wanted.files),
                       memory=largest)  # fmt: skip


def _wheels(order: Order, decided: Outline) -> Iterator[tuple[LockedPackage, WheelFile]]:
    """The wheels that are in the store; of those built from source the plan finds out by itself."""
    store = _store(order)
    for package in decided.packages:
        path = artifact_path(store.root, package.artifacts[0])
        if path.is_file():
            yield package, WheelFile(path=path, sha256=package.artifacts[0].sha256)


def _wanted(order: Order, name: str, wheel: WheelFile, survey: Survey) -> Wanted:
    decided = _outline(order)
    alone = replace(decided, packages=tuple(one for one in decided.packages if one.name == name))
    (draft,) = draft_wheels(alone, {name: survey}, order.options, None)
    return wanted_objects(draft, survey, wheel)


def _surveyed(task: Task, wheel: WheelFile, listener: Listener) -> Survey:
    python = _outline(task.order).target.python
    return survey_wheels(_store(task.order), {task.subject: wheel}, python, jobs=1, listener=listener)[task.subject]


def _wheel(task: Task, listener: Listener) -> WheelFile:
    """The wheel of the task's distribution, built or fetched if need be."""
    order, decided = task.order, _outline(task.order)
    if job := decided.sourcing.builds.get(task.subject):
        built = replace(job, listener=listener).run()
        return WheelFile(path=built.path, sha256=built.wheel.sha256)
    (package,) = (one for one in decided.packages if one.name == task.subject)
    fetched = fetch_some([package], decided, _store(order), order.settings, listener)
    sha256 = package.artifacts[0].sha256
    return WheelFile(path=fetched.paths[sha256], sha256=sha256)
