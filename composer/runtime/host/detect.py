"""Show what this host is, as far as a bundle cares: GPUs, driver, CPU, C library, memory and limits.

    compose-detect [--json]

Nothing is asked of the network and no GPU is initialised. What cannot be found out is null. Exit status: 0, or 2 for a
command line that cannot be meant.
"""

# Names are joined below `root`; pathlib would add nothing. /dev/shm is only measured.
# ruff: noqa: PTH118, PTH208, S108

import argparse
import json
import os
import re
import resource
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from .. import floors
from . import devices

SCHEMA = 1
#: The instruction sets that bundles are built for, by machine: the features of /proc/cpuinfo that a CPU must have.
#: The poorest first. (recipes/targets.toml)
ISA: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "avx": ("avx",),
        "avx2": ("avx2", "fma", "f16c"),
        "x86-64-v3": ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"),
        "avx512": ("avx512f", "avx512dq", "avx512vl", "avx512bw", "fma"),
        "x86-64-v4": ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "avx512f", "avx512bw", "avx512cd",
                      "avx512dq", "avx512vl"),
        "avx512vnni": ("avx512f", "avx512dq", "avx512vl", "avx512bw", "avx512_vnni", "fma"),
        "avx512bf16": ("avx512f", "avx512dq", "avx512vl", "avx512bw", "avx512_bf16", "fma"),
    },
    "aarch64": {"armv8_2": ("asimdhp", "asimddp", "atomics"), "armv9": ("sve2", "bf16", "i8mm")},
}  # fmt: skip
# Arm's processors have numbers for names in /proc/cpuinfo; these are those of hosts with NVIDIA GPUs.
_ARM = {
    ("0x41", "0xd0c"): "Arm Neoverse N1", ("0x41", "0xd40"): "Arm Neoverse V1", ("0x41", "0xd42"): "Arm Cortex-A78AE",
    ("0x41", "0xd49"): "Arm Neoverse N2", ("0x41", "0xd4f"): "Arm Neoverse V2", ("0x41", "0xd83"): "Arm Neoverse V3AE",
    ("0x41", "0xd85"): "Arm Cortex-X925", ("0x41", "0xd87"): "Arm Cortex-A725", ("0x4e", "0x004"): "NVIDIA Carmel",
}  # fmt: skip


def detect(root: str = "/") -> dict[str, Any]:
    """What this host is, ready for JSON. Bytes, degrees Celsius and per cent; null for what was not found out.

    root: the folder below which /proc, /sys and /etc are read; anything but `/` is for looking at another system's
    files, of which NVML, the C libraries and the limits say nothing.
    """
    gpus = devices.find(root)
    host = floors.read_host(dict.fromkeys(("glibc", "kernel"), ("", "")))
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    memory = devices.read_memory(root)
    return {
        "schema": SCHEMA,
        "machine": os.uname().machine,
        "kernel": host["kernel"] or None,
        "glibc": host["glibc"] or None,
        "libstdcxx": _libstdcxx(),
        "cpu": _cpu(root, os.uname().machine),
        "driver": gpus["driver"],
        "gpus": gpus["gpus"],
        "visible": devices.visible(gpus["gpus"], asked),
        "cuda_visible_devices": asked,
        "found_by": gpus["found_by"],
        "l4t": _l4t(root),
        "memory": {"total_bytes": memory.get("MemTotal"), "available_bytes": memory.get("MemAvailable")},
        "shm": _shm(root),
        "numa_nodes": _numa_nodes(root),
        "hugepages": {"transparent": _transparent(root), "free": memory.get("HugePages_Free")},
        "limits": _limits(),
        "notes": [*gpus["notes"], *_order(gpus["gpus"], asked)],
    }


def runnable(machine: str, features: Collection[str]) -> list[str]:
    """The instruction sets of `ISA` that a CPU with these features runs, the poorest first."""
    return [name for name, needs in ISA.get(machine, {}).items() if set(needs) <= set(features)]


def _order(gpus: Sequence[dict[str, Any]], asked: str | None) -> list[str]:
    """CUDA's default is to count the fastest GPU first, which cannot be told from here."""
    numbered = any(word.strip().isdecimal() for word in (asked or "").split(","))
    if not numbered or len({gpu["name"] for gpu in gpus}) < 2 or os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
        return []
    return ["CUDA counts different GPUs by speed, so the numbers in CUDA_VISIBLE_DEVICES may mean others than shown "
            "here: set CUDA_DEVICE_ORDER=PCI_BUS_ID, or use UUIDs"]  # fmt: skip


def _cpu(root: str, machine: str) -> dict[str, Any]:
    facts: dict[str, str] = {}
    for line in devices.read(root, "proc/cpuinfo").splitlines():  # the first processor's: later ones change nothing
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    features = (facts.get("flags") or facts.get("Features") or "").split()
    return {"model": _cpu_model(facts), "cores": len(os.sched_getaffinity(0)), "features": features,
            "isa": runnable(machine, features)}  # fmt: skip


def _cpu_model(facts: dict[str, str]) -> str | None:
    part = facts.get("CPU implementer", ""), facts.get("CPU part", "")
    return facts.get("model name") or _ARM.get(part) or (" ".join(part) if all(part) else None)


def _libstdcxx() -> str | None:
    """Of the host's copy; loading it does no harm, and in a bundle it is loaded anyhow."""
    import ctypes

    try:
        ctypes.CDLL("libstdc++.so.6")
    except OSError:
        return None
    return floors.read_host({"libstdc++ GLIBCXX": ("", "")})["libstdc++ GLIBCXX"] or None


def _l4t(root: str) -> str | None:
    """Of `# R36 (release), REVISION: 4.0, GCID: ...`."""
    found = re.match(r"# R(\d+) \(release\), REVISION: ([\d.]+)", devices.read(root, "etc/nv_tegra_release"))
    return f"{found[1]}.{found[2]}" if found else None


def _shm(root: str) -> dict[str, int] | None:
    try:
        found = os.statvfs(os.path.join(root, "dev/shm"))
    except OSError:
        return None
    return {"size_bytes": found.f_blocks * found.f_frsize, "free_bytes": found.f_bavail * found.f_frsize}


def _numa_nodes(root: str) -> int | None:
    try:
        names = os.listdir(os.path.join(root, "sys/devices/system/node"))
    except OSError:
        return None
    return sum(1 for name in names if re.fullmatch(r"node\d+", name))


def _transparent(root: str) -> str | None:
    """The word in brackets of `always [madvise] never`."""
    found = re.search(r"\[(\w+)\]", devices.read(root, "sys/kernel/mm/transparent_hugepage/enabled"))
    return found[1] if found else None


def _limits() -> dict[str, int | None]:
    """This process's, below which its children stay."""
    kinds = {"memlock_bytes": resource.RLIMIT_MEMLOCK, "stack_bytes": resource.RLIMIT_STACK,
             "nofile": resource.RLIMIT_NOFILE}  # fmt: skip
    found = {name: resource.getrlimit(kind)[0] for name, kind in kinds.items()}
    return {name: None if value == resource.RLIM_INFINITY else value for name, value in found.items()}


def lines(host: dict[str, Any]) -> Iterator[str]:
    """What `detect` found, for a person."""
    for name, value in (*_gpu_rows(host), *host_rows(host)):
        yield f"{name:<14}{value}"
    for note in host["notes"]:
        yield f"note: {note}"


def host_rows(host: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, value) of all but the GPUs, in the order of interest."""
    cpu, driver, memory, shm = host["cpu"], host["driver"], host["memory"], host["shm"]
    pages, limits = host["hugepages"], host["limits"]
    yield "driver", f"{driver['version']}, CUDA {driver['cuda'] or 'not found'}" if driver else "none found"
    yield "CPU", f"{cpu['model'] or host['machine']}, {cpu['cores']} cores for this process"
    yield "ISA", ", ".join(cpu["isa"]) or f"none of {', '.join(ISA.get(host['machine'], {})) or 'ours'}"
    yield "system", f"Linux {host['kernel']}, {host['machine']}{', L4T ' + host['l4t'] if host['l4t'] else ''}"
    yield "libraries", f"glibc {host['glibc'] or 'not found'}, GLIBCXX {host['libstdcxx'] or 'not found'}"
    yield "memory", f"{size(memory['total_bytes'])}, {size(memory['available_bytes'])} available"
    yield "/dev/shm", f"{size(shm['size_bytes'])}, {size(shm['free_bytes'])} free" if shm else "none"
    yield "NUMA nodes", str(host["numa_nodes"] or "not found")
    yield "huge pages", f"transparent: {pages['transparent'] or 'not found'}, {pages['free'] or 0} free"
    yield "limits", (f"memlock {size(limits['memlock_bytes'], 'unlimited')}, "
                     f"stack {size(limits['stack_bytes'], 'unlimited')}, "
                     f"{limits['nofile'] or 'unlimited'} files")  # fmt: skip


def _gpu_rows(host: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if not host["gpus"]:
        yield "GPU", "none found"
    for gpu in host["gpus"]:
        words = [gpu["name"] or "unknown", f"SM {gpu['sm'] or 'not found'}",
                 f"{size(gpu['memory_bytes'])}, {size(gpu['free_bytes'])} free"]  # fmt: skip
        words += [f"{gpu['temperature_c']} °C"] if gpu["temperature_c"] is not None else []
        words += [f"{gpu['utilization']} % busy"] if gpu["utilization"] is not None else []
        words += [f"{len(gpu['mig'])} MIG instances"] if gpu["mig"] is not None else []
        words += [] if gpu["index"] in host["visible"] else ["hidden by CUDA_VISIBLE_DEVICES"]
        yield f"GPU {gpu['index']}", ", ".join(words)


def size(count: int | None, none: str = "size not found") -> str:
    """Bytes in GiB or MiB."""
    if count is None:
        return none
    return f"{count / (1 << 30):.1f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.1f} MiB"


def main(arguments: Sequence[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser(
        prog="compose-detect", description="Show what this host is: GPUs, driver, CPU, C library, memory and limits.",
        epilog="Exit status: 0; 2 for wrong arguments.",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON, for `compose select --host`")
    asked = parser.parse_args(arguments)
    host = detect()
    sys.stdout.write(json.dumps(host, indent=2) + "\n" if asked.json else "".join(f"{line}\n" for line in lines(host)))
    return 0
