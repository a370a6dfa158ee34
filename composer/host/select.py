"""Choose the bundle that fits a host best, and say of every other why not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from packaging.version import InvalidVersion, Version

from composer.host.detect import Gpu, Host
from composer.host.index import BundleFacts
from composer.runtime import floors, gpu
from composer.runtime.host import detect


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why a bundle does not run on a host: what, the evidence, and what to do."""

    what: str
    why: str | None = None
    fix: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A bundle on a host. reasons: none when it runs. uses: the GPUs that it runs on; left_out: the visible others.

    native: all that it uses are of an SM that it was built for. isa: the CPU runs the instruction set of its target.
    """

    bundle: BundleFacts
    reasons: tuple[Reason, ...]
    uses: tuple[Gpu, ...] = ()
    left_out: tuple[Gpu, ...] = ()
    native: bool = False
    isa: bool = False

    @property
    def visible_devices(self) -> str | None:
        """What to set for CUDA so that only the GPUs are seen that it runs on; None where it runs on all.

        UUIDs and not numbers, which CUDA gives to GPUs by their speed.
        """
        if not self.left_out or not self.uses:
            return None
        return f"CUDA_VISIBLE_DEVICES={','.join(one.uuid or f'(UUID of {one.kind})' for one in self.uses)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Verdicts on all bundles: `fitting` best first, `refused` by name."""

    fitting: tuple[Verdict, ...]
    refused: tuple[Verdict, ...]

    @property
    def recipes(self) -> tuple[str, ...]:
        """The recipes of those that fit: versions compare within one only."""
        return tuple(sorted({one.bundle.recipe for one in self.fitting}))


def select(bundles: Sequence[BundleFacts], host: Host) -> Selection:
    """Judge every bundle and rank those that run.

    The best runs on all GPUs, or else on those with the most memory together, was built for their SM, uses the richest
    instruction set of the CPU, has the newest version of the stack, then of CUDA, and is the smallest.
    """
    verdicts = sorted((judge(one, host) for one in bundles), key=lambda one: (one.bundle.name, one.bundle.file))
    fitting = [one for one in verdicts if not one.reasons]
    fitting.sort(key=_rank, reverse=True)
    return Selection(fitting=tuple(fitting), refused=tuple(one for one in verdicts if one.reasons))


def judge(bundle: BundleFacts, host: Host) -> Verdict:
    """Whether a bundle runs on a host, with every reason for which it does not."""
    machine = bundle.target.machine
    if host.machine != machine:
        return Verdict(bundle=bundle, reasons=(Reason(what=f"is for {machine}; this host is {host.machine}"),))
    wanted = {name: (one.version, one.because) for name, one in bundle.floors.items()}
    below = [Reason(what=what, why=because, fix=fix)
             for _, what, because, fix in floors.unmet(wanted, _floor_values(host))]  # fmt: skip
    visible = host.visible_gpus
    built = list(_built(bundle))
    uses = tuple(one for one in visible if one.sm and any(gpu.runs(one.sm, sm, ptx=ptx) for sm, ptx in built))
    foreign = _foreign(host, built) if built and not uses else []
    return Verdict(
        bundle=bundle, reasons=(*below, *foreign), uses=uses,
        left_out=tuple(one for one in visible if one not in uses) if built else (),
        native=all(one.sm in [sm for sm, _ in built] for one in uses), isa=bundle.target.isa in host.cpu.isa,
    )  # fmt: skip


def _floor_values(host: Host) -> dict[str, str]:
    """The host in the words of `composer.runtime.floors`, in which gaps are met."""
    driver = host.driver
    values = {
        "glibc": host.glibc, "kernel": host.kernel, "libstdc++ GLIBCXX": host.libstdcxx,
        "CPU": " ".join(host.cpu.features), "driver": driver.version if driver else None,
        "CUDA": driver.cuda if driver else None, "L4T": "none" if host.l4t is None else host.l4t,
    }  # fmt: skip
    return {name: value for name, value in values.items() if value}


def _built(bundle: BundleFacts) -> Iterator[tuple[int, bool]]:
    """(SM, whether its PTX is there) of the floor `90+PTX 80`; none for a bundle without GPU code."""
    floor = bundle.floors.get("SM")
    for word in floor.version.split() if floor else ():
        sm, _, ptx = word.partition("+")
        if sm.isdecimal():
            yield int(sm), bool(ptx)


def _foreign(host: Host, built: Sequence[tuple[int, bool]]) -> list[Reason]:
    """Why none of the host's GPUs will do."""
    wanted = ", ".join(f"SM {sm}{' (or newer, by PTX)' if ptx else ''}" for sm, ptx in built)
    if not host.gpus:
        return [Reason(what=f"needs a GPU of {wanted}; none was found",
                       fix="to choose for a host whose GPU you know, state it: --sm 90, or --gpu H100")]  # fmt: skip
    if not host.visible_gpus:
        return [Reason(what=f"needs a GPU of {wanted}; CUDA_VISIBLE_DEVICES hides all {len(host.gpus)} of this host",
                       fix="unset CUDA_VISIBLE_DEVICES")]  # fmt: skip
    if not any(one.sm for one in host.visible_gpus):
        return [Reason(what=f"needs a GPU of {wanted}; the SM of this host's is not known",
                       fix="state it: --sm 90, or --gpu H100")]  # fmt: skip
    present = ", ".join(dict.fromkeys(one.kind for one in host.visible_gpus))
    best = max(one.sm or 0 for one in host.visible_gpus)
    return [Reason(what=f"holds GPU code for {wanted}; this host has {present}",
                   fix=f"use one built with --sm {best}")]  # fmt: skip


def _rank(one: Verdict) -> tuple[object, ...]:
    order = list(detect.ISA.get(one.bundle.target.machine, ()))
    name = one.bundle.target.isa
    memory = sum(used.memory_bytes or 0 for used in one.uses)
    return (
        not one.left_out, memory, len(one.uses), one.native, order.index(name) if one.isa and name in order else -1,
        _version(one.bundle.version), _version(one.bundle.target.cuda), -one.bundle.size,
    )  # fmt: skip


def _version(text: str) -> Version:
    """By PEP 440; what is no version comes last."""
    try:
        return Version(text)
    except InvalidVersion:
        return Version("0.dev0")
