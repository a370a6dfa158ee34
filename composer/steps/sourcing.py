"""What comes from source: which components of a stack are built instead of taken as wheels, and building them.

Nothing is built while this is decided, and nothing is downloaded but what an index says of build requirements.
"""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from packaging.version import Version

from composer._fs import host_errors
from composer.errors import ComposerError, HostError, RecipeError, WheelError
from composer.events import Listener
from composer.formats.wheel import parse_wheel_name
from composer.interpreter import choose_python
from composer.model.lock import FILE, Artifact, Lock, LockedPackage
from composer.model.plan import BuiltFacts, LeftOut
from composer.model.recipe import Component, Recipe, RequiresEdit
from composer.model.source import local_version
from composer.model.target import Target, sm_text
from composer.steps.artifact import artifact_path
from composer.steps.budget import within_budget
from composer.steps.download import is_reachable
from composer.steps.load import LoadedRecipe, LocalFile
from composer.steps.locks import LockOptions
from composer.steps.resolve import fits
from composer.steps.source import Job, Request, Result, find_built, prepare_build
from composer.store import Store

TORCH = "torch"
#: Seconds that a build may take here which nobody asked for by name.
DEFAULT_BUDGET = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What the user wants from source. torch: `auto`, `wheel`, `source`, or the path of a wheel. no_binary: names.

    budget: seconds that a build may take which is not asked for. jobs: compilers at a time, at most.
    """

    torch: str = "auto"
    no_binary: Sequence[str] = ()
    budget: float = DEFAULT_BUDGET
    jobs: int | None = None
    lock: LockOptions = field(default_factory=LockOptions)
    wheelhouses: Sequence[Path] = ()

    @property
    def torch_wheel(self) -> Path | None:
        """The wheel that is to be PyTorch."""
        return Path(self.torch) if self.torch.endswith(".whl") else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sourcing:
    """The decision. builds: what is built, by name. declined: why a component that could be is not.

    given: the wheel that the user named, and where it is.
    """

    builds: Mapping[str, Job] = field(default_factory=dict)
    declined: Mapping[str, str] = field(default_factory=dict)
    given: tuple[LockedPackage, LocalFile] | None = None

    @property
    def own(self) -> frozenset[str]:
        """Distributions that do not come from the lock."""
        return frozenset([*self.builds, *([self.given[0].name] if self.given else [])])

    def for_one_cpu(self, recipe: Recipe) -> list[str]:
        """Distributions whose code is for the target's CPU and newer ones only."""
        return [name for name in sorted(self.own) if (build := recipe.component_of(name).build) and build.uses("isa")]

    def left_out(self, lock: Lock) -> tuple[LeftOut, ...]:
        """What the lock has and wheels that are built do not need."""
        return tuple(
            LeftOut(name=name, version=lock.pins[name], reason=rule.reason)
            for job in self.builds.values() for rule in job.build.without for name in rule.names if name in lock.pins
        )  # fmt: skip

    def requires_edits(self) -> tuple[RequiresEdit, ...]:
        """Nobody else may require what is left out."""
        rules = (rule for job in self.builds.values() for rule in job.build.without)
        return tuple(RequiresEdit(name=name, reason=rule.reason) for rule in rules for name in rule.names)


def decide(loaded: LoadedRecipe, target: Target, flags: tuple[str, ...], lock: Lock, wishes: Wishes,
           store: Store) -> Sourcing:  # fmt: skip
    """Which components come from source. flags: of the compiler, for the target's CPU.

    What was asked for raises why it cannot be had (see `composer.steps.source.build_wheel`); what was not is declined
    with that reason.
    """
    _check_names(loaded, wishes)
    builds, declined = {}, {}
    for component in loaded.recipe.component:
        if not loaded.recipe.composed(component.name, target.sms):
            continue
        mode = _mode(component, wishes)
        if mode == "wheel" or (mode == "fallback" and _can_be_had(component, lock, wishes, store)):
            continue
        try:
            job = _job(loaded, component, target, flags, wishes, store)
            reason = None if mode == "source" else within_budget(job, wishes.budget)
        except ComposerError as fault:
            if mode == "source":
                raise
            reason = str(fault).partition("\n")[0]
        if reason is None:
            builds[component.name] = job
        else:
            declined[component.name] = reason
    path = wishes.torch_wheel
    given = _given(path, loaded.recipe.component_of(TORCH), lock, target) if path else None
    return Sourcing(builds=builds, declined=declined, given=given)


def _check_names(loaded: LoadedRecipe, wishes: Wishes) -> None:
    known = [one.name for one in loaded.recipe.component if one.build]
    fix = f"It can be for: {', '.join(known) or 'none of its components'}."
    RecipeError.collect([
        RecipeError(f"{loaded.recipe.name} does not say how {name!r} is built", where="--no-binary", fix=fix)
        for name in wishes.no_binary if name not in known
    ])  # fmt: skip
    if TORCH in wishes.no_binary and wishes.torch not in ("auto", "source"):
        raise RecipeError(f"--no-binary torch and --torch {wishes.torch} contradict each other", where="--torch",
                          fix="Give one of them.")  # fmt: skip
    torch = loaded.recipe.component_of(TORCH).build
    if wishes.torch == "wheel" and torch and not torch.prebuilt:
        raise RecipeError("no index has a wheel of this PyTorch", where="--torch", fix="Leave --torch out.")
    if wishes.torch == "source" and TORCH not in known:
        raise RecipeError(f"{loaded.recipe.name} does not say how PyTorch is built", where="--torch",
                          fix="Use --torch wheel, or add [component.build] to its component torch.")  # fmt: skip
    if wishes.torch not in ("auto", "wheel", "source") and wishes.torch_wheel is None:
        raise RecipeError(f"{wishes.torch!r} is not a way to have PyTorch", where="--torch",
                          fix="Give auto, wheel, source, or the path of a wheel.")  # fmt: skip


def _mode(component: Component, wishes: Wishes) -> str:
    """`source`, `wheel`, or `auto` or `fallback`, where it depends on this machine."""
    if component.build is None:
        return "wheel"
    if component.name in wishes.no_binary:
        return "source"
    if component.name == TORCH and wishes.torch != "auto":
        return "source" if wishes.torch == "source" else "wheel"
    return {"always": "source", "asked": "wheel"}.get(component.build.when, component.build.when)


def _can_be_had(component: Component, lock: Lock, wishes: Wishes, store: Store) -> bool:
    """Whether its wheel is here, or where the recipe says it is."""
    artifacts = [one for package in lock.packages if package.name == component.name for one in package.artifacts]
    return all(
        artifact_path(store.root, one).is_file()
        or any((folder / one.filename).is_file() for folder in wishes.wheelhouses)
        or (not wishes.lock.offline and (one.url is None or is_reachable(one.url)))
        for one in artifacts
    )


def _job(loaded: LoadedRecipe, component: Component, target: Target, flags: tuple[str, ...], wishes: Wishes,
         store: Store) -> Job:  # fmt: skip
    if target.machine != platform.machine():
        raise HostError(f"a {platform.machine()} machine cannot build for {target.machine}", where=component.name,
                        fix=f"Build it on {target.machine}, and give the wheel.")  # fmt: skip
    request = Request(
        loaded=loaded, component=component, target=target, flags=flags, python=choose_python((target.python,)),
        lock=wishes.lock, wheelhouses=wishes.wheelhouses, jobs=wishes.jobs,
    )  # fmt: skip
    return prepare_build(request, store)


def _given(path: Path, torch: Component, lock: Lock, target: Target) -> tuple[LockedPackage, LocalFile]:
    """The user's wheel of PyTorch in the place of the locked one. RecipeError for one that cannot take it."""
    if not path.is_file():
        raise RecipeError("no such file", where=f"--torch {path}", fix="Give the path of a wheel of PyTorch.")
    if fault := _unfit(path.name, lock, target) or _made_for_others(path.name, torch, target):
        raise RecipeError("cannot be PyTorch in this bundle", where=f"--torch {path}", why=fault,
                          fix="Give a wheel that was built for this recipe and target.")  # fmt: skip
    with host_errors(path), path.open("rb") as stream:
        sha256, size = hashlib.file_digest(stream, "sha256").hexdigest(), stream.tell()
    artifact = Artifact(filename=path.name, size=size, sha256=sha256)
    package = LockedPackage(name=TORCH, version=str(parse_wheel_name(path.name).version), index=FILE,
                            artifacts=(artifact,))  # fmt: skip
    return package, LocalFile(path=path.absolute(), key="--torch")


def _unfit(filename: str, lock: Lock, target: Target) -> str | None:
    """Everything else of the stack was made for the locked version, whatever it is built with."""
    try:
        name = parse_wheel_name(filename)
    except WheelError as fault:
        return fault.what
    if name.name != TORCH or TORCH not in lock.pins:
        return f"it is a wheel of {name.name}" if name.name != TORCH else "the stack holds no PyTorch"
    if name.version.public != Version(lock.pins[TORCH]).public:
        return f"it is version {name.version.public}, and the stack is locked with {lock.pins[TORCH]}"
    if not fits(filename, target.python, target.platforms):
        return f"it is not for CPython {target.python} on {target.machine}"
    return None


def _made_for_others(filename: str, torch: Component, target: Target) -> str | None:
    """The label of a wheel that composer built names the target; other labels, such as `cu128`, say nothing of it."""
    label = parse_wheel_name(filename).version.local or ""
    if not _gpus_of(label) or torch.build is None:
        return None
    wanted = str(local_version(torch.version or "0", torch.build, sms=target.sms, isa=target.isa).local)
    cpus = [set(one.split(".")) - _gpus_of(one) for one in (label, wanted)]
    covers = "all" in _gpus_of(label) or {f"sm{sm}" for sm in target.sms} <= _gpus_of(label)
    return None if covers and cpus[0] == cpus[1] else f"it was built for {label}, and the bundle is for {wanted}"


def _gpus_of(label: str) -> set[str]:
    return {part for part in label.split(".") if re.fullmatch(r"sm\d+|all", part)}


# --- building ---------------------------------------------------------------------------------------------------------


def is_built(sourcing: Sourcing) -> bool:
    """Whether nothing is left to be compiled."""
    return all(find_built(job) for job in sourcing.builds.values())


def build_all(sourcing: Sourcing, listener: Listener) -> Iterator[tuple[LockedPackage, Result]]:
    """Each build as something at hand; one after another, because each takes all cores. Raises as `build_wheel`."""
    for name, job in sourcing.builds.items():
        result = replace(job, listener=listener).run()
        package = LockedPackage(name=name, version=str(job.request.version), index=FILE,
                                artifacts=(result.wheel.artifact(),))  # fmt: skip
        yield package, result


def facts(job: Job) -> BuiltFacts:
    """For the plan and the manifest."""
    return BuiltFacts(name=job.request.component.name, version=str(job.request.version), key=job.key,
                      source=job.source.identity)  # fmt: skip


def about_torch(sourcing: Sourcing, lock: Lock) -> str:
    """How PyTorch is had, in words."""
    if job := sourcing.builds.get(TORCH):
        target = job.request.target
        return f"PyTorch {job.request.version}: built from source for {sm_text(target.sms)} and {target.isa}"
    if sourcing.given:
        return f"PyTorch {sourcing.given[0].version}: from the wheel that was given"
    version = lock.pins.get(TORCH)
    if version is None:
        return "the stack holds no PyTorch"
    why = f" (not built from source: {sourcing.declined[TORCH]})" if TORCH in sourcing.declined else ""
    return f"PyTorch {version}: prebuilt wheel{why}, ISA by run-time dispatch"
