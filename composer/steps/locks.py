"""Find, check and renew the lock of a recipe for one Python and machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from composer._fs import write_atomic
from composer.errors import LockError
from composer.model.lock import Lock, lock_name, parse_lock, render_lock
from composer.model.recipe import Recipe
from composer.model.target import GLIBC_CEILING, MACHINES, Target
from composer.steps.load import LoadedRecipe, LocalFile
from composer.steps.resolve import (
    Exclude,
    LocalSource,
    Override,
    ResolveRequest,
    UrlSource,
    fits,
    resolve,
    url_filename,
)
from composer.store import key_of

#: auto: use the lock, renew it when the recipe changed. locked: fail when it changed. frozen: do not look.
Mode = Literal["auto", "locked", "frozen"]
_DIGEST_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LockOptions:
    """How a lock may be used or renewed. cooldown: days that a release must be old. upgrade: names to move on."""

    mode: Mode = "auto"
    offline: bool = False
    cooldown: int | None = None
    upgrade: Sequence[str] = ()


def lock_request(recipe: Recipe, python: str, machine: str,
                 local: Mapping[str, LocalFile] = MappingProxyType({})) -> ResolveRequest:  # fmt: skip
    """What is asked of the resolver; the recipe's digest in it covers exactly what can change the answer.

    local: where the recipe's local files are (LoadedRecipe.local_files).
    """
    target = Target(sms=recipe.sm, isa="", cuda=recipe.cuda, python=python, machine=machine)
    # An optional url is locked unseen; what no index has as a wheel is no part of the resolution.
    unseen = [one for one in recipe.component if (one.url and one.optional) or (one.build and not one.build.prebuilt)]
    roots = [one for one in recipe.component if one.version and one not in unseen]
    moved = [one for one in recipe.requires if one.to]
    request = ResolveRequest(
        name=f"{recipe.name}-py{python.replace('.', '')}-{machine}",
        recipe="", python=python, machine=machine, platforms=target.platforms,
        roots=tuple(f"{one.name}=={one.version}" for one in roots),
        constraints=recipe.constraints,
        overrides=tuple(Override(requirement=one.to or "", reason=one.reason, of=one.of) for one in moved),
        excludes=tuple(
            Exclude(name=one.name, reason=one.reason, of=one.of) for one in recipe.requires if one.to is None
        ),
        pins={one.name: one.index for one in recipe.component if one.index != "pypi"},
        indexes=recipe.indexes,
        tools=tuple(one.name for one in recipe.component if one.tool),
        tool_platforms=tuple(replace(target, machine=one).platforms for one in MACHINES),
        url_sources=tuple(
            UrlSource(name=one.name, version=one.version or "", url=one.url, sha256=one.sha256 or "", size=one.size,
                      optional=one.optional)
            for one in recipe.component if one.url and not (one.optional and _is_for_others(one.url, target))
        ),
        files=tuple(
            LocalSource(name=one.name, version=one.version or "", file=local[one.sha256 or ""],
                        sha256=one.sha256 or "", optional=one.optional)
            for one in recipe.component if one.path is not None
        ),
        as_of=recipe.as_of,
    )  # fmt: skip
    return _with_digest(request)


def _is_for_others(url: str, target: Target) -> bool:
    """Whether a wheel that is locked unseen is for another machine or Python: nothing else would notice."""
    return not fits(url_filename(url), target.python, target.platforms)


def _with_digest(request: ResolveRequest) -> ResolveRequest:
    asked = {
        "python": request.python, "machine": request.machine, "glibc": GLIBC_CEILING, "roots": sorted(request.roots),
        "constraints": sorted(request.constraints), "pins": request.pins, "indexes": request.indexes,
        "overrides": sorted((one.requirement, one.of or "") for one in request.overrides),
        "excludes": sorted((one.name, one.of or "") for one in request.excludes),
        "urls": sorted((one.name, one.version, one.url, one.sha256) for one in request.url_sources),
        "as_of": request.as_of.isoformat() if request.as_of else None,
    }  # fmt: skip
    if request.files:  # not where it lies: the lock does not say that either
        asked["files"] = sorted((one.name, one.version, one.file.path.name, one.sha256) for one in request.files)
    return replace(request, recipe=key_of("lock", _DIGEST_VERSION, **asked))


def ensure_lock(loaded: LoadedRecipe, python: str, machine: str, options: LockOptions) -> Lock:
    """The lock to build from. LockError when it is missing or stale and may not be renewed."""
    path = loaded.lock_path(python, machine)
    request = _request(loaded, python, machine)
    lock = read_lock(path) if path.is_file() else None
    if lock and (options.mode == "frozen" or lock.recipe == request.recipe):
        return lock
    if options.mode != "auto" or options.offline:
        raise LockError(
            "does not fit the recipe any more" if lock else "there is no lock", where=str(path),
            why="the recipe changed after it was made" if lock else None,
            fix=f"Run `{loaded.lock_command} --python {python}` where an index can be reached.",
        )  # fmt: skip
    return renew_lock(loaded, python, machine, options)


def renew_lock(loaded: LoadedRecipe, python: str, machine: str, options: LockOptions) -> Lock:
    """Resolve again and write the lock beside the recipe. What is not in `upgrade` keeps its version where it can."""
    path = loaded.lock_path(python, machine)
    request = replace(
        _request(loaded, python, machine),
        cooldown=options.cooldown, upgrade=tuple(options.upgrade),
        previous=read_lock(path) if options.upgrade and path.is_file() else None,
    )  # fmt: skip
    lock = resolve(request)
    write_atomic(path, render_lock(lock).encode())
    return lock


def _request(loaded: LoadedRecipe, python: str, machine: str) -> ResolveRequest:
    """What is asked of the resolver for a lock that is called as its file."""
    request = lock_request(loaded.recipe, python, machine, loaded.local_files())
    return replace(request, name=lock_name(loaded.lock_path(python, machine).name))


def read_lock(path: Path, *, sdists: bool = False) -> Lock:
    """The lock in a file, by whose name it is called; LockError when it cannot be read or is not one.

    sdists: as of `parse_lock`.
    """
    try:
        return replace(parse_lock(path.read_text("utf-8"), path.name, sdists=sdists), name=lock_name(path.name))
    except (OSError, UnicodeDecodeError) as fault:
        raise LockError("cannot be read", where=str(path), why=str(fault)) from fault
