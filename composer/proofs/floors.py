"""Compute from a bundle's files the oldest host that runs it, and compare a host with that.

Wheel tags do not tell: sgl-kernel 0.3.21 is tagged manylinux2014 and needs GLIBC_2.27.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from composer.formats.elf import Elf
from composer.model.finding import Finding
from composer.model.host_floor import HostFloor
from composer.model.manifest import Floor
from composer.model.target import Drivers
from composer.proofs.closure import floors as version_floors
from composer.runtime import floors as runtime

#: The text form of the floors, which the bundle's interpreter reads at its start.
FLOORS_PATH = "share/compose/floors"

_RUNTIMES = re.compile(r"lib(?:cudart|cublas)\.so\.(\d+)\Z")
#: Copies of the host's C++ runtime, which only serve hosts that have none.
_FALLBACK = "lib/fallback/"


def host_floors(
    objects: Mapping[str, Elf], drivers: Drivers, *, cuda: str, kernels: Mapping[str, tuple[int, int, int]],
    ptx: Sequence[str] = (),
) -> dict[str, Floor]:  # fmt: skip
    """What a host must have at least, by name: glibc, libstdc++, kernel and NVIDIA's driver.

    Parameters
    ----------
    objects: every shared object and program of the bundle, by path.
    cuda: `major.minor` of the target.
    kernels: the oldest Linux by the ABI notes of those that have one (`formats.notes`).
    ptx: libraries that the target needs and from which the driver compiles PTX: it must be of that CUDA's own branch.
    """
    return file_floors(objects, kernels) | _driver_floors(_lasting(objects), drivers, cuda, ptx)


def file_floors(objects: Mapping[str, Elf], kernels: Mapping[str, tuple[int, int, int]]) -> dict[str, Floor]:
    """What the files ask for by themselves: glibc, libstdc++ and kernel. Arguments as of `host_floors`."""
    found = version_floors(_lasting(objects))
    rows = (("glibc", found.glibc), ("libstdc++ GLIBCXX", found.glibcxx), ("libstdc++ CXXABI", found.cxxabi))
    floors = {name: Floor(version=str(one), because=one.setters[0]) for name, one in rows if one}
    programs = {path: version for path, version in kernels.items() if not path.startswith(_FALLBACK)}
    if programs:
        newest = min(programs, key=lambda path: (*(-number for number in programs[path]), path))
        floors["kernel"] = Floor(version=".".join(map(str, programs[newest])), because=newest)
    return floors


def check_listed(listed: Mapping[str, Floor], wanted: Mapping[str, Floor]) -> tuple[Finding, ...]:
    """An error for each floor that a manifest lists too low, or not at all: a host below it would not be refused.

    wanted: what the files ask for (`file_floors`).
    """
    lacking = {
        name: one for name, one in wanted.items()
        if name not in listed or _numbers(listed[name].version) < _numbers(one.version)
    }  # fmt: skip
    return tuple(
        Finding(
            id="floors.manifest", severity="error", subject=one.because, fix="Build the bundle again.",
            evidence=f"needs {name} {one.version}, the manifest says {listed[name].version if name in listed else '-'}",
        )
        for name, one in lacking.items()
    )  # fmt: skip


def _lasting(objects: Mapping[str, Elf]) -> dict[str, Elf]:
    return {path: elf for path, elf in objects.items() if not path.startswith(_FALLBACK)}


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def cpu_floor(features: Sequence[str], built: Sequence[str]) -> dict[str, Floor]:
    """The CPU's, of distributions that were built with an instruction set's flags; none without them.

    Libraries that choose their code when they run need no more than the baseline, and that every host has.
    features: as in /proc/cpuinfo.
    """
    return {"CPU": Floor(version=" ".join(features), because=", ".join(sorted(built)))} if built and features else {}


def sm_floor(sms: Sequence[int], libraries: Sequence[str], *, ptx: bool) -> dict[str, Floor]:
    """The GPU's: `90`, or `90+PTX` where later ones compile. libraries: those that the targets need."""
    version = " ".join(f"{sm}{'+PTX' if ptx else ''}" for sm in sms)
    return {"SM": Floor(version=version, because=libraries[0])} if libraries else {}


def stated_floors(stated: Sequence[HostFloor], sms: Collection[int]) -> dict[str, Floor]:
    """What the recipe asks of hosts with these GPUs beside what the files do; of several of a name the newest."""
    asked = sorted((one for one in stated if one.applies(sms)), key=lambda one: _numbers(one.version))
    return {one.name: Floor(version=one.version, because=one.reason) for one in asked}


def render_floors(bundle: str, floors: Mapping[str, Floor]) -> bytes:
    """The text form of the floors."""
    lines = [f"{name}\t{one.version}\t{one.because}" for name, one in floors.items()]
    return "".join(f"{line}\n" for line in [bundle, *lines]).encode()


def check_host(floors: Mapping[str, Floor], host: Mapping[str, str]) -> tuple[Finding, ...]:
    """Every floor that a host is below. host: what `composer.runtime.floors.read_host` says, in which gaps are met."""
    plain = {name: (one.version, one.because) for name, one in floors.items()}
    return tuple(
        Finding(id=f"floors.{_IDS.get(name, name)}", severity="error", subject=because, evidence=f"the bundle {what}",
                fix=f"{fix[0].upper()}{fix[1:]}.")
        for name, what, because, fix in runtime.unmet(plain, dict(host))
    )  # fmt: skip


_IDS = {"CPU": "cpu", "libstdc++ GLIBCXX": "libstdcxx", "L4T": "l4t"}


def _driver_floors(objects: Mapping[str, Elf], drivers: Drivers, cuda: str,
                   ptx: Sequence[str]) -> dict[str, Floor]:  # fmt: skip
    """Of the newest CUDA in the tree; none without CUDA, or for one that the table does not know."""
    named = {path: _RUNTIMES.match(objects[path].soname or "") for path in sorted(objects, reverse=True)}
    majors = {int(found[1]): path for path, found in named.items() if found}
    if not majors:
        return {}
    major, because = max(majors.items())
    exact = cuda if cuda.split(".")[0] == str(major) else None
    native = drivers.native.get(exact) if exact else None
    compatible = drivers.compatible.get(str(major))
    if ptx and native and exact:
        return {"driver": Floor(version=native, because=ptx[0]), "CUDA": Floor(version=exact, because=ptx[0])}
    if compatible is None:
        return {}
    floors = {"driver": Floor(version=compatible, because=because),
              "CUDA": Floor(version=f"{major}.0", because=because)}  # fmt: skip
    return floors | ({"driver (native)": Floor(version=native, because=because)} if native else {})
