"""A plan: what a build will do, decided before anything is made. Everything here is data and can be shown as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from composer.model.recipe import Link, Prune, PthFile, RequiresEdit


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


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What `compose plan` shows."""

    name: str
    recipe: str
    lock: str
    target: Mapping[str, str]
    interpreter: str
    torch: str
    layers: Sequence[PlannedLayer]
    left_out: Sequence[LeftOut]
    warnings: Sequence[str]
    fingerprint: str
    output: str
    up_to_date: bool
