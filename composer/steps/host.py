"""Compare this host with the floors in a bundle's manifest, before anything is written to it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from composer import _proc
from composer.errors import ComposerError, HostError
from composer.model.manifest import Floor, Manifest
from composer.model.target import sm_text
from composer.proofs.floors import check_host
from composer.runtime import floors as runtime
from composer.runtime import gpu

_GLIBCXX = "libstdc++ GLIBCXX"
# Of `ldconfig -p`: `libstdc++.so.6 (libc6,x86-64) => /lib/x86_64-linux-gnu/libstdc++.so.6`.
_CACHED = re.compile(r"libstdc\+\+\.so\.6 \(libc6,(?P<machine>[^,)]+).*\) => (?P<path>/.+)")
_MACHINES = {"x86-64": "x86_64", "AArch64": "aarch64"}
# The values of CUDA_VISIBLE_DEVICES that hide every GPU; the last is the container runtime's.
_NO_GPU = ("", "-1", "NoDevFiles")
_VERSIONED = re.compile(r"libstdc\+\+\.so\.6\.0\.(\d+)\Z")


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
    host = runtime.read_host(plain) | ({_GLIBCXX: _libstdcxx()} if _GLIBCXX in plain else {})
    found = [
        HostError(one.evidence, where=name, why=one.subject, fix=f"{one.fix} --any-host unpacks it all the same.")
        for one in check_host(manifest.floors, host)
    ]
    return [*found, *_foreign_gpus(name, manifest.floors.get("SM"))]


def _libstdcxx() -> str:
    """GLIBCXX of the host's own libstdc++, which the bundle will load; nothing where there is none, or no telling.

    Not that of this process, as a bundle asks at its start: this Python may have brought another.
    """
    for program in ("/sbin/ldconfig", "ldconfig"):
        try:
            text = _proc.run([program, "-p"], timeout=30).decode("utf-8", "replace")
        except ComposerError:
            continue
        for row in _CACHED.finditer(text):
            number = _VERSIONED.search(str(Path(row["path"]).resolve()))
            if _MACHINES.get(row["machine"]) == os.uname().machine and number:
                return f"3.4.{number[1]}"
    return ""


def _foreign_gpus(name: str, floor: Floor | None) -> list[HostError]:
    """None of a host's GPUs is the bundle's; empty where one is, or none is seen or to be used."""
    if floor is None or os.environ.get("CUDA_VISIBLE_DEVICES") in _NO_GPU or not (present := gpu.gpus()):
        return []
    words = floor.version.split()
    built = [one.partition("+") for one in words]
    if any(gpu.runs(sm, int(own), ptx=bool(ptx)) for _, sm in present for own, _, ptx in built):
        return []
    shown = ", ".join(f"{label} (SM {sm})" for label, sm in dict.fromkeys(present))
    return [HostError(f"the bundle holds GPU code for {sm_text(words)}; this host has {shown}", where=name,
                      fix=f"Use one built with --sm {present[0][1]}; --any-host unpacks it all the same.")]  # fmt: skip
