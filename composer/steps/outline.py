"""The first half of planning: what a build is made from, decided without opening a wheel.

Target, interpreter, lock, the distributions that this target needs, and what PyTorch will be.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from composer.errors import HostError, RecipeError
from composer.interpreter import ArchiveProvider, Candidate, HostProvider, PathProvider, find_pythons
from composer.interpreter.find import inspect_python
from composer.model.input import Given, variables
from composer.model.lock import Artifact, Lock, LockedPackage
from composer.model.manifest import HOST
from composer.model.overlay import HOST_PYTHON, PRIVATE
from composer.model.plan import LeftOut
from composer.model.recipe import Archive, Recipe, RequiresEdit
from composer.model.target import Target, Targets
from composer.model.variant import Asked, Variant, choose
from composer.model.verdict import Serving, recipe_for, serving
from composer.steps.artifact import artifact_path
from composer.steps.download import is_reachable
from composer.steps.inputs import read_inputs
from composer.steps.load import LoadedRecipe, LocalFile, load_recipe, load_recipes, load_targets
from composer.steps.locks import LockOptions, ensure_lock
from composer.steps.sourcing import DEFAULT_BUDGET, TORCH, Sourcing, Wishes, about_torch, decide
from composer.store import Store

#: Composed where neither a recipe nor a variant is asked for.
DEFAULT_RECIPE = "sglang"
_MINOR = re.compile(r"\d\.\d+", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user asked for, as spelled on the command line.

    recipe: None is that of the variant, or else DEFAULT_RECIPE. sm, gpus, isa, variant: as of `Asked`.
    python: a minor version, the path of an interpreter, `host` or `host:MINOR`, or None for the recipe's preference.
    torch, no_binary, budget, jobs: as of `Wishes`. private: the bundle will hold what must not be passed on, so its
    name says so. overlays: names or paths. inputs: names and paths of the site's own files.
    """

    recipe: str | None = None
    sm: str | None = None
    gpus: Sequence[str] = ()
    isa: str | None = None
    variant: str | None = None
    python: str | None = None
    torch: str = "auto"
    no_binary: Sequence[str] = ()
    budget: float = DEFAULT_BUDGET
    jobs: int | None = None
    lock: LockOptions = field(default_factory=LockOptions)
    wheelhouses: Sequence[Path] = ()
    private: bool = False
    overlays: Sequence[str] = ()
    inputs: Sequence[tuple[str, Path]] = ()

    @property
    def asked(self) -> Asked:
        """The target."""
        minor = self.python if self.python and _MINOR.fullmatch(self.python) else None
        return Asked(sm=self.sm, gpus=self.gpus, isa=self.isa, python=minor, variant=self.variant)

    def python_for(self, variant: Variant | None) -> str | None:
        """Of a name of a variant, where no interpreter is asked for."""
        if variant is None or self.python not in (None, HOST):
            return self.python
        return f"{HOST}:{variant.python}" if self.python else variant.python

    @property
    def wishes(self) -> Wishes:
        """What is wanted from source."""
        return Wishes(torch=self.torch, no_binary=self.no_binary, budget=self.budget, jobs=self.jobs, lock=self.lock,
                      wheelhouses=self.wheelhouses)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpreter:
    """The chosen source of CPython.

    label: what the plan and the manifest call it; `host` where the bundle carries none. archive: what must be fetched
    before an ArchiveProvider can read it. compiler: what compiles modules here, if anything can, where the bundle's
    CPython is the host's or does not run on this machine.
    """

    minor: str
    label: str
    provider: PathProvider | ArchiveProvider | HostProvider
    archive: LockedPackage | None = None
    compiler: Candidate | None = None

    @property
    def runs_here(self) -> bool:
        """Whether the bundle carries a CPython that this machine can run."""
        provider = self.provider
        return isinstance(provider, PathProvider) or (
            isinstance(provider, ArchiveProvider) and provider.machine == platform.machine()
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """Everything decided before a wheel is opened.

    packages: what the bundle holds, but for what sourcing builds, which is a package only once it is built.
    not_served: where it was to be for all SMs that the recipe serves, why each other one is not among them.
    """

    loaded: LoadedRecipe
    target: Target
    interpreter: Interpreter
    lock: Lock
    packages: tuple[LockedPackage, ...]
    left_out: tuple[LeftOut, ...]
    warnings: tuple[str, ...]
    torch: str
    sourcing: Sourcing = field(default_factory=Sourcing)
    private: bool = False
    inputs: tuple[Given, ...] = ()
    targets: Targets
    not_served: Mapping[int, str] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return self.loaded.recipe

    def requires_edits(self) -> tuple[RequiresEdit, ...]:
        """Edits of requirements for this target."""
        return (*self.recipe.requires_edits(self.target.sms), *self.sourcing.requires_edits())

    @property
    def environment(self) -> Mapping[str, str]:
        """The bundle's own lines of etc/env: what was given takes the place of the recipe's."""
        return {**self.recipe.environment, **variables(self.inputs)}

    def local_files(self) -> Mapping[str, LocalFile]:
        """The files of this machine that are wheels of the stack, by their sha256."""
        given = self.sourcing.given
        more = {given[0].artifacts[0].sha256: given[1]} if given else {}
        return {**self.loaded.local_files(), **more}

    @property
    def name(self) -> str:
        """The bundle's name: what may be in one folder with another bundle has another name."""
        endings = ((HOST_PYTHON, self.interpreter.label == HOST), (PRIVATE, self.private))
        return "-".join([self.loaded.bundle_name(self.target), *(ending for ending, wanted in endings if wanted)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What a request asks for, as far as that is known without looking for anything.

    request: with the Python of its variant. target: with the recipe's first Python. served: what of its architectures
    the recipe composes, or why none.
    """

    request: Request
    variant: Variant | None
    loaded: LoadedRecipe
    target: Target
    served: Serving


def draft(request: Request, targets: Targets, loaded: LoadedRecipe | None = None) -> Draft:
    """RecipeError for unknown names, options that contradict each other, and a variant that no recipe composes.

    loaded: the recipe, where it was read before.
    """
    choice = choose(request.asked, targets)
    request = replace(request, python=request.python_for(choice.variant))
    loaded = loaded or _loaded(request, choice.isa, choice.variant, targets)
    target = Target(sms=choice.sms, isa=choice.isa, cuda=loaded.recipe.cuda, python=loaded.recipe.pythons[0],
                    machine=targets.isa[choice.isa].machine)  # fmt: skip
    return Draft(request=request, variant=choice.variant, loaded=loaded, target=target,
                 served=serving(loaded.recipe, target, targets))  # fmt: skip


def outline(request: Request, store: Store) -> Outline:
    """Decide. RecipeError, LockError or HostError when the request cannot be met."""
    targets = load_targets()
    drafted = draft(request, targets)
    request, loaded, served = drafted.request, drafted.loaded, drafted.served
    isa, machine = drafted.target.isa, drafted.target.machine
    # The SMs and ISA are checked before an interpreter is looked for: a refused target must not cost a search.
    RecipeError.collect(served.reasons)
    inputs = read_inputs(loaded.recipe, request.inputs)
    interpreter, notes = choose_interpreter(request, loaded.recipe, machine, store)
    target = replace(drafted.target, sms=served.sms, python=interpreter.minor)
    loaded.recipe.check_target(target)
    if drafted.variant and drafted.variant.python != target.python:
        raise RecipeError(f"the variant is for Python {drafted.variant.python}, and the interpreter is {target.python}",
                          where="--python", fix="Leave it out.")  # fmt: skip
    lock = ensure_lock(loaded, target.python, machine, request.lock)
    loaded = replace(loaded, recipe=loaded.recipe.on(machine))
    sourcing = decide(loaded, target, targets.isa[isa].flags, lock, request.wishes, store)
    packages, left_out = _select(loaded.recipe, lock, target.sms, sourcing)
    declined = [f"{name} is not built from source: {why}" for name, why in sourcing.declined.items() if name != TORCH]
    return Outline(
        loaded=loaded, target=target, interpreter=interpreter, lock=lock, packages=packages, left_out=left_out,
        warnings=(*notes, *declined), torch=about_torch(sourcing, lock), sourcing=sourcing, private=request.private,
        inputs=inputs, targets=targets, not_served=_not_served(served),
    )  # fmt: skip


def _loaded(request: Request, isa: str, variant: Variant | None, targets: Targets) -> LoadedRecipe:
    """The recipe that is asked for, or that of the variant, which must compose it."""
    machine = targets.isa[isa].machine
    if variant is None:
        return load_recipe(request.recipe or DEFAULT_RECIPE, request.overlays, machine)
    offered = {request.recipe: load_recipe(request.recipe, (), machine)} if request.recipe else load_recipes()
    spelling = recipe_for(variant, {name: one.recipe for name, one in offered.items()}, targets)
    return load_recipe(spelling, request.overlays, machine)


def _not_served(served: Serving) -> dict[int, str]:
    return {sm: "; ".join(one.why or one.what for one in faults) for sm, faults in served.left_out.items()}


def _select(recipe: Recipe, lock: Lock, sms: Sequence[int],
            sourcing: Sourcing) -> tuple[tuple[LockedPackage, ...], tuple[LeftOut, ...]]:  # fmt: skip
    composed = [one for one in lock.packages if recipe.composed(one.name, sms)]
    limited = [
        LeftOut(name=one.name, version=one.version, reason=recipe.component_of(one.name).reason or "")
        for one in lock.packages if one not in composed and not recipe.component_of(one.name).tool
    ]  # fmt: skip
    unneeded = sourcing.left_out(lock)
    gone = {one.name for one in unneeded} | sourcing.own
    given = [sourcing.given[0]] if sourcing.given else []
    return (*(one for one in composed if one.name not in gone), *given), (*limited, *unneeded)


def choose_interpreter(request: Request, recipe: Recipe, machine: str,
                       store: Store) -> tuple[Interpreter, tuple[str, ...]]:  # fmt: skip
    """The interpreter for a bundle, and what the plan should say about the choice.

    Of the recipe's minor versions, in order: an archive at hand or reachable, which runs on the oldest hosts; then
    what is installed on this machine.
    """
    if request.python and "/" in request.python:
        return _named(Path(request.python), machine), ()
    if request.python and request.python.partition(":")[0] == HOST:
        return _hosts(request.python, recipe, machine), ()
    minors = (request.python,) if request.python else recipe.pythons
    installed = find_pythons(minors) if machine == platform.machine() else ()
    unreachable = []
    for minor in minors:
        for archive in recipe.interpreter:
            if (archive.python, archive.machine) != (minor, machine):
                continue
            if _is_at_hand(archive, request, store):
                return _archived(archive, store), ()
            unreachable.append(minor)
        for one in installed:
            if one.minor == minor:
                note = f"CPython {minor} is this machine's {one.path}, because the archive of the recipe is not at hand"
                return _installed(minor, one.path, one.version, one.origin), (note,) if unreachable else ()
    raise HostError(
        f"no CPython {' or '.join(minors)} for {machine}", where="interpreter",
        why="neither the recipe's python-build-standalone archive nor an installed one can be had here",
        fix="Put the archive into a --wheelhouse folder, or give --python host for a bundle that uses the host's"
            f"{' or --python PATH' if machine == platform.machine() else ''}.",
    )  # fmt: skip


def _named(python: Path, machine: str) -> Interpreter:
    if machine != platform.machine():
        raise HostError(f"an interpreter of this machine does not run on {machine}", where=f"--python {python}",
                        fix="Leave it out, so that the recipe's archive is taken, or give --python host.")  # fmt: skip
    found = inspect_python(python)
    return _installed(found.minor, python, found.version, "--python")


def _hosts(asked: str, recipe: Recipe, machine: str) -> Interpreter:
    """No interpreter: `host` is the recipe's first minor version, `host:3.11` that one."""
    minor = asked.partition(":")[2] or recipe.pythons[0]
    if minor not in recipe.pythons:
        raise RecipeError(f"{recipe.name} {recipe.version} is not offered for Python {minor!r}", where="--python",
                          fix=f"Offered: {', '.join(f'{HOST}:{one}' for one in recipe.pythons)}.")  # fmt: skip
    return Interpreter(minor=minor, label=HOST, provider=HostProvider(machine=machine), compiler=_compiler(minor))


def _compiler(minor: str) -> Candidate | None:
    return next(iter(find_pythons((minor,))), None)


def archive_package(archive: Archive) -> LockedPackage:
    """An interpreter's archive as something to fetch."""
    filename = archive.url.rsplit("/", 1)[-1]
    artifact = Artifact(filename=filename, size=archive.size or 0, sha256=archive.sha256, url=archive.url)
    return LockedPackage(name="cpython", version=archive.python, index="url", artifacts=(artifact,))


def _is_at_hand(archive: Archive, request: Request, store: Store) -> bool:
    (artifact,) = archive_package(archive).artifacts
    places = [artifact_path(store.root, artifact), *(folder / artifact.filename for folder in request.wheelhouses)]
    return any(place.is_file() for place in places) or (not request.lock.offline and is_reachable(archive.url))


def _installed(minor: str, path: Path, version: str, origin: str) -> Interpreter:
    return Interpreter(minor=minor, label=f"CPython {version} ({origin})", provider=PathProvider(python=path))


def _archived(archive: Archive, store: Store) -> Interpreter:
    package = archive_package(archive)
    path = artifact_path(store.root, package.artifacts[0])
    foreign = archive.machine != platform.machine()
    return Interpreter(minor=archive.python, label=f"{path.name} (python-build-standalone)",
                       provider=ArchiveProvider(archive=path, machine=archive.machine), archive=package,
                       compiler=_compiler(archive.python) if foreign else None)  # fmt: skip
