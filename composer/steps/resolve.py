"""Recipe to lock: pip's own resolver, run for the target instead of for this machine."""

from __future__ import annotations

import datetime as dt
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import canonicalize_name

from composer._proc import clean_environ, run
from composer.errors import ComposerError, FetchError, HostError, LockError, RecipeError
from composer.formats.wheel import parse_wheel_name
from composer.model.lock import FILE, AppliedOverride, Artifact, ExcludedRequirement, Lock, LockedPackage
from composer.steps.fetch import local_size
from composer.steps.load import LocalFile

#: The index name that stands for whatever pip is configured with.
PYPI = "pypi"

_TIMEOUT = 1800.0
_CHILD = Path(__file__).parent.parent / "_pip.py"

# What tells pip where and how to ask: its own variables, proxies, certificates and the places of its configuration.
_PIP_VARIABLES = (
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NETRC", "XDG_CONFIG_HOME",
    "XDG_CONFIG_DIRS", "XDG_CACHE_HOME", "DBUS_SESSION_BUS_ADDRESS", "http_proxy", "https_proxy", "all_proxy",
    "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """`requirement` replaces the version of every requirement on that name (or only in the METADATA of `of`)."""

    requirement: str
    reason: str
    of: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Exclude:
    """Every requirement on `name` is dropped (or only those in the METADATA of `of`)."""

    name: str
    reason: str
    of: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UrlSource:
    """A wheel that no index has. An optional one is locked as given, unseen, and so without its dependencies.

    size: bytes; asked from the server when it is not given.
    """

    name: str
    version: str
    url: str
    sha256: str
    size: int | None = None
    optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSource:
    """A wheel on this machine; it must be there to be locked, because its dependencies take part.

    optional: a build may do without it.
    """

    name: str
    version: str
    file: LocalFile
    sha256: str
    optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolveRequest:
    """Everything a resolution depends on, beside what the indexes hold.

    name: the middle of `pylock.<name>.toml`. recipe: SHA-256 of the recipe. python: `major.minor` or
    `major.minor.patch`. platforms: wheel platform tags the target accepts, best first. constraints: requirements that
    bind a version without asking for it. pins: index name by distribution; a name without one is on `pypi`.
    indexes: URL by index name. tools: what runs where a bundle is composed, and so is locked for every machine that may
    do that, each with its own `tool_platforms`. as_of: only files uploaded before it are looked at. cooldown: nor any
    of the last that many days before `now`. previous: keep its versions, but for the names in `upgrade`.
    """

    name: str
    recipe: str
    python: str
    platforms: tuple[str, ...]
    roots: tuple[str, ...]
    machine: str = "x86_64"
    constraints: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()
    excludes: tuple[Exclude, ...] = ()
    pins: Mapping[str, str] = field(default_factory=dict)
    indexes: Mapping[str, str] = field(default_factory=dict)
    tools: tuple[str, ...] = ()
    tool_platforms: tuple[tuple[str, ...], ...] = ()
    url_sources: tuple[UrlSource, ...] = ()
    files: tuple[LocalSource, ...] = ()
    as_of: dt.datetime | None = None
    cooldown: int | None = None
    now: dt.datetime | None = None
    upgrade: tuple[str, ...] = ()
    previous: Lock | None = None


def resolve(request: ResolveRequest) -> Lock:
    """The locked version set for `request`, found by pip's resolver in a child process.

    No wheel is downloaded where the index has metadata files (PEP 658) or answers range requests. Raises RecipeError
    for requirements that cannot be meant, LockError where no version set satisfies them, FetchError where an index
    fails or a local file is not there, IntegrityError where it is another one.
    """
    faults = list(_input_faults(request))
    RecipeError.collect(faults)
    sizes = {source.name: local_size(source.file, source.sha256) for source in request.files}
    as_of = _as_of(request)
    report = _ask_pip(_child_request(request, as_of))
    return Lock(
        name=request.name, recipe=request.recipe, python=request.python, machine=request.machine,
        platforms=request.platforms, as_of=as_of, packages=tuple(_packages(request, report["packages"], sizes)),
        excluded=tuple(_excluded(request, report["excluded"])),
        overridden=tuple(_overridden(request, report["overridden"])),
    )  # fmt: skip


def marker_environment(python: str, machine: str) -> dict[str, str]:
    """The marker variables (PEP 508) of CPython `python` on Linux `machine`, whatever interpreter runs this."""
    full = python if python.count(".") == 2 else f"{python}.0"
    return {
        "implementation_name": "cpython", "implementation_version": full, "os_name": "posix",
        "platform_machine": machine, "platform_python_implementation": "CPython", "platform_release": "",
        "platform_system": "Linux", "platform_version": "", "python_full_version": full,
        "python_version": ".".join(full.split(".")[:2]), "sys_platform": "linux",
    }  # fmt: skip


def fits(filename: str, python: str, platforms: Sequence[str]) -> bool:
    """Whether a wheel is for CPython `python` (`3.12`) where these platform tags are accepted; WheelError for no wheel.

    By packaging's tags, which do not ask what runs this.
    """
    version = tuple(map(int, python.split(".")))
    tags = {*cpython_tags(version, platforms=platforms), *compatible_tags(version, None, platforms)}
    return not tags.isdisjoint(parse_wheel_name(filename).tags)


# --- the request -----------------------------------------------------------------------------------------------------


def _input_faults(request: ResolveRequest) -> Iterator[RecipeError]:
    rows = (("roots", request.roots), ("constraints", request.constraints))
    texts = [(place, text) for place, group in rows for text in group]
    texts += [("overrides", row.requirement) for row in request.overrides]
    for place, text in texts:
        if (what := _requirement_fault(text)) is not None:
            yield RecipeError(
                what, where=f"{place}: {text!r}", fix="Write it as `name==version` or another PEP 508 requirement."
            )
    for name, index in request.pins.items():
        if index != PYPI and index not in request.indexes:
            yield RecipeError(f"no index is called {index!r}", where=name, fix="Give its URL under indexes.")
    dropped = {canonicalize_name(row.name) for row in request.excludes if row.of is None}
    for name in sorted(dropped & {_name(text) for text in request.roots if _requirement_fault(text) is None}):
        yield RecipeError("is both asked for and excluded", where=name, fix="Keep one of the two.")
    if request.as_of is not None and request.as_of.tzinfo is None:
        yield RecipeError("has no time zone", where="as-of", fix="Write it like 2026-03-10T00:00:00Z.")


def _requirement_fault(text: str) -> str | None:
    try:
        return "a URL is not allowed here" if Requirement(text).url else None
    except InvalidRequirement as fault:
        return f"not a requirement ({str(fault).splitlines()[0]})"


def _name(requirement: str) -> str:
    return canonicalize_name(Requirement(requirement).name)


def _as_of(request: ResolveRequest) -> dt.datetime | None:
    """The earlier of the recipe's date and the end of the cooldown."""
    if request.cooldown is None:
        return request.as_of
    cooled = (request.now or dt.datetime.now(dt.UTC)) - dt.timedelta(days=request.cooldown)
    cooled = cooled.replace(microsecond=0)
    return cooled if request.as_of is None else min(request.as_of, cooled)


def _child_request(request: ResolveRequest, as_of: dt.datetime | None) -> dict[str, Any]:
    environment = marker_environment(request.python, request.machine)
    constraints = [*request.constraints, *_kept_pins(request)]
    return {
        "roots": request.roots, "constraints": constraints, "exact": _exact([*request.roots, *constraints]),
        "excludes": [{"name": canonicalize_name(row.name), "of": _canonical(row.of)} for row in request.excludes],
        "overrides": [{"requirement": row.requirement, "of": _canonical(row.of)} for row in request.overrides],
        "pins": {canonicalize_name(name): index for name, index in request.pins.items()},
        "indexes": dict(request.indexes), "environment": environment,
        "tools": [canonicalize_name(name) for name in request.tools], "tool_platforms": request.tool_platforms,
        "python": [int(part) for part in environment["python_full_version"].split(".")],
        "abi": "cp" + environment["python_version"].replace(".", ""), "platforms": request.platforms,
        "as_of": as_of.isoformat() if as_of else None,
        "urls": [
            {"name": source.name, "url": source.url, "sha256": source.sha256}
            for source in request.url_sources if not source.optional
        ] + [
            {"name": source.name, "url": source.file.path.absolute().as_uri(), "sha256": source.sha256}
            for source in request.files
        ],
    }  # fmt: skip


def _canonical(name: str | None) -> str | None:
    return None if name is None else canonicalize_name(name)


def _kept_pins(request: ResolveRequest) -> Iterator[str]:
    """The previous lock's versions, but for what is to be upgraded and what the recipe itself now asks otherwise."""
    if request.previous is None:
        return
    pins = request.previous.pins
    moved: set[str] = {canonicalize_name(name) for name in request.upgrade}
    asked = map(Requirement, (*request.roots, *(row.requirement for row in request.overrides)))
    moved |= {
        name for row in asked if not row.specifier.contains(pins.get(name := canonicalize_name(row.name), "0"), True)
    }
    yield from (f"{name}=={version}" for name, version in pins.items() if name not in moved)


def _exact(requirements: Iterable[str]) -> dict[str, str]:
    """Version by name of the requirements that allow exactly one."""
    found: dict[str, str] = {}
    for requirement in map(Requirement, requirements):
        specifiers = list(requirement.specifier)
        if len(specifiers) == 1 and specifiers[0].operator == "==" and not specifiers[0].version.endswith("*"):
            found[canonicalize_name(requirement.name)] = specifiers[0].version
    return found


# --- the child -------------------------------------------------------------------------------------------------------


def _ask_pip(request: Mapping[str, Any]) -> dict[str, Any]:
    inherited = {name: os.environ[name] for name in os.environ if name.startswith("PIP_") or name in _PIP_VARIABLES}
    answer = run(
        [sys.executable, "-I", _CHILD], env=clean_environ(**inherited), timeout=_TIMEOUT, error=HostError,
        stdin=json.dumps(request).encode(), fix="composer needs exactly the pip that it depends on: install it again.",
    )  # fmt: skip
    report: dict[str, Any] = json.loads(answer)
    if "fault" in report:
        raise _translate(report["fault"])
    return report


def _translate(fault: Mapping[str, str]) -> ComposerError:
    what, why = fault["what"], fault["why"] or None
    match fault["kind"]:
        case "pip":
            return HostError(what, why=why, fix="Install composer's own dependencies again: its pip is pinned.")
        case "undated":
            return LockError(
                what, where="as-of", fix="Pin it as name==version under constraints, or use an index with upload times."
            )
        case "unsatisfiable":
            return LockError(
                what, why=why, fix="Relax a version, add an override with its reason, or let one move: --upgrade NAME."
            )
        case _:
            return FetchError(
                what,
                why=why,
                fix="Check the index and the proxy (`pip config list`); --frozen builds from the lock as it is.",
            )


# --- the answer ------------------------------------------------------------------------------------------------------


def _packages(
    request: ResolveRequest, rows: Iterable[Mapping[str, Any]], sizes: Mapping[str, int]
) -> Iterator[LockedPackage]:
    files = {source.name: source for source in request.files}
    urls = {canonicalize_name(source.name): source for source in request.url_sources}
    pins = {canonicalize_name(name): index for name, index in request.pins.items()}
    for row in rows:
        if file := files.get(row["name"]):
            artifact = Artifact(filename=file.file.path.name, size=sizes[file.name], sha256=file.sha256)
            yield LockedPackage(name=file.name, version=row["version"], index=FILE, optional=file.optional,
                                requires_python=_specifiers(row["requires_python"]), artifacts=(artifact,))  # fmt: skip
            continue
        source = urls.get(row["name"])
        yield LockedPackage(
            name=row["name"], version=row["version"], index="url" if source else pins.get(row["name"], PYPI),
            requires_python=_specifiers(row["requires_python"]),
            artifacts=tuple(Artifact(**file, url=source.url if source else None) for file in row["files"]),
        )  # fmt: skip
    yield from (_optional(source) for source in request.url_sources if source.optional)


def _optional(source: UrlSource) -> LockedPackage:
    filename = url_filename(source.url)
    artifact = Artifact(filename=filename, size=source.size or 0, sha256=source.sha256, url=source.url)
    return LockedPackage(
        name=canonicalize_name(source.name), version=source.version, index="url", artifacts=(artifact,), optional=True
    )


def url_filename(url: str) -> str:
    """The name of the file that a URL is of."""
    return unquote(urlsplit(url).path.rsplit("/", 1)[-1])


def _specifiers(text: str) -> str | None:
    """Requires-Python in its normal spelling; one that breaks PEP 440 says nothing, as for pip."""
    try:
        return str(SpecifierSet(text)) or None
    except InvalidSpecifier:
        return None


def _excluded(request: ResolveRequest, seen: Mapping[str, list[str]]) -> Iterator[ExcludedRequirement]:
    """Every exclude of the recipe, one row a name: who wants it now, or nobody when only an excluded one does."""
    merged: dict[str, tuple[str, set[str]]] = {}
    for number, row in enumerate(request.excludes):
        reason, wanted_by = merged.setdefault(canonicalize_name(row.name), (row.reason, set()))
        wanted_by.update(seen.get(str(number), ()))
    for name, (reason, wanted_by) in merged.items():
        yield ExcludedRequirement(name=name, reason=reason, required_by=tuple(sorted(wanted_by)))


def _overridden(request: ResolveRequest, seen: Mapping[str, list[str]]) -> Iterator[AppliedOverride]:
    for number, row in enumerate(request.overrides):
        if str(number) in seen:
            yield AppliedOverride(
                requirement=row.requirement, reason=row.reason, replaced=tuple(seen[str(number)])
            )  # fmt: skip
