"""Which GPU code a set of target architectures can run.

T is a target, ten times its compute capability. Per container: an ELF image runs on T when it has the same major
version and no higher minor one; arch-specific (`a`) images only on exactly T, those for Tegra only there, in both
directions. The driver takes the highest that runs, so all of that SM stay, whatever their variant. Where none runs, the
driver compiles the highest PTX that is not above T. LTO-IR is kept by the same limit; an unknown kind always.
Sources: NVIDIA's Blackwell compatibility guide (binary compatibility within a major version), NVIDIA's description of
family-specific features, and loading trimmed containers on an H200.

A proof that an edit kept enough must not use this module: it would repeat its mistakes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

#: 101 was renamed 110 in CUDA 13; both names are in use.
_RENAMED = {101: 110}
_TEGRA = frozenset({53, 62, 72, 87, 110})


class Image(Protocol):
    """What the rules look at; `formats.fatbin.Entry` is one."""

    @property
    def kind(self) -> str:
        """`ptx`, `elf`, `lto` or anything else."""
        ...

    @property
    def sm(self) -> int:
        """Architecture, as in 90."""
        ...

    @property
    def variant(self) -> str:
        """`a`, `f` or nothing."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The targets to keep code for: all when `sms` is empty.

    keep_ptx: also keep the PTX that the driver compiles for each target, and for each GPU after it.
    """

    sms: tuple[int, ...] = ()
    keep_ptx: bool = False


def select(entries: Sequence[Image], selection: Selection) -> frozenset[int]:
    """The indices of the images of one container that stay: the union over the targets."""
    if not selection.sms:
        return frozenset(range(len(entries)))
    kept = _unknown(entries)
    for sm in selection.sms:
        binary = _highest(entries, "elf", sm)
        kept |= binary | _highest(entries, "lto", sm)
        if not binary:
            kept |= _highest(entries, "ptx", sm)
    return frozenset(kept | _forward(entries, selection))


def select_relinkable(entries: Sequence[Image], linked: Iterable[Sequence[Image]],
                      selection: Selection) -> frozenset[int]:  # fmt: skip
    """The indices that stay of one container of `__nv_relfatbin`, the objects that device-linked code was made from.

    The driver links them again, at run time, only when a device-linked container (`linked`: the entries of each) has no
    binary for the GPU. A target for which every one of them has one needs none of these objects. Without `linked`
    containers nothing is known about their use, and the rules of `select` hold.
    """
    if not selection.sms:
        return select(entries, selection)
    containers = list(linked)
    missing = tuple(sm for sm in selection.sms if not containers or not all(runs(one, sm) for one in containers))
    kept = _unknown(entries) | (select(entries, replace(selection, sms=missing)) if missing else set())
    return frozenset(kept | _forward(entries, selection))


def runs(entries: Iterable[Image], sm: int) -> bool:
    """Whether a container has an ELF image that runs on `sm`, without any compilation."""
    return any(image.kind == "elf" and _fits_binary(image, sm) for image in entries)


def compiles(entries: Iterable[Image], sm: int) -> bool:
    """Whether a container has PTX that the driver can compile for `sm`."""
    return any(image.kind == "ptx" and _fits_text(image, sm) for image in entries)


def _unknown(entries: Sequence[Image]) -> set[int]:
    return {index for index, image in enumerate(entries) if image.kind not in ("elf", "ptx", "lto")}


def _forward(entries: Sequence[Image], selection: Selection) -> set[int]:
    """What `keep_ptx` adds: the newest PTX for each target, the newest that any GPU after it takes, and all later."""
    kept: set[int] = set()
    for sm in selection.sms if selection.keep_ptx else ():
        portable = {index: _sm(one.sm) for index, one in enumerate(entries) if one.kind == "ptx" and not one.variant}
        later = {index for index, number in portable.items() if number > _sm(sm)}
        earlier = {index: number for index, number in portable.items() if index not in later}
        kept |= _highest(entries, "ptx", sm) | _best(earlier) | later
    return kept


def _highest(entries: Sequence[Image], kind: str, sm: int) -> set[int]:
    """The images of one kind that fit, of the highest SM among those."""
    fits = _fits_binary if kind == "elf" else _fits_text
    return _best({
        index: _sm(image.sm) for index, image in enumerate(entries) if image.kind == kind and fits(image, sm)
    })  # fmt: skip


def _best(found: Mapping[int, int]) -> set[int]:
    """The indices with the highest SM."""
    best = max(found.values(), default=0)
    return {index for index, number in found.items() if number == best}


def _sm(number: int) -> int:
    return _RENAMED.get(number, number)


def _fits_binary(image: Image, target: int) -> bool:
    number, target = _sm(image.sm), _sm(target)
    if number == target:
        return True
    if image.variant == "a" or number in _TEGRA or target in _TEGRA:
        return False
    return number // 10 == target // 10 and number < target


def _fits_text(image: Image, target: int) -> bool:
    """PTX and LTO-IR, which the driver compiles: for any later architecture, unless they say otherwise."""
    number, target = _sm(image.sm), _sm(target)
    if image.variant == "a":
        return number == target
    if image.variant == "f":
        return number // 10 == target // 10 and number <= target
    return number <= target
