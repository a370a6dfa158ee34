"""The lock: every artifact of a bundle by file name, size and SHA-256, as a PEP 751 `pylock.<name>.toml`.

A lock names no host. An index is a name (`pypi` is whatever pip is configured with, the recipe holds the public URL of
any other), and an artifact is a file in a wheelhouse folder beside the lock. So one lock serves behind any mirror and
on a site without a network. Only a distribution whose source is a URL keeps that URL: it has no index to ask.
"""

from __future__ import annotations

import datetime as dt
import json
import re
import textwrap
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec
from packaging.pylock import Package, PackageSdist, PackageWheel, Pylock, PylockValidationError

from composer.errors import LockError

#: Where a lock expects its artifacts, relative to itself.
WHEELHOUSE = "wheelhouse"
#: The pseudo index of a distribution that the recipe names as a local file.
FILE = "file"

_T = TypeVar("_T")
_SCHEMA = 1
_TOOL = "wheel-composer"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_INDEX = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?")
_RELOCK = "Run `compose lock` to write it anew."


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """One file: `sha256` in lower-case hexadecimal, `url` only where no index has it.

    size: bytes; 0 when it is not known, which only an artifact with a url may leave open.
    """

    filename: str
    size: int
    sha256: str
    url: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LockedPackage:
    """One distribution at one version.

    index: the name of the only index that may be asked for it; a URL source has the pseudo index `url`,
    a local file of the recipe `file`.
    requires_python: its Requires-Python, if it has one.
    optional: a build goes on without it when it cannot be reached, and says so.
    """

    name: str
    version: str
    index: str
    artifacts: tuple[Artifact, ...]
    requires_python: str | None = None
    optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExcludedRequirement:
    """What pip's closure has and this one leaves out; `required_by`: `name==version` of who wants it."""

    name: str
    reason: str
    required_by: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedOverride:
    """A requirement that replaced others; each of `replaced` reads `name==version: requirement`."""

    requirement: str
    reason: str
    replaced: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock:
    """A resolved version set for one target, and how it came about.

    name: the middle of `pylock.<name>.toml`. recipe: SHA-256 of the recipe that asked for it. python: `major.minor` or
    `major.minor.patch`. platforms: wheel platform tags, best first. as_of: only files uploaded before it counted.
    """

    name: str
    recipe: str
    python: str
    machine: str
    platforms: tuple[str, ...]
    packages: tuple[LockedPackage, ...]
    as_of: dt.datetime | None = None
    excluded: tuple[ExcludedRequirement, ...] = ()
    overridden: tuple[AppliedOverride, ...] = ()

    @property
    def filename(self) -> str:
        """The file name that PEP 751 asks for."""
        return f"pylock.{self.name}.toml"

    @property
    def pins(self) -> Mapping[str, str]:
        """Version by distribution name."""
        return {package.name: package.version for package in self.packages}


def lock_name(filename: str) -> str:
    """The middle of `pylock.<name>.toml`; nothing for plain `pylock.toml` (PEP 751)."""
    return filename.removeprefix("pylock.").removesuffix("toml").removesuffix(".")


# --- writing ---------------------------------------------------------------------------------------------------------


def render_lock(lock: Lock) -> str:
    """The text of `pylock.<name>.toml` (PEP 751 version 1.0): the same text for equal locks, packages in name order."""
    packages = sorted(lock.packages, key=lambda package: package.name)
    # Where there is none the key must still be there.
    listed = [_render_package(package) for package in packages] or ["packages = []\n"]
    parts = [_render_head(lock), *listed, _render_tool(lock)]
    parts += [_render_row("excluded", row) for row in _excluded_rows(lock)]
    parts += [_render_row("overridden", row) for row in _overridden_rows(lock)]
    return "\n".join(parts)


def _render_head(lock: Lock) -> str:
    minor = ".".join(lock.python.split(".")[:2])
    marker = (
        f"sys_platform == 'linux' and platform_machine == '{lock.machine}' and "
        f"python_version == '{minor}' and implementation_name == 'cpython'"
    )
    return _lines(
        ("lock-version", "1.0"), ("environments", [marker]), ("requires-python", f"=={minor}.*"), ("created-by", _TOOL)
    )


def _render_package(package: LockedPackage) -> str:
    facts: dict[str, Any] = {"index": package.index}
    if package.optional:
        facts["optional"] = True
    wheels = sorted(package.artifacts, key=lambda artifact: artifact.filename)
    head = [("name", package.name), ("version", package.version)]
    if package.requires_python:
        head.append(("requires-python", package.requires_python))
    if is_sdist(package):
        files = f"sdist = {_inline(_wheel_table(wheels[0]))}\n"
    else:
        files = "wheels = [\n" + "".join(f"    {_inline(_wheel_table(wheel))},\n" for wheel in wheels) + "]\n"
    return f"[[packages]]\n{_lines(*head)}{files}tool.{_TOOL} = {_inline(facts)}\n"


def is_sdist(package: LockedPackage) -> bool:
    """Whether the only artifact is a source distribution, which only the lock of a source build may hold."""
    return len(package.artifacts) == 1 and not package.artifacts[0].filename.endswith(".whl")


def _wheel_table(wheel: Artifact) -> dict[str, Any]:
    url = {"url": wheel.url} if wheel.url else {}
    size = {"size": wheel.size} if wheel.size else {}
    return {**url, "path": f"{WHEELHOUSE}/{wheel.filename}", **size, "hashes": {"sha256": wheel.sha256}}


def _render_tool(lock: Lock) -> str:
    rows: list[tuple[str, Any]] = [("schema", _SCHEMA), ("name", lock.name), ("recipe", lock.recipe)]
    if lock.as_of is not None:
        rows.append(("as-of", lock.as_of))
    rows += [("python", lock.python), ("machine", lock.machine), ("platforms", list(lock.platforms))]
    return f"[tool.{_TOOL}]\n{_lines(*rows)}"


def _excluded_rows(lock: Lock) -> Iterator[dict[str, Any]]:
    for row in sorted(lock.excluded, key=lambda row: row.name):
        yield {"name": row.name, "reason": row.reason, "required-by": sorted(row.required_by)}


def _overridden_rows(lock: Lock) -> Iterator[dict[str, Any]]:
    for row in sorted(lock.overridden, key=lambda row: (row.requirement, row.reason)):
        yield {"requirement": row.requirement, "reason": row.reason, "replaced": sorted(row.replaced)}


def _render_row(table: str, row: Mapping[str, Any]) -> str:
    return f"[[tool.{_TOOL}.{table}]]\n{_lines(*row.items())}"


def _lines(*rows: tuple[str, Any]) -> str:
    return "".join(f"{key} = {_value(value)}\n" for key, value in rows)


def _value(value: object) -> str:
    """A TOML value; an array that would make a long line is wrapped."""
    text = _inline(value)
    if not isinstance(value, list) or len(text) < 110:
        return text
    if any(letter.isspace() for item in value for letter in item):
        body = ",\n".join(map(_inline, value))
    else:
        body = textwrap.fill(text[1:-1], width=116, break_long_words=False, break_on_hyphens=False)
    # Not textwrap.indent: a string may hold what `splitlines` takes for the end of a line.
    indented = "\n".join(f"    {line}" for line in body.split("\n"))
    return f"[\n{indented},\n]"


def _inline(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case dt.datetime():
            return value.astimezone(dt.UTC).isoformat().replace("+00:00", "Z")
        case dict():
            return "{ " + ", ".join(f"{key} = {_inline(item)}" for key, item in value.items()) + " }"
        case list():
            return "[" + ", ".join(map(_inline, value)) + "]"
        case _:
            # A TOML basic string is a JSON string, but for DEL, which only TOML forbids to stand for itself.
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")


# --- reading ---------------------------------------------------------------------------------------------------------


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    pass


class _PackageTool(_Table, frozen=True, kw_only=True):
    index: str
    optional: bool = False


class _Excluded(_Table, frozen=True, kw_only=True):
    name: str
    reason: str
    required_by: tuple[str, ...]


class _Overridden(_Table, frozen=True, kw_only=True):
    requirement: str
    reason: str
    replaced: tuple[str, ...]


class _Tool(_Table, frozen=True, kw_only=True):
    schema: int
    name: str
    recipe: str
    python: str
    machine: str
    platforms: tuple[str, ...]
    as_of: dt.datetime | None = None
    excluded: tuple[_Excluded, ...] = ()
    overridden: tuple[_Overridden, ...] = ()


def parse_lock(text: str, where: str, *, sdists: bool = False) -> Lock:
    """The lock in `text`; `where` names the file in errors; sdists: source distributions may be in it.

    Raises LockError for text that is not TOML, breaks PEP 751, was not written by compose, or holds a package without
    exactly what a build needs: wheels only, each with a size and a SHA-256. All faults of the packages come together.
    """
    pylock = _parse_pylock(text, where)
    tool = _convert((pylock.tool or {}).get(_TOOL), _Tool, f"{where}: tool.{_TOOL}")
    if tool.schema != _SCHEMA:
        raise LockError(f"schema {tool.schema} is not known", where=f"{where}: tool.{_TOOL}.schema", fix=_RELOCK)
    packages, faults = _packages(pylock, where, sdists=sdists)
    faults += [LockError(what, where=where, fix=_RELOCK) for what in _lock_faults(tool, packages)]
    LockError.collect(faults)
    return Lock(
        name=tool.name, recipe=tool.recipe, python=tool.python, machine=tool.machine, platforms=tool.platforms,
        as_of=tool.as_of, packages=tuple(packages),
        excluded=tuple(ExcludedRequirement(**msgspec.structs.asdict(row)) for row in tool.excluded),
        overridden=tuple(AppliedOverride(**msgspec.structs.asdict(row)) for row in tool.overridden),
    )  # fmt: skip


def _parse_pylock(text: str, where: str) -> Pylock:
    try:
        return Pylock.from_dict(tomllib.loads(text))
    except PylockValidationError as fault:
        place = f"{where}: {fault.context}" if fault.context else where
        what = fault.message[:1].lower() + fault.message[1:]
        raise LockError(what, where=place, fix=_RELOCK, reference="PEP 751") from fault
    except ValueError as fault:  # not TOML, or a number of more than 4,300 digits
        raise LockError("not TOML", where=where, why=str(fault), fix=_RELOCK) from fault
    except RecursionError as fault:
        raise LockError("nested too deeply", where=where, fix=_RELOCK) from fault


def _packages(pylock: Pylock, where: str, *, sdists: bool) -> tuple[list[LockedPackage], list[LockError]]:
    packages, faults = [], []
    for number, package in enumerate(pylock.packages):
        try:
            packages.append(_package(package, f"{where}: packages[{number}] {package.name}", sdists=sdists))
        except LockError as fault:
            faults.append(fault)
    return packages, faults


def _package(package: Package, where: str, *, sdists: bool) -> LockedPackage:
    tool = _convert((package.tool or {}).get(_TOOL), _PackageTool, f"{where}: tool.{_TOOL}")
    wheels: Sequence[PackageWheel | PackageSdist] = package.wheels or ()
    if sdists and package.sdist and not wheels:
        wheels = (package.sdist,)
    faults = [LockError(what, where=where, fix=_RELOCK) for what in _package_faults(package, tool, wheels)]
    faults += [LockError(what, where=f"{where}: {wheel.path}") for wheel in wheels for what in _wheel_faults(wheel)]
    LockError.collect(faults)
    return LockedPackage(
        name=package.name, version=str(package.version), index=tool.index, optional=tool.optional,
        requires_python=None if package.requires_python is None else str(package.requires_python),
        artifacts=tuple(
            Artifact(filename=wheel.filename, size=wheel.size or 0, sha256=wheel.hashes["sha256"], url=wheel.url)
            for wheel in wheels
        ),
    )  # fmt: skip


def _package_faults(
    package: Package, tool: _PackageTool, wheels: Sequence[PackageWheel | PackageSdist]
) -> Iterator[str]:
    if package.version is None:
        yield "has no version"
    if not wheels or (package.sdist and package.sdist not in wheels) or package.is_direct:
        yield "has something other than wheels"
    if not _INDEX.fullmatch(tool.index):
        yield f"index {tool.index!r} is not a name"
    if (tool.index == "url") != all(wheel.url for wheel in wheels):
        yield "a wheel has a url if and only if its index is 'url'"


def _wheel_faults(wheel: PackageWheel | PackageSdist) -> Iterator[str]:
    if wheel.path != f"{WHEELHOUSE}/{wheel.filename}" or "\\" in wheel.filename:
        yield f"path is not {WHEELHOUSE}/ and a file name"
    may_lack = wheel.url is not None and wheel.size is None
    if not may_lack and (not wheel.size or wheel.size < 1):
        yield "has no size"
    # Any other hash is either weaker or not what the store is keyed by.
    if set(wheel.hashes) != {"sha256"} or not _SHA256.fullmatch(wheel.hashes.get("sha256", "")):
        yield "needs one hash, sha256, as 64 lower-case hexadecimal digits"
    if wheel.url is not None and not _is_public_url(wheel.url):
        yield f"url {wheel.url!r} is not an http(s) URL without credentials"


def _is_public_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in {"https", "http"} and bool(parts.hostname) and "@" not in parts.netloc


def _lock_faults(tool: _Tool, packages: Iterable[LockedPackage]) -> Iterator[str]:
    names = [package.name for package in packages]
    yield from (f"{name} is locked twice" for name in sorted({name for name in names if names.count(name) > 1}))
    if not _SHA256.fullmatch(tool.recipe):
        yield "recipe is not a SHA-256"
    if tool.as_of is not None and tool.as_of.tzinfo is None:
        yield "as-of has no time zone"


def _convert(data: object, kind: type[_T], where: str) -> _T:
    if data is None:
        raise LockError("missing: not a lock that compose wrote", where=where, fix=_RELOCK)
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as fault:
        raise LockError(str(fault)[:1].lower() + str(fault)[1:], where=where, fix=_RELOCK) from fault
