"""The lock of one source build: its build requirements with digests, and the sdist where an index has it.

It lies beside the recipe, `pylock.RECIPE-build-NAME-pyXY-MACHINE.toml`, and names no host, as every lock.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from composer._fs import write_atomic
from composer.errors import LockError
from composer.model.lock import Lock, LockedPackage, is_sdist, lock_name, render_lock
from composer.model.recipe import Component, Recipe
from composer.model.source import Build
from composer.model.target import Target
from composer.steps.download import find_sdist
from composer.steps.load import LoadedRecipe
from composer.steps.locks import LockOptions, read_lock
from composer.steps.resolve import Exclude, ResolveRequest, resolve
from composer.store import key_of

_VERSION = 1
_UNNEEDED = "this build does without it"


def build_lock_path(loaded: LoadedRecipe, name: str, python: str, machine: str) -> Path:
    """Where the lock of a component's build is (name as in PEP 751)."""
    stem = f"{loaded.path.stem}-build-{name}-py{python.replace('.', '')}-{machine}"
    return loaded.path.parent / f"pylock.{stem}.toml"


def ensure_build_lock(loaded: LoadedRecipe, component: Component, build: Build, target: Target,
                      options: LockOptions) -> Lock:  # fmt: skip
    """The lock to build from, made or renewed where the options allow it; LockError where they do not."""
    path = build_lock_path(loaded, component.name, target.python, target.machine)
    request = _request(loaded.recipe, component, build, target, path)
    lock = read_lock(path, sdists=True) if path.is_file() else None
    if lock and (options.mode == "frozen" or lock.recipe == request.recipe):
        return lock
    if options.mode != "auto" or options.offline:
        raise LockError(
            "does not fit the recipe any more" if lock else "there is no lock of this build", where=str(path),
            fix=f"Run `{loaded.lock_command}` where an index can be reached.",
        )  # fmt: skip
    return _write(loaded.recipe, component, build, request, path)


def renew_build_locks(loaded: LoadedRecipe, python: str, machine: str) -> Iterator[tuple[Path, Lock]]:
    """Resolve what the builds of a recipe require, anew, for one Python and machine."""
    recipe = loaded.recipe
    target = Target(sms=recipe.sm, isa="", cuda=recipe.cuda, python=python, machine=machine)
    for component in recipe.component:
        if (build := component.build) is not None:
            path = build_lock_path(loaded, component.name, python, machine)
            yield path, _write(recipe, component, build, _request(recipe, component, build, target, path), path)


def _write(recipe: Recipe, component: Component, build: Build, request: ResolveRequest, path: Path) -> Lock:
    made = _make(recipe, component, build, request)
    write_atomic(path, render_lock(made).encode())
    return made


def sdist_of(lock: Lock, name: str) -> LockedPackage | None:
    """The locked sdist of the component itself."""
    return next((one for one in lock.packages if one.name == name and is_sdist(one)), None)


def _make(recipe: Recipe, component: Component, build: Build, request: ResolveRequest) -> Lock:
    lock = resolve(request)
    if not build.sdist:
        return lock
    version = component.version or ""
    artifact = find_sdist(component.name, version, component.index, recipe.indexes)
    package = LockedPackage(name=component.name, version=version, index=component.index, artifacts=(artifact,))
    return replace(lock, packages=(*lock.packages, package))


def _request(recipe: Recipe, component: Component, build: Build, target: Target, path: Path) -> ResolveRequest:
    """What the recipe pins for the stack is built against in the same version: an extension sees the stack's torch."""
    asked = {canonicalize_name(Requirement(text).name) for text in build.requires}
    pinned = tuple(f"{one.name}=={one.version}" for one in recipe.component if one.version and one.name in asked)
    platforms = tuple(one for one in target.platforms if _glibc(one) <= build.glibc)
    request = ResolveRequest(
        name=lock_name(path.name), recipe="", python=target.python,
        machine=target.machine, platforms=platforms, roots=build.requires, constraints=pinned,
        excludes=tuple(Exclude(name=one, reason=_UNNEEDED) for one in build.unneeded),
        pins={one.name: one.index for one in recipe.component if one.index != "pypi"}, indexes=recipe.indexes,
        as_of=recipe.as_of,
    )  # fmt: skip
    sdist = [component.name, component.version, component.index] if build.sdist else None
    digest = key_of("build-lock", _VERSION, python=target.python, machine=target.machine, roots=sorted(build.requires),
                    constraints=sorted(pinned), pins=request.pins, indexes=request.indexes, platforms=platforms,
                    as_of=recipe.as_of.isoformat(), sdist=sdist,
                    **({"unneeded": sorted(build.unneeded)} if build.unneeded else {}))  # fmt: skip
    return replace(request, recipe=digest)


def _glibc(platform: str) -> int:
    """The glibc 2.N of a manylinux tag; older names and plain `linux` count as 0."""
    return int(platform.split("_")[2]) if platform.startswith("manylinux_") else 0
