"""Compare this host with the floors in a bundle's manifest, before anything is written to it."""

from __future__ import annotations

import os

from composer.errors import HostError
from composer.model.manifest import Floor, Manifest
from composer.proofs.floors import check_host
from composer.runtime import floors as runtime
from composer.runtime import gpu


def require_host(manifest: Manifest) -> None:
    """HostError with every reason for which the bundle would not run here; a host without a driver has no GPU to fit.

    The same as the bundle's own checks at its start, and whether the machine is the bundle's at all.
    """
    HostError.collect(list(_faults(manifest)))


def _faults(manifest: Manifest) -> list[HostError]:
    name, machine = manifest.name, manifest.target["machine"]
    if os.uname().machine != machine:
        return [HostError(f"is a bundle for {machine}, this host is {os.uname().machine}", where=name,
                          fix=f"Unpack it on {machine}; --any-host unpacks it all the same.")]  # fmt: skip
    plain = {floor: (one.version, one.because) for floor, one in manifest.floors.items()}
    found = [
        HostError(one.evidence, where=name, why=one.subject, fix=f"{one.fix} --any-host unpacks it all the same.")
        for one in check_host(manifest.floors, runtime.read_host(plain))
    ]
    return [*found, *_foreign_gpus(name, manifest.floors.get("SM"))]


def _foreign_gpus(name: str, floor: Floor | None) -> list[HostError]:
    """None of a host's GPUs is the bundle's; empty where one is, or none is seen."""
    present = gpu.gpus() if floor else []
    if floor is None or not present:
        return []
    built = [one.partition("+") for one in floor.version.split()]
    if any(gpu.runs(sm, int(own), ptx=bool(ptx)) for _, sm in present for own, _, ptx in built):
        return []
    shown = ", ".join(f"{label} (SM {sm})" for label, sm in dict.fromkeys(present))
    return [HostError(f"the bundle holds GPU code for SM {floor.version}; this host has {shown}", where=name,
                      fix=f"Use one built with --sm {present[0][1]}; --any-host unpacks it all the same.")]  # fmt: skip
