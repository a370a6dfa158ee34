"""The NVIDIA GPUs of this host, from the first that knows: NVML, nvidia-smi, Jetson's device tree, the kernel module.

`root` is the folder in which /proc, /sys and /etc are looked for, as in `detect`.
"""

# Names are joined below `root`; pathlib would add nothing.
# ruff: noqa: PTH118, PTH123, PTH208

import csv
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

from .. import floors
from . import nvml

# The integrated GPU by the chip's name in the device tree. NVML is missing on Jetson up to JetPack 5.
_TEGRA = {"tegra210": 53, "tegra186": 62, "tegra194": 72, "tegra234": 87, "tegra264": 110}
_SMI_FIELDS = {
    "index": "index", "uuid": "uuid", "name": "name", "memory_bytes": "memory.total", "free_bytes": "memory.free",
    "temperature_c": "temperature.gpu", "utilization": "utilization.gpu", "pci": "pci.bus_id",
    "driver": "driver_version", "sm": "compute_cap",
}  # fmt: skip
# Without the persistence daemon the driver is started for each query, which takes seconds per GPU.
_SMI_TIMEOUT = 60
_WSL = "/usr/lib/wsl/lib"


def find(root: str = "/") -> dict[str, Any]:
    """`driver`, `gpus`, `notes` and `found_by` as `detect` shows them.

    NVML and nvidia-smi speak for this machine; with another `root` only its files are read.
    """
    notes: list[str] = []
    here = (("nvml", _nvml), ("nvidia-smi", _smi)) if root == "/" else ()
    found: dict[str, Any] = {"driver": _module(root), "gpus": [], "found_by": None}
    for name, ask in (*here, ("device-tree", _jetson), ("proc", _proc)):
        answer = ask(root, notes)
        if answer and answer["gpus"]:
            found = {**answer, "found_by": name}
            break
    if root == "/" and found["driver"] and not found["driver"]["cuda"]:
        found["driver"]["cuda"] = _libcuda()
    return {**found, "notes": notes}


def visible(gpus: Sequence[dict[str, Any]], asked: str | None) -> list[int]:
    """The indices that a CUDA program sees, in its order, by CUDA_VISIBLE_DEVICES (None: unset, all).

    As CUDA reads it: numbers and starts of UUIDs between commas; the first that names no GPU ends the list, and one
    that is named twice empties it. Numbers are taken to count in the order of the PCI bus.
    """
    if asked is None:
        return [gpu["index"] for gpu in gpus]
    found: list[int] = []
    for word in asked.split(","):
        index = _named(gpus, word.strip())
        if index is None:
            break
        if index in found and not word.strip().startswith("MIG-"):
            return []
        found.append(index)
    return list(dict.fromkeys(found))


def _named(gpus: Sequence[dict[str, Any]], word: str) -> int | None:
    if word.isdecimal():
        return gpus[int(word)]["index"] if int(word) < len(gpus) else None
    if not word.startswith(("GPU-", "MIG-")):
        return None
    # Drivers before 470 call an instance `MIG-GPU-<UUID of its GPU>/1/0`.
    whole = word.removeprefix("MIG-").partition("/")[0] if word.startswith("MIG-GPU-") else word
    for gpu in gpus:
        names = [gpu["uuid"], *(part["uuid"] for part in gpu.get("mig") or ())]
        if any((name or "").lower().startswith(whole.lower()) for name in names):
            index: int = gpu["index"]
            return index
    return None


def _nvml(root: str, notes: list[str]) -> dict[str, Any] | None:
    try:
        found = nvml.survey()
    except nvml.NvmlError as fault:
        if _module(root) or not fault.expected:
            notes.append(str(fault))
        return None
    notes.extend(found["notes"])
    for gpu in found["gpus"]:
        if gpu["memory_bytes"] is None and gpu["mig"] is None:
            gpu.update(_shared_memory(root))
    return found


def _smi(_root: str, notes: list[str]) -> dict[str, Any] | None:
    program = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path=_WSL)
    if program is None:
        return None
    for fields in (list(_SMI_FIELDS), list(_SMI_FIELDS)[:-1]):  # old ones do not know compute_cap
        asked = ",".join(_SMI_FIELDS[name] for name in fields)
        words = [program, f"--query-gpu={asked}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(words, capture_output=True, timeout=_SMI_TIMEOUT, check=False)
        except (OSError, subprocess.TimeoutExpired) as fault:
            notes.append(f"nvidia-smi: {fault}")
            return None
        text = done.stdout.replace(b"\0", b"").decode("utf-8", "replace")
        if not done.returncode:
            return _smi_rows(fields, text)
    notes.append(f"nvidia-smi: {text.strip().partition(chr(10))[0] or f'exit status {done.returncode}'}")
    return None


def _smi_rows(fields: list[str], text: str) -> dict[str, Any] | None:
    rows = [dict(zip(fields, row, strict=True)) for row in csv.reader(text.splitlines(), skipinitialspace=True)
            if len(row) == len(fields) and row[0].isdecimal()]  # fmt: skip
    if not rows:
        return None
    gpus = []
    for row in rows:
        gpus.append({
            "index": int(row["index"]), "uuid": _text(row["uuid"]), "name": _text(row["name"]),
            "sm": _capability(row.get("sm", "")),
            "memory_bytes": _number(row["memory_bytes"], 20), "free_bytes": _number(row["free_bytes"], 20),
            "temperature_c": _number(row["temperature_c"]), "utilization": _number(row["utilization"]),
            "pci": nvml.pci_name(row["pci"]), "mig": None,
        })  # fmt: skip
    return {"driver": {"version": rows[0]["driver"], "cuda": None}, "gpus": gpus}


def _text(text: str) -> str | None:
    return None if text.startswith("[") else text


def _number(text: str, unit: int = 0) -> int | None:
    """A number of 2**unit; None for `[N/A]`, `[Not Supported]` and the like."""
    return int(text) << unit if text.isdecimal() else None


def _capability(text: str) -> int | None:
    found = re.fullmatch(r"(\d+)\.(\d)", text)
    return int(found[1] + found[2]) if found else None


def _jetson(root: str, _notes: list[str]) -> dict[str, Any] | None:
    names = read(root, "proc/device-tree/compatible").split("\0")
    chip = next((chip for chip in (name.partition(",")[2] for name in names) if chip in _TEGRA), None)
    if chip is None:
        return None
    gpu = {"index": 0, "uuid": None, "name": f"NVIDIA {chip.capitalize()}", "sm": _TEGRA[chip], "temperature_c": None,
           "utilization": None, "pci": None, "mig": None, **_shared_memory(root)}  # fmt: skip
    return {"driver": _module(root), "gpus": [gpu]}


def _proc(root: str, _notes: list[str]) -> dict[str, Any] | None:
    """What the kernel module says: neither SM nor memory."""
    folder = os.path.join(root, "proc/driver/nvidia/gpus")
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return None
    gpus = []
    for index, name in enumerate(names):
        pairs = (line.partition(":") for line in read(folder, name, "information").splitlines())
        facts = {key.strip(): value.strip() for key, _, value in pairs}
        gpus.append({
            "index": index, "uuid": facts.get("GPU UUID"), "name": facts.get("Model"), "sm": None, "memory_bytes": None,
            "free_bytes": None, "temperature_c": None, "utilization": None, "pci": nvml.pci_name(name), "mig": None,
        })  # fmt: skip
    return {"driver": _module(root), "gpus": gpus}


def _module(root: str) -> dict[str, Any] | None:
    """Of the line `NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Mon ...`."""
    found = re.search(r" (\d{3,4}\.\d[\d.]*)( |\n)", read(root, "proc/driver/nvidia/version"))
    return {"version": found[1], "cuda": None} if found else None


def _libcuda() -> str | None:
    """The CUDA that programs get. `read_host` asks for it where the driver is older than the one asked for."""
    return floors.read_host({"driver": ("99999", ""), "CUDA": ("", "")}).get("CUDA") or None


def _shared_memory(root: str) -> dict[str, Any]:
    """Of a GPU that has no memory of its own: the host's."""
    memory = read_memory(root)
    return {"memory_bytes": memory.get("MemTotal"), "free_bytes": memory.get("MemAvailable")}


def read_memory(root: str = "/") -> dict[str, int]:
    """/proc/meminfo: bytes, and counts of pages, by name."""
    found = re.findall(r"^(\w+):\s+(\d+)( kB)?$", read(root, "proc/meminfo"), re.MULTILINE)
    return {name: int(value) << (10 if unit else 0) for name, value, unit in found}


def read(root: str, *parts: str) -> str:
    """The start of a text file, up to 64 KiB; nothing where there is none."""
    try:
        with open(os.path.join(root, *parts), "rb") as stream:
            return stream.read(1 << 16).decode("utf-8", "replace")
    except OSError:
        return ""
