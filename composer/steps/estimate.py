"""What a whole plan will take: downloads, a toolchain, builds from source, and composing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from composer.errors import ComposerError
from composer.events import Listener, silent
from composer.model.estimate import Estimate, Machine, Work, build_work, estimate
from composer.model.lock import Artifact
from composer.steps.artifact import artifact_path
from composer.steps.budget import load_records, machine_here, records_here, share_done
from composer.steps.build import Settings, at_hand, build_sources, prepare, sources, summarise
from composer.steps.outline import Outline
from composer.steps.plan import Options
from composer.steps.source import Job
from composer.steps.survey import _VERSION as _SURVEY_VERSION
from composer.steps.toolchain import choose_toolchain
from composer.store import Store, key_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """How and where a plan is to be carried out. jobs: as of `-j`, None for the machine's.

    machine: an imagined one, where nothing is at hand yet; None for this one. source: components that are built there
    from source, although the outline takes their wheels.
    """

    settings: Settings
    options: Options
    output: Path
    jobs: int | None = None
    machine: Machine | None = None
    source: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanEstimate:
    """What a plan will take. name: of the bundle. notes: what a reader should know."""

    name: str
    estimate: Estimate
    notes: tuple[str, ...]


def estimate_plan(decided: Outline, store: Store, site: Site, listener: Listener = silent) -> PlanEstimate:
    """Estimate a plan. Nothing is downloaded or compiled.

    Which layers are in the store is known once all wheels are here and were looked into by an earlier plan or build;
    until then all count as to be made.
    """
    builds = list(_build_works(decided, site))
    toolchains, notes = _toolchains(decided, store, site, builds)
    if site.machine is None and _was_planned(decided, store, site.settings):
        composing, state = _what_is_left(decided, store, site, listener)
        notes += [state]
    else:
        composing = _everything(decided, site)
    declined = decided.sourcing.declined if site.machine is None else {}
    notes += [f"{name} is not built from source: {why}" for name, why in declined.items()]
    known = (*records_here(store), *load_records())
    machine = site.machine or machine_here(store)
    whole = estimate(known, [*toolchains, *builds, *composing], machine, download=_download(decided, store, site))
    return PlanEstimate(name=decided.name, estimate=whole, notes=tuple(notes))


def _build_works(decided: Outline, site: Site) -> Iterator[Work]:
    """Builds from source; here what an earlier run did is done, and what the store has is no work."""
    for job in decided.sourcing.builds.values():
        yield _build_work(job, site)
    for name in site.source:
        component = decided.recipe.component_of(name)
        yield build_work(component, decided.target, jobs=site.jobs)


def _build_work(job: Job, site: Site) -> Work:
    here = site.machine is None
    return build_work(job.request.component, job.request.target, jobs=job.jobs if here else site.jobs,
                      done=share_done(job) if here else 0.0)  # fmt: skip


def _toolchains(decided: Outline, store: Store, site: Site, builds: Iterable[Work]) -> tuple[list[Work], list[str]]:
    """The toolchain to be put together from wheels, and a note where none is to be had on this machine."""
    works: dict[str, Work] = {}
    notes = []
    for one in builds:
        if not one.cuda or one.build is None or one.done == 1.0:
            continue
        target = decided.target
        try:
            choice = choose_toolchain(target.cuda, one.sms or target.sms, target.machine, store,
                                      libraries=one.build.cuda_libraries)  # fmt: skip
        except ComposerError as fault:
            notes.append(f"{one.what}: {fault.what} on this machine")
            continue
        wheels = choice.candidate.wheels
        if wheels and not (choice.candidate.made and site.machine is None):
            size = sum(artifact.size for artifact in wheels.artifacts)
            works[wheels.key] = Work(name="toolchain", what=f"make {wheels.name}", settings={"name": wheels.name},
                                     size=size)  # fmt: skip
    return list(works.values()), notes


def _was_planned(decided: Outline, store: Store, settings: Settings) -> bool:
    """Whether to plan again is a matter of seconds: everything is here, and every wheel was looked into."""
    return at_hand(decided, store, settings) and all(
        store.path("survey", key_of("survey", _SURVEY_VERSION, artifact=artifact.sha256, python=decided.target.python),
                   ".json").is_file()
        for package in decided.packages if not package.optional for artifact in package.artifacts
    )  # fmt: skip


def _what_is_left(decided: Outline, store: Store, site: Site, listener: Listener) -> tuple[list[Work], str]:
    """Layers that the store does not have, and packing."""
    settings = replace(site.settings, offline=True)
    summary = summarise(prepare(decided, store, settings, site.options, listener), site.output)
    todo = [layer for layer in summary.layers if not layer.cached]
    state = f"{len(summary.layers) - len(todo)} of {len(summary.layers)} layers are in the store"
    if summary.up_to_date:
        return [], f"{summary.output} is up to date"
    layers = _step("layers", "make layers", sum(layer.size for layer in todo), site)
    pack = _step("pack", "pack the bundle", sum(layer.size for layer in summary.layers), site)
    return ([layers, pack] if todo else [pack]), state


def _everything(decided: Outline, site: Site) -> list[Work]:
    """Composing all of it. What is built from source counts with the size of its locked wheel."""
    packages = [*decided.packages, *(one for one in decided.lock.packages if one.name in decided.sourcing.builds)]
    size = sum(artifact.size for package in packages for artifact in package.artifacts)
    return [_step("compose", "compose all layers", size, site), _step("pack", "pack the bundle", size, site)]


def _step(name: str, what: str, size: int, site: Site) -> Work:
    """One of composer's own steps, over so many bytes of wheels."""
    options = site.options
    settings = {"slim": options.slim, "compress": options.compress, "bytecode": "yes" if options.bytecode else "no"}
    return Work(name=name, what=what, size=size, settings=settings, jobs=site.jobs)


def _download(decided: Outline, store: Store, site: Site) -> int:
    """Bytes that are neither in the store nor in a wheelhouse; on an imagined machine nothing is."""
    packages = [*(one for one in sources(decided) if one.name not in site.source), *build_sources(decided)]
    wanted = {artifact.sha256: artifact for package in packages for artifact in package.artifacts}
    builds = (decided.recipe.component_of(name).build for name in site.source)
    released = sum(build.size or 0 for build in builds if build)
    missing = [one for one in wanted.values() if site.machine or not _is_here(decided, store, site, one)]
    return released + sum(one.size for one in missing)


def _is_here(decided: Outline, store: Store, site: Site, artifact: Artifact) -> bool:
    local = decided.local_files().get(artifact.sha256)
    houses = [folder / artifact.filename for folder in site.settings.wheelhouses]
    places = [artifact_path(store.root, artifact), *houses, *([local.path] if local else [])]
    return any(place.is_file() for place in places)
