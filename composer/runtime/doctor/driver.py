"""Read how the NVIDIA driver is, and how its GPUs are: libraries, device files, NVML's health, the kernel log.

The driver is started in a process of its own (probe.py), because a damaged one ends it.
"""

# Names are joined below a folder, and nothing else: no place for pathlib.
# ruff: noqa: PTH100, PTH110, PTH118, PTH120, PTH123, PTH207

import contextlib
import ctypes
import glob
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from ..host import nvml

Facts = dict[str, Any]

#: What bundles take from a host, by kind, whatever their manifests list: the driver's are also opened by names that no
#: file of a bundle tells (proofs/closure.py).
LIBRARIES = {"libcuda.so.1": "driver", "libnvidia-ml.so.1": "driver", "libnvidia-ptxjitcompiler.so.1": "driver",
             "libibverbs.so.1": "plugin"}  # fmt: skip
_PROBE_SECONDS = 60
_LOG_RECORDS = 20_000
_XID = re.compile(r"NVRM: Xid \((PCI:[0-9a-fA-F:.]+)\): (\d+)")


def read(libraries: Mapping[str, str], *, by_nvml: bool) -> tuple[list[Facts], Facts]:
    """What became of loading each of `libraries` (kind by name), and the facts of the driver.

    by_nvml: NVML answers, so it is asked for the GPUs' health.
    """
    probes = _probe(libraries)
    module = module_version()
    missing, denied = _nodes() if module else ([], [])
    return probes["libraries"], {
        "module": module, "cuda": _cuda(probes), "missing_nodes": missing, "denied_nodes": denied,
        "health": _health() if by_nvml else [], "xids": xids(_kernel_log()) if module else [],
    }  # fmt: skip


def module_version() -> str | None:
    """Of the kernel module that is loaded."""
    found = re.search(r" (\d{3,4}\.\d[\d.]*) ", _text("/proc/driver/nvidia/version").partition("\n")[0] + " ")
    return found[1] if found else None


def _text(path: str) -> str:
    try:
        with open(path, "rb") as stream:
            return stream.read(1 << 16).decode("utf-8", "replace")
    except OSError:
        return ""


def _probe(libraries: Mapping[str, str]) -> Facts:
    """`libraries`: what became of loading each; `cuda`: what cuInit says; `ending`: how the process ended, if badly."""
    probe = os.path.join(os.path.dirname(os.path.abspath(__file__)), "probe.py")
    argv = [sys.executable, "-S", "-B", probe, *libraries]
    try:
        done = subprocess.run(argv, capture_output=True, timeout=_PROBE_SECONDS, check=False)
        output, ending = done.stdout, f"exit status {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired as late:
        output, ending = late.stdout or b"", f"no answer within {_PROBE_SECONDS} s"
    except OSError as fault:
        output, ending = b"", str(fault)
    rows = [json.loads(line) for line in output.splitlines() if line.startswith(b"{") and line.endswith(b"}")]
    loaded = {row["library"]: row for row in rows if "library" in row}
    return {"cuda": next((row for row in rows if "cuda" in row), None), "ending": ending,
            "libraries": [{"name": name, "kind": kind, "error": loaded.get(name, {}).get("error"),
                           "path": loaded.get(name, {}).get("path"), "tried": name in loaded}
                          for name, kind in libraries.items()]}  # fmt: skip


def _cuda(probes: Facts) -> Facts:
    row = next((one for one in probes["libraries"] if one["name"] == "libcuda.so.1"), None)
    path = os.path.realpath(row["path"]) if row and row["path"] else None
    version = re.search(r"\.so\.(\d{3,4}\.[\d.]+)\Z", path or "")
    started = probes["cuda"]
    tried = bool(row and row["tried"])
    return {"tried": tried, "loaded": bool(tried and row and not row["error"]), "path": path,
            "library_version": version[1] if version else None, "status": started["cuda"] if started else None,
            "error": (row and row["error"]) or probes["ending"] or None}  # fmt: skip


def _nodes() -> tuple[list[str], list[str]]:
    """Device files that CUDA opens: those that are missing, and those that this user may not open."""
    cards = [path for path in glob.glob("/dev/nvidia*") if re.fullmatch(r"/dev/nvidia\d+", path)]
    wanted = ["/dev/nvidiactl", "/dev/nvidia-uvm", *(cards or ["/dev/nvidia0"])]
    missing = [path for path in wanted if not os.path.exists(path)]
    return missing, [path for path in wanted if path not in missing and not os.access(path, os.R_OK | os.W_OK)]


def _health() -> list[Facts]:
    """What NVML tells of each GPU beside what `detect` asks it for."""
    try:
        with nvml.opened() as library:
            return [_one_health(library, index, handle) for index, handle, status in library.handles() if not status]
    except nvml.NvmlError:
        return []


def _one_health(library: nvml.Nvml, index: int, handle: ctypes.c_void_p) -> Facts:
    errors, reasons = ctypes.c_ulonglong(), ctypes.c_ulonglong()
    rows = [ctypes.c_uint() for _ in range(4)]
    uncorrected = library.status("nvmlDeviceGetTotalEccErrors", handle, 1, 0, ctypes.byref(errors))
    throttled = library.status("nvmlDeviceGetCurrentClocksThrottleReasons", handle, ctypes.byref(reasons))
    remapped = library.status("nvmlDeviceGetRemappedRows", handle, *map(ctypes.byref, rows))
    return {
        "index": index,
        "compute_mode": library.number("nvmlDeviceGetComputeMode", handle),
        "persistence": library.number("nvmlDeviceGetPersistenceMode", handle),
        "slowdown_c": library.number("nvmlDeviceGetTemperatureThreshold", handle, 1),
        "ecc_uncorrected": None if uncorrected else errors.value,
        "throttle": None if throttled else reasons.value,
        "remap_pending": False if remapped else bool(rows[2].value),
        "remap_failed": False if remapped else bool(rows[3].value),
        "processes": _processes(library, handle),
    }


def _processes(library: nvml.Nvml, handle: ctypes.c_void_p) -> list[tuple[int, str]]:
    """(id, name) of what computes on a GPU; NVML tells the host's ids, which mean nothing within a container."""
    count = ctypes.c_uint(64)
    buffer = ctypes.create_string_buffer(64 * 24)  # nvmlProcessInfo_v2_t: unsigned, unsigned long long, 2 unsigned
    if library.status("nvmlDeviceGetComputeRunningProcesses_v3", handle, ctypes.byref(count), buffer):
        return []
    ids = [int.from_bytes(buffer.raw[24 * row : 24 * row + 4], sys.byteorder) for row in range(min(count.value, 64))]
    return [(pid, _text(f"/proc/{pid}/comm").strip() or "of another namespace") for pid in ids]


def _kernel_log() -> str:
    """Nothing for a user who may not read it."""
    try:
        handle = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return ""
    records = []
    with contextlib.suppress(OSError):  # EAGAIN after the last, EPIPE where the kernel was faster than we
        for _ in range(_LOG_RECORDS):
            records.append(os.read(handle, 8192))  # one for each call
    os.close(handle)
    return b"".join(records).decode("utf-8", "replace")


def xids(log: str) -> list[tuple[str, int, int]]:
    """(GPU, Xid, count) of every fault that the driver wrote to the kernel log."""
    seen: dict[tuple[str, int], int] = {}
    for where, code in _XID.findall(log):
        seen[where, int(code)] = seen.get((where, int(code)), 0) + 1
    return [(where, code, count) for (where, code), count in seen.items()]
