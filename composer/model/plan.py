"""A plan: what a build will do, decided before anything is made. Everything here is data and can be shown as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from composer.model.globs import matches
from composer.model.gpu import Image, Selection, select
from composer.model.input import InputFacts
from composer.model.recipe import Link, Prune, PthFile, RequiresEdit
from composer.model.target import sm_text


class RpathEdit(msgspec.Struct, frozen=True, kw_only=True):
    """The DT_RPATH that one object gets.

    rpath: all entries, in the loader's order; none removes the tag. added, dropped: what it has more and less than
    upstream's entries. why: one line for each entry added or dropped, with the choices there were.
    """

    path: str
    rpath: Sequence[str]
    added: Sequence[str]
    dropped: Sequence[str]
    why: Sequence[str]


class SlimEdit(msgspec.Struct, frozen=True, kw_only=True):
    """Which objects of a wheel are made smaller, for which SMs, and what allows it.

    files: globs below site-packages. gpu: cut code that no GPU of these SMs can run; keep_ptx: but keep the newest PTX.
    A loose cubin has nothing to cut: it is left out, or stays byte for byte. debug: cut symbols for debuggers.
    """

    files: Sequence[str]
    sms: Sequence[int]
    licence: str
    gpu: bool
    keep_ptx: bool
    debug: bool

    def covers(self, path: str) -> bool:
        """Whether the object at `path` (below the prefix) is one of them."""
        return self.pattern(path) is not None

    def pattern(self, path: str) -> str | None:
        """Which of the globs names the object at `path`, if any does."""
        name = path.partition("/site-packages/")[2] or path
        return next((pattern for pattern in self.files if matches(name, pattern)), None)

    def why_left_out(self, path: str, cubin: Image) -> str | None:
        """Why the loose cubin at `path` is left out; None when it stays."""
        if not self.gpu or not self.covers(path) or select([cubin], Selection(sms=tuple(self.sms))):
            return None
        return f"sm_{cubin.sm}{cubin.variant} code, which no GPU of {sm_text(self.sms)} runs"


class PatchFile(msgspec.Struct, frozen=True, kw_only=True):
    """A patch by name below patches/, its sha256, and the first line of its description."""

    name: str
    sha256: str
    why: str


class WheelPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How one wheel becomes a layer. Its canonical JSON, and nothing else, determines the layer's bytes.

    artifact: sha256 of the wheel. bytecode: full version of the interpreter that compiles modules, or None for no
    `.pyc`. level: zstd level. mtime: seconds since the epoch for every member.
    """

    name: str
    version: str
    filename: str
    artifact: str
    python: str
    requires: Sequence[RequiresEdit] = ()
    patches: Sequence[PatchFile] = ()
    prune: Sequence[Prune] = ()
    links: Sequence[Link] = ()
    rpath: Sequence[RpathEdit] = ()
    slim: SlimEdit | None = None
    pth: Sequence[PthFile] = ()
    untouched: str | None = None
    bytecode: str | None
    level: int
    mtime: int


class PlannedWheel(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a plan made before wheels are here. size: bytes, 0 when unknown; fetched: it is in the store."""

    name: str
    version: str
    size: int
    fetched: bool


class PlannedLayer(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a plan. size: bytes of the wheel; cached: the store already holds the layer."""

    name: str
    version: str
    key: str
    size: int
    cached: bool
    edits: Sequence[str] = ()


class LeftOut(msgspec.Struct, frozen=True, kw_only=True):
    """A distribution of the recipe that this bundle does not hold, and why."""

    name: str
    version: str
    reason: str


class BuiltFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A distribution that is built from source. key: of all inputs; source: what its bytes are known by."""

    name: str
    version: str
    key: str
    source: str


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What `compose plan` shows. not_served: of a bundle for all SMs, why it is not for these."""

    name: str
    recipe: str
    lock: str
    target: Mapping[str, str]
    interpreter: str
    torch: str
    built: Sequence[BuiltFacts]
    layers: Sequence[PlannedLayer]
    stubs: Sequence[str]
    inputs: Sequence[InputFacts]
    not_served: Mapping[int, str]
    left_out: Sequence[LeftOut]
    warnings: Sequence[str]
    fingerprint: str
    output: str
    up_to_date: bool
