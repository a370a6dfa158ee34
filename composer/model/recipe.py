"""A recipe: a stack as data. Loading one runs no code; every value is checked before anything happens."""

from __future__ import annotations

import datetime as dt
import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, is_normalized_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from composer.errors import RecipeError
from composer.model._strict import Record, convert
from composer.model.coverage import Coverage, coverage_faults
from composer.model.dlopen import DlopenRule, dlopen_faults
from composer.model.globs import compile_glob
from composer.model.host_floor import HostFloor, host_floor_faults
from composer.model.input import Input, input_faults
from composer.model.runtime import RuntimeWork, runtime_faults
from composer.model.source import Build, build_faults
from composer.model.target import MACHINES, Target, sm_text

SCHEMA = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")
#: `pypi` is whatever pip is configured with; the others stand in a lock for a url and for a local file.
_RESERVED_INDEXES = ("pypi", "url", "file")
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
#: Characters of a stub's message.
_MOST_MESSAGE = 500
#: Variables that change which code every program on the host runs; a recipe may not set them.
_FORBIDDEN_ENVIRONMENT = re.compile(r"LD_.*|PYTHON.*|PATH|HOME|SHELL|IFS|ENV|BASH_ENV")


class RequiresEdit(Record, frozen=True, kw_only=True):
    """A change to what distributions declare that they need: `to` replaces the requirement, no `to` drops it.

    of: only in this distribution's METADATA; otherwise wherever `name` is required.
    """

    name: str
    reason: str
    to: str | None = None
    of: str | None = None


class Prune(Record, frozen=True, kw_only=True):
    """Files of a distribution that this target does not need (globs below site-packages; `**` crosses folders)."""

    paths: tuple[str, ...]
    reason: str
    sm: tuple[int, ...] = ()
    sm_not: tuple[int, ...] = ()
    machines: tuple[str, ...] = ()

    def applies(self, sm: int) -> bool:
        """Whether the rule holds for a target SM."""
        return (not self.sm or sm in self.sm) and sm not in self.sm_not


class Link(Record, frozen=True, kw_only=True):
    """A second name for a file of a distribution (wheels cannot hold links): `path` points at `to`."""

    path: str
    to: str
    reason: str
    sm: tuple[int, ...] = ()

    def applies(self, sm: int) -> bool:
        """Whether the rule holds for a target SM."""
        return not self.sm or sm in self.sm


class RpathRule(Record, frozen=True, kw_only=True):
    """Folders (below site-packages) to add to the RPATH of files that load libraries by name at run time."""

    files: tuple[str, ...]
    folders: tuple[str, ...]
    reason: str


class Slim(Record, frozen=True, kw_only=True):
    """Objects of a distribution that may be made smaller for the target (globs below site-packages).

    licence: what allows their modification (SPDX); text: its file in the distribution's `.dist-info`, and the sha256 of
    the text that was read when this was decided: under another text nothing is modified. gpu: cut GPU code that the
    target cannot run. keep_ptx: keep the newest PTX, from which later GPUs compile. debug: cut symbols for debuggers.
    """

    files: tuple[str, ...]
    licence: str
    text: str
    sha256: str
    gpu: bool = True
    keep_ptx: bool = False
    debug: bool = True


class PthFile(Record, frozen=True, kw_only=True):
    """A `.pth` file that may stay: it runs at every start of the interpreter, so its bytes are pinned."""

    file: str
    sha256: str
    reason: str


class Component(Record, frozen=True, kw_only=True):
    """One distribution of the stack: where it comes from and what is changed in it.

    version: makes the distribution a root of the resolution; without it the entry only edits what the lock holds.
    path: a wheel on this machine, absolute or relative to the recipe's folder (loading makes it so for included files).
    sm: targets that need the distribution; empty for all (`reason` says why it is limited).
    build: how `compose wheel` makes one from source.
    coverage: which files must hold GPU code for a target.
    tool: needed to compose, not to serve: locked and fetched, but not part of the bundle.
    """

    name: str
    version: str | None = None
    index: str = "pypi"
    url: str | None = None
    path: str | None = None
    sha256: str | None = None
    size: int | None = None
    optional: bool = False
    tool: bool = False
    sm: tuple[int, ...] = ()
    reason: str | None = None
    untouched: str | None = None
    patches: tuple[str, ...] = ()
    prune: tuple[Prune, ...] = ()
    links: tuple[Link, ...] = ()
    rpath: tuple[RpathRule, ...] = ()
    pth: tuple[PthFile, ...] = ()
    slim: Slim | None = None
    build: Build | None = None
    coverage: tuple[Coverage, ...] = ()
    imports: tuple[str, ...] = ()
    needs_driver: bool = False

    def on(self, machine: str) -> Component:
        """The entry without the rules that are about the wheel for other machines."""
        return msgspec.structs.replace(
            self,
            prune=tuple(one for one in self.prune if not one.machines or machine in one.machines),
            coverage=tuple(one for one in self.coverage if not one.machines or machine in one.machines),
        )

    def serves(self, sms: Iterable[int]) -> bool:
        """Whether any of the SMs needs the distribution."""
        return not self.sm or not set(self.sm).isdisjoint(sms)


class Untouched(Record, frozen=True, kw_only=True):
    """Distributions whose files may not be modified, by name pattern, and the licence that says so."""

    names: tuple[str, ...]
    reason: str
    unless: tuple[str, ...] = ()


class Refusal(Record, frozen=True, kw_only=True):
    """Targets that the stack cannot serve, by their SM or their machine, and the measured reason."""

    reason: str
    sm: tuple[int, ...] = ()
    machines: tuple[str, ...] = ()


class Archive(Record, frozen=True, kw_only=True):
    """A prebuilt relocatable CPython: an `install_only` archive of python-build-standalone."""

    python: str
    machine: str
    url: str
    sha256: str
    size: int | None = None


class Release(Record, frozen=True, kw_only=True):
    """A source release that no index of wheels has.

    debian: its path on any Debian mirror, so that the one this machine uses can serve it. licence: its member that is
    shipped with what is compiled from it, beside the release itself.
    """

    name: str
    version: str
    url: str
    sha256: str
    size: int
    licence: str
    debian: str | None = None


class NativeModule(Record, frozen=True, kw_only=True):
    """A shared object compiled with the tool `ziglang` from sources in composer/native/SOURCE, or from a release.

    path: below the prefix; `{site}` stands for site-packages.
    """

    source: str
    path: str
    reason: str
    release: Release | None = None


class Stub(Record, frozen=True, kw_only=True):
    """A library that the stack links and never calls: a generated one takes its place.

    library: the real one below site-packages; it is left out. symbols: patterns of the names that are its interface,
    and no others: a stand-in for the C++ runtime that some libraries export, too, would answer for everybody's. Every
    function writes a line with `message` to standard error and returns `status` (one that the library's callers take
    for a refusal; 64 bits), or, with `abort`, ends the process. texts: patterns of the functions that return a text,
    such as the name of a status; they return the message.
    """

    library: str
    distribution: str
    symbols: tuple[str, ...]
    reason: str
    message: str
    status: int | None = None
    abort: bool = False
    texts: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """For a person who reads a plan."""
        return f"{self.library.rpartition('/')[2]} of {self.distribution}: {self.reason}"


class Recipe(Record, frozen=True, kw_only=True):
    """A stack on one lane (version set). See docs/reference/recipe.md for every key."""

    schema: int
    name: str
    version: str
    summary: str
    cuda: str
    pythons: tuple[str, ...]
    as_of: dt.datetime
    sm: tuple[int, ...]
    component: tuple[Component, ...]
    machines: tuple[str, ...] = ("x86_64",)
    include: tuple[str, ...] = ()
    constraints: tuple[str, ...] = ()
    indexes: Mapping[str, str] = {}
    requires: tuple[RequiresEdit, ...] = ()
    untouched: tuple[Untouched, ...] = ()
    refuse: tuple[Refusal, ...] = ()
    interpreter: tuple[Archive, ...] = ()
    native: tuple[NativeModule, ...] = ()
    stub: tuple[Stub, ...] = ()
    dlopen: tuple[DlopenRule, ...] = ()
    runtime: tuple[RuntimeWork, ...] = ()
    input: tuple[Input, ...] = ()
    floor: tuple[HostFloor, ...] = ()
    environment: Mapping[str, str] = {}
    programs: Mapping[str, Literal["serve", "resolve"]] = {}
    serve: str | None = None

    def bundle_name(self, target: Target) -> str:
        """`sglang-python312-cuda12_8-sm90-avx512`."""
        return f"{self.name}-{target.slug}"

    def on(self, machine: str) -> Recipe:
        """The recipe without the rules that are about wheels for other machines."""
        return msgspec.structs.replace(self, component=tuple(one.on(machine) for one in self.component))

    def component_of(self, name: str) -> Component:
        """The entry for a distribution (normalised name), or one that changes nothing; without what stubs replace."""
        component = next((one for one in self.component if one.name == name), Component(name=name))
        replaced = tuple(
            Prune(paths=(one.library,), reason=f"a stub takes its place: {one.reason}")
            for one in self.stub if one.distribution == name
        )  # fmt: skip
        return msgspec.structs.replace(component, prune=(*component.prune, *replaced)) if replaced else component

    def composed(self, name: str, sms: Iterable[int]) -> bool:
        """Whether the distribution belongs in a bundle for these SMs: one that needs it is enough."""
        component = self.component_of(name)
        return not component.tool and component.serves(sms)

    def untouched_reason(self, name: str) -> str | None:
        """Why no byte of this distribution's files may change, or None."""
        own = self.component_of(name).untouched
        for rule in self.untouched:
            if any(fnmatch.fnmatch(name, one) for one in rule.names) and name not in rule.unless:
                return own or rule.reason
        return own

    def requires_edits(self, sms: Sequence[int]) -> tuple[RequiresEdit, ...]:
        """Edits of requirements for a bundle: the recipe's own, and drops of what none of its SMs needs."""
        left_out = tuple(
            RequiresEdit(name=one.name, reason=one.reason or f"not composed for {sm_text(sms)}")
            for one in self.component if not one.serves(sms)
        )  # fmt: skip
        return (*self.requires, *left_out)

    def check_target(self, target: Target) -> None:
        """RecipeError when the stack cannot serve the target, with every reason, and that which the recipe records."""
        RecipeError.collect(list(self.target_faults(target)))

    def target_faults(self, target: Target) -> Iterator[RecipeError]:
        """Every reason for which the stack cannot serve the target."""
        stack = f"{self.name} {self.version}"
        for sm in target.sms:
            refusals = [one.reason for one in self.refuse if sm in one.sm]
            if refusals:
                yield RecipeError(f"{stack} cannot serve SM {sm}", where="--sm", why=refusals[0],
                                  fix=self._alternatives())  # fmt: skip
            elif sm not in self.sm:
                yield RecipeError(f"{stack} is not offered for SM {sm}", where="--sm", fix=self._alternatives())
        if target.python not in self.pythons:
            yield RecipeError(f"{stack} is not offered for Python {target.python}", where="--python",
                              fix=f"Offered: {', '.join(self.pythons)}.")  # fmt: skip
        if target.machine not in self.machines:
            reason = next((one.reason for one in self.refuse if target.machine in one.machines), None)
            yield RecipeError(f"{stack} is not offered for {target.machine}", where="--isa", why=reason,
                              fix=f"Offered machines: {', '.join(self.machines)}.")  # fmt: skip

    def _alternatives(self) -> str:
        return f"Choose one of the served architectures: {', '.join(map(str, self.sm))}."


def parse_recipe(data: Mapping[str, Any], where: str) -> Recipe:
    """A checked recipe from merged TOML data; RecipeError collects every contradiction found."""
    if data.get("schema") != SCHEMA:
        raise RecipeError(f"recipe schema {data.get('schema')!r} is not {SCHEMA}", where=f"{where}: schema",
                          fix="Use the version of compose that this recipe was written for.")  # fmt: skip
    recipe = convert(data, Recipe, where)
    check_recipe(recipe, where)
    if not recipe.component:  # an overlay, which is checked as a recipe, may have none
        raise RecipeError("must hold at least one", where=f"{where}: component")
    return recipe


def check_recipe(recipe: Recipe, where: str) -> None:
    """RecipeError with every value that has the right type and cannot be meant."""
    RecipeError.collect([RecipeError(what, where=f"{where}: {path}") for path, what in _contradictions(recipe)])


def _contradictions(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(dotted path, fault) of every value that has the right type and cannot be meant."""
    for key, values in (("pythons", recipe.pythons), ("sm", recipe.sm), ("machines", recipe.machines)):
        if not values or len(set(values)) != len(values):
            yield key, "must hold at least one value, and none twice"
    for index, python in enumerate(recipe.pythons):
        if not re.fullmatch(r"3\.1[0-9]", python):
            yield f"pythons[{index}]", f"{python!r} is not a Python minor version such as '3.12'"
    if recipe.as_of.tzinfo is None:
        yield "as-of", "must carry a time zone, such as 2026-03-10T00:00:00Z"
    yield from _text_faults(recipe)
    yield from input_faults(recipe.input)
    yield from host_floor_faults(recipe.floor, {*recipe.sm, *(sm for one in recipe.refuse for sm in one.sm)})
    yield from _component_faults(recipe)
    yield from _native_faults(recipe)
    yield from _stub_faults(recipe)
    yield from _requires_faults(recipe)
    yield from _rule_faults(recipe)
    yield from _source_faults(recipe)
    for index, refusal in enumerate(recipe.refuse):
        if bool(refusal.sm) == bool(refusal.machines):
            yield f"refuse[{index}]", "must name either `sm` or `machines`"
        for key, refused, served in (("sm", refusal.sm, recipe.sm), ("machines", refusal.machines, recipe.machines)):
            if both := {*map(str, refused)} & {*map(str, served)}:
                yield f"refuse[{index}].{key}", f"{', '.join(sorted(both))} is also listed as served"


def _text_faults(recipe: Recipe) -> Iterator[tuple[str, str]]:
    for key in ("name", "version"):
        if not _PLAIN.fullmatch(getattr(recipe, key)):
            yield key, "must be letters, digits, '.', '_', '+' or '-', and start with a letter or digit"
    if not re.fullmatch(r"[0-9]{1,2}\.[0-9]{1,2}", recipe.cuda):
        yield "cuda", f"{recipe.cuda!r} is not a CUDA version such as '12.8'"
    names = [(f"environment.{name}", name) for name in recipe.environment]
    names += [(f"input[{index}].variable", one.variable) for index, one in enumerate(recipe.input)]
    for path, name in names:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or _FORBIDDEN_ENVIRONMENT.fullmatch(name):
            yield path, "is not a variable that a bundle may set"
    for name in recipe.programs:
        if not _PLAIN.fullmatch(name):
            yield f"programs.{name}", "is not the name of a program"


def _component_faults(recipe: Recipe) -> Iterator[tuple[str, str]]:
    names = [one.name for one in recipe.component]
    for index, one in enumerate(recipe.component):
        path = f"component[{index}]"
        if not is_normalized_name(one.name):
            yield f"{path}.name", f"{one.name!r} is not a normalised name; write {canonicalize_name(one.name)!r}"
        if one.name in names[:index]:
            yield f"{path}.name", f"{one.name!r} is listed twice"
        if one.version is not None and not _is_version(one.version):
            yield f"{path}.version", f"{one.version!r} is not a version (PEP 440)"
        if one.untouched and (one.patches or one.prune):
            yield f"{path}.untouched", "contradicts the patches and prunes of the same component"
        if one.slim and recipe.untouched_reason(one.name):
            yield f"{path}.slim", "contradicts the rule by which the distribution is untouched"
        if one.sm and not one.reason:
            yield f"{path}.reason", "must say why the distribution is limited to some SMs"
        for key, fault in _content_faults(one):
            yield f"{path}.{key}", fault
        for key, fault in _build_faults(one, one.build) if one.build else ():
            yield f"{path}.build{key and '.'}{key}", fault


def _build_faults(one: Component, build: Build) -> Iterator[tuple[str, str]]:
    yield from build_faults(one.name, one.version, build)
    for key, url in (("url", build.url), ("git", build.git)):
        if url is not None:
            yield from _url_faults(key, url)
    if build.path is not None and (not build.path.isprintable() or "\\" in build.path or build.path.startswith("-")):
        yield "path", f"{build.path!r} is not a plain path"
    if build.subdirectory is not None and not _is_inside(build.subdirectory):
        yield "subdirectory", f"{build.subdirectory!r} must be a relative path without '..'"
    for number, name in enumerate(build.patches):
        if not _is_inside(name):
            yield f"patches[{number}]", f"{name!r} must be a relative path without '..'"


def _content_faults(one: Component) -> Iterator[tuple[str, str]]:
    """(key, fault) of what a component says about its distribution's files and modules."""
    for key, text in _paths_of(one):
        if not _is_inside(text):
            yield key, f"{text!r} must be a relative path without '..'"
    for key, pattern in _globs_of(one):
        if fault := _glob_fault(pattern):
            yield key, fault
    if one.slim:
        yield from ((f"slim.{key}", fault) for key, fault in _slim_faults(one.slim))
    yield from coverage_faults(one.coverage)
    limits = {f"prune[{number}]": prune.machines for number, prune in enumerate(one.prune)}
    limits |= {f"coverage[{number}]": coverage.machines for number, coverage in enumerate(one.coverage)}
    for key, machines in limits.items():
        for machine in sorted({*machines} - {*MACHINES}):
            yield f"{key}.machines", f"{machine!r} is none of {', '.join(MACHINES)}"
    for number, module in enumerate(one.imports):
        if not all(part.isidentifier() for part in module.split(".")):
            yield f"imports[{number}]", f"{module!r} is not the name of a module"


def _slim_faults(slim: Slim) -> Iterator[tuple[str, str]]:
    if not slim.files:
        yield "files", "must name at least one file"
    if not (slim.licence.strip() and slim.licence.isprintable()):
        yield "licence", "must name the licence that allows the change"
    if not _SHA256.fullmatch(slim.sha256):
        yield "sha256", "must be the 64 hex digits of the licence's text"


def _paths_of(one: Component) -> Iterator[tuple[str, str]]:
    """(key, path) of everything in a component that becomes a path."""
    for number, name in enumerate(one.patches):
        yield f"patches[{number}]", name
    yield from _globs_of(one)
    for number, link in enumerate(one.links):
        yield f"links[{number}].path", link.path
        yield f"links[{number}].to", link.to
    for number, rule in enumerate(one.rpath):
        for text in rule.folders:
            yield f"rpath[{number}].folders", text
    if one.slim:
        yield "slim.text", one.slim.text


def _globs_of(one: Component) -> Iterator[tuple[str, str]]:
    """(key, pattern) of every glob in a component."""
    for number, prune in enumerate(one.prune):
        for text in prune.paths:
            yield f"prune[{number}].paths", text
    for number, rpath in enumerate(one.rpath):
        for text in rpath.files:
            yield f"rpath[{number}].files", text
    for number, coverage in enumerate(one.coverage):
        for text in coverage.files:
            yield f"coverage[{number}].files", text
    for text in one.slim.files if one.slim else ():
        yield "slim.files", text


def _glob_fault(pattern: str) -> str | None:
    try:
        compile_glob(pattern)
    except RecipeError as fault:
        return fault.what
    return None


def _native_faults(recipe: Recipe) -> Iterator[tuple[str, str]]:
    for index, one in enumerate(recipe.native):
        texts = {"path": one.path.replace("{site}", "site"), "source": one.source}
        if one.release:
            texts |= {"release.name": one.release.name, "release.licence": one.release.licence}
            texts |= {"release.debian": one.release.debian} if one.release.debian is not None else {}
        for key, text in texts.items():
            if not _is_inside(text) or "{" in text or "}" in text:
                yield f"native[{index}].{key}", f"{text!r} must be a relative path without '..' or braces"


def _stub_faults(recipe: Recipe) -> Iterator[tuple[str, str]]:
    libraries = [one.library for one in recipe.stub]
    for index, one in enumerate(recipe.stub):
        path = f"stub[{index}]"
        if not _is_inside(one.library) or any(letter in one.library for letter in "*?["):
            yield f"{path}.library", f"{one.library!r} must be a relative path without '..' or wildcards"
        if one.library in libraries[:index]:
            yield f"{path}.library", f"{one.library!r} is replaced twice"
        if not is_normalized_name(one.distribution):
            yield f"{path}.distribution", f"{one.distribution!r} is not a normalised name"
        if not one.symbols:
            yield f"{path}.symbols", "must name the library's functions, such as 'cufft*'"
        if (one.status is None) != one.abort:
            yield f"{path}.status", "must be given, or `abort = true`, and not both"
        if one.status is not None and not -0x10000 <= one.status <= 0xFFFF:
            yield f"{path}.status", "must be from -65536 to 65535"
        if not one.message.isprintable() or not 0 < len(one.message) <= _MOST_MESSAGE:
            yield f"{path}.message", f"must be one line of at most {_MOST_MESSAGE} characters"


def _rule_faults(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Of what objects open by name, and of what is made on the host."""
    yield from dlopen_faults(recipe.dlopen)
    for index, rule in enumerate(recipe.dlopen):
        for pattern in rule.files:
            if fault := _glob_fault(pattern):
                yield f"dlopen[{index}].files", fault
    for index, row in enumerate(recipe.runtime):
        yield from ((f"runtime[{index}].{key}", fault) for key, fault in runtime_faults(row))


def _requires_faults(recipe: Recipe) -> Iterator[tuple[str, str]]:
    for index, edit in enumerate(recipe.requires):
        for key, name in (("name", edit.name), ("of", edit.of)):
            if name is not None and not is_normalized_name(name):
                yield f"requires[{index}].{key}", f"{name!r} is not normalised; write {canonicalize_name(name)!r}"
        if edit.to is None:
            continue
        try:
            wanted = Requirement(edit.to)
            if canonicalize_name(wanted.name) != edit.name:
                yield f"requires[{index}].to", f"requires another distribution than {edit.name!r}"
            version = recipe.component_of(edit.name).version
            if version and edit.of is None and not wanted.specifier.contains(version, prereleases=True):
                yield f"requires[{index}].to", f"{edit.to!r} contradicts the component's version {version}"
        except InvalidRequirement as fault:
            yield f"requires[{index}].to", f"{edit.to!r} is not a requirement (PEP 508): {fault}"


def _source_faults(recipe: Recipe) -> Iterator[tuple[str, str]]:
    for index, one in enumerate(recipe.component):
        path = f"component[{index}]"
        if one.url is None and one.path is None:
            if one.index != "pypi" and one.index not in recipe.indexes:
                yield f"{path}.index", f"{one.index!r} is not listed under [indexes]"
            for key in ("sha256", "size"):
                if getattr(one, key) is not None:
                    yield f"{path}.{key}", "is only meant beside a url or a path"
            continue
        yield from ((f"{path}.{key}", fault) for key, fault in _pinned_faults(one))
    archives: list[tuple[str, Archive | Release]] = [
        *((f"interpreter[{index}]", one) for index, one in enumerate(recipe.interpreter)),
        *((f"native[{index}].release", one.release) for index, one in enumerate(recipe.native) if one.release),
    ]
    for path, archive in archives:
        yield from _url_faults(f"{path}.url", archive.url)
        if not _SHA256.fullmatch(archive.sha256):
            yield f"{path}.sha256", "must be 64 hex digits"
    for name, url in recipe.indexes.items():
        yield from _url_faults(f"indexes.{name}", url)
        if name in _RESERVED_INDEXES:
            yield f"indexes.{name}", "is what a lock calls another source"


def _pinned_faults(one: Component) -> Iterator[tuple[str, str]]:
    """(key, fault) of a distribution that comes from a url or a local file."""
    source = "url" if one.url is not None else "path"
    if one.url is not None and one.path is not None:
        yield "path", "contradicts the url of the same component"
    if one.index != "pypi":
        yield "index", f"contradicts the {source} of the same component"
    if one.url is not None:
        yield from _url_faults("url", one.url)
    if one.path is not None and (fault := _wheel_path_fault(one, one.path)):
        yield "path", fault
    if not one.sha256 or not _SHA256.fullmatch(one.sha256):
        yield "sha256", "must be the 64 hex digits of " + ("what the url serves" if source == "url" else "the file")
    if one.size is not None and one.size < 1:
        yield "size", "must be the number of bytes"
    if one.version is None:
        yield "version", f"must be given beside a {source}"


def _wheel_path_fault(one: Component, path: str) -> str | None:
    if not path.isprintable() or "\\" in path or path.startswith("-"):
        return f"{path!r} is not a plain path"
    try:
        name, version, *_ = parse_wheel_filename(path.rpartition("/")[2])
    except InvalidWheelFilename as fault:
        return f"{path!r} is not a wheel: {fault}"
    if name != one.name or (one.version and _is_version(one.version) and version != Version(one.version)):
        return f"{path!r} is not {one.name} {one.version or ''}".rstrip()
    return None


def _url_faults(path: str, url: str) -> Iterator[tuple[str, str]]:
    if not re.fullmatch(r"https://[^\s'\"`$;@]+", url):
        yield path, f"{url!r} is not a plain https URL"


def _is_version(text: str) -> bool:
    try:
        Version(text)
    except InvalidVersion:
        return False
    return text == text.strip()


def _is_inside(path: str) -> bool:
    odd = not path.isprintable() or "\\" in path or path.startswith(("/", "-"))
    return bool(path) and not odd and ".." not in path.split("/")
