"""Judge the NVIDIA driver and the GPUs of a host for a bundle. Facts in, findings out: nothing here reads anything.

`facts` is what `detect` says of the host, and what `facts.read` adds to it.
"""

from collections.abc import Iterator
from typing import Any

from .. import gpu
from ..finding import Finding, error, finding, note, warning
from ..host.detect import size

Facts = dict[str, Any]

_SUBJECT = "NVIDIA driver"
#: CUresult of cuda.h: what it is called, and what helps.
_CUDA_FAULTS = {
    34: ("CUDA_ERROR_STUB_LIBRARY", "Take the CUDA toolkit's `stubs` folder out of LD_LIBRARY_PATH and ld.so.conf."),
    46: ("CUDA_ERROR_DEVICE_UNAVAILABLE", "Wait for, or end, what holds the GPU in exclusive mode."),
    100: ("CUDA_ERROR_NO_DEVICE", "Check CUDA_VISIBLE_DEVICES, /dev/nvidia* and what nvidia-smi -L says."),
    101: ("CUDA_ERROR_INVALID_DEVICE", "Check CUDA_VISIBLE_DEVICES and MIG instances with nvidia-smi -L."),
    304: ("CUDA_ERROR_OPERATING_SYSTEM", "Give this user, or this container, read and write access to /dev/nvidia*."),
    802: ("CUDA_ERROR_SYSTEM_NOT_READY", "Start nvidia-fabricmanager, in the driver's version: NVSwitch needs it."),
    803: ("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "Restart the host: the driver was updated below a running one."),
    804: ("CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE",
          "Take NVIDIA's compatibility package (`compat`) off this host: it serves data-centre GPUs only."),
    999: ("CUDA_ERROR_UNKNOWN", "Load the module anew: modprobe -r nvidia_uvm && modprobe nvidia_uvm; or restart."),
}  # fmt: skip
#: Bits of nvmlClocksEventReasons that mean that the hardware protects itself (nvml.h).
_THERMAL, _POWER_BRAKE = 0x20 | 0x40, 0x80
_PROHIBITED, _EXCLUSIVE = 2, (1, 3)
#: Without a threshold of its own: data-centre cards begin to slow down between 85 and 95 degrees.
_HOT = 85
#: A context of CUDA alone takes about half of that.
_IN_USE = 1 << 30


def judge(facts: Facts) -> Iterator[Finding]:
    """The driver first; of the GPUs only what a working driver can tell."""
    if facts["hidden"]:
        yield error(
            "gpu.hidden",
            "CUDA_VISIBLE_DEVICES",
            f"is {facts['environ']['CUDA_VISIBLE_DEVICES']!r}, which hides every GPU",
            "Unset CUDA_VISIBLE_DEVICES.",
        )
        return
    broken = list(_driver(facts))
    yield from broken
    yield from _devices(facts)
    if not broken and not facts["gpus"]:
        fix = _container_fix(facts) or "See what nvidia-smi -L says, and look for `NVRM` in dmesg."
        yield error("gpu.none", _SUBJECT, _because(facts, "it runs, and shows no GPU"), fix)
    for one in (_lost, _sm, _visible, _health, _xids, _peers):
        yield from one(facts)


def _driver(facts: Facts) -> Iterator[Finding]:
    """The one fault that is the cause of the others."""
    module, cuda = facts["nvidia"]["module"], facts["nvidia"]["cuda"]
    path, version = cuda["path"], cuda["library_version"]
    if cuda["status"] == 0:
        return
    if cuda["tried"] and not cuda["loaded"]:
        yield _no_libcuda(facts)
    elif not module and cuda["tried"]:
        yield error(
            "driver.module",
            _SUBJECT,
            f"{path or 'libcuda.so.1'} is here, its kernel module is not",
            "Load it: modprobe nvidia. After a new kernel, install the driver's module for it (dkms).",
        )
    elif version and version != module and "/compat" not in (path or ""):
        yield error(
            "driver.mismatch",
            _SUBJECT,
            f"the kernel module is {module}, {path} is of {version}",
            "Restart the host, or load the module anew: modprobe -r nvidia_uvm nvidia && modprobe nvidia.",
        )
    else:
        yield _cuda_fault(facts)


def _no_libcuda(facts: Facts) -> Finding:
    module = facts["nvidia"]["module"]
    why = facts["nvidia"]["cuda"]["error"] or "libcuda.so.1 does not load"
    if module:
        fix = _container_fix(facts) or "Install the driver's libraries, of the same version."
        return error("driver.libcuda", "libcuda.so.1", f"the kernel module {module} is loaded, but: {why}", fix)
    wanted = facts["bundle"]["floors"].get("driver", ("", ""))[0]
    return error(
        "driver.absent",
        _SUBJECT,
        "neither its kernel module nor libcuda.so.1 is on this host",
        f"Install NVIDIA's driver{f' {wanted} or newer' if wanted else ''}.",
    )


def _cuda_fault(facts: Facts) -> Finding:
    cuda = facts["nvidia"]["cuda"]
    if cuda["status"] is None:
        return error(
            "driver.crash",
            cuda["path"] or "libcuda.so.1",
            f"loading it, or cuInit, ends the process: {cuda['error']}",
            "Install the driver again; look for `NVRM` in dmesg.",
        )
    name, fix = _CUDA_FAULTS.get(cuda["status"], (f"CUresult {cuda['status']}", "Look for `NVRM` in dmesg."))
    return error("driver.cuda", _SUBJECT, _because(facts, f"cuInit returns {name} ({cuda['status']})"), fix)


def _because(facts: Facts, text: str) -> str:
    return "; ".join([text, *facts["notes"]])


def _container_fix(facts: Facts) -> str | None:
    """Of a container that was given no GPU, or not all of the driver."""
    if not facts["container"]:
        return None
    return (
        "Give this container the GPU: NVIDIA's container toolkit with --gpus all (or a nvidia.com/gpu limit), "
        "NVIDIA_VISIBLE_DEVICES=all and NVIDIA_DRIVER_CAPABILITIES=compute,utility."
    )


def _devices(facts: Facts) -> Iterator[Finding]:
    nvidia = facts["nvidia"]
    if nvidia["module"] and nvidia["missing_nodes"]:
        fix = _container_fix(facts) or "Make them: nvidia-modprobe -c 0 -u (as root, once after each start)."
        yield error("driver.devices", ", ".join(nvidia["missing_nodes"]), "not there; the module is loaded", fix)
    if nvidia["denied_nodes"]:
        yield error(
            "driver.permission",
            ", ".join(nvidia["denied_nodes"]),
            f"user {facts['uid']} may not read and write them",
            "Add the user to the group that owns them, or load nvidia with NVreg_DeviceFileMode=0666.",
        )


def _lost(facts: Facts) -> Iterator[Finding]:
    """What NVML, or the order of GPUs, had to be said of."""
    for text in facts["notes"] if facts["gpus"] else ():
        if "does not answer" in text:
            yield error("gpu.lost", "GPUs", text, "Look for `NVRM` in dmesg; reset the GPU, or restart the host.")
        else:
            yield note("gpu.order", "GPUs", text)


def _seen(facts: Facts) -> list[dict[str, Any]]:
    """The GPUs that a program sees."""
    return [one for one in facts["gpus"] if one["index"] in facts["visible"]]


def _name(one: dict[str, Any]) -> str:
    return f"GPU {one['index']} ({one['name']})"


def _sm(facts: Facts) -> Iterator[Finding]:
    built, ptx = facts["bundle"]["sm"], facts["bundle"]["ptx"]
    known = [one for one in _seen(facts) if one["sm"] is not None]
    wrong = [one for one in known if built and not any(gpu.runs(one["sm"], sm, ptx=ptx) for sm in built)]
    severity = "error" if len(wrong) == len(known) else "warning"
    target = ", ".join(f"SM {sm}" for sm in built)
    fitting = ",".join(str(one["index"]) for one in known if one not in wrong)
    for one in wrong:
        fix = f"Set CUDA_VISIBLE_DEVICES={fitting}." if fitting else f"Use a bundle built with --sm {one['sm']}."
        yield finding(severity, "gpu.sm", _name(one), f"is SM {one['sm']}; the bundle holds code for {target}", fix)
    if not wrong and len({one["name"] for one in known}) > 1:
        yield note(
            "gpu.mixed",
            "CUDA_VISIBLE_DEVICES",
            "the GPUs differ; tensor parallelism goes at the pace, and with the memory, of the least of them",
        )


def _visible(facts: Facts) -> Iterator[Finding]:
    asked = facts["environ"].get("CUDA_VISIBLE_DEVICES")
    if not asked or not facts["gpus"] or len(facts["visible"]) == len(asked.split(",")):
        return
    severity = "warning" if facts["visible"] else "error"
    yield finding(
        severity,
        "gpu.visible",
        "CUDA_VISIBLE_DEVICES",
        f"names {len(asked.split(','))} of {len(facts['gpus'])} GPUs ({asked}), and CUDA sees "
        f"{len(facts['visible'])}: it stops at the first that it does not know, and takes none twice",
        "Name GPUs by the numbers or UUIDs of nvidia-smi -L, each once.",
    )


def _health(facts: Facts) -> Iterator[Finding]:
    details = {one["index"]: one for one in facts["nvidia"]["health"]}
    for one in _seen(facts):
        more = details.get(one["index"], {})
        for check in (_memory, _heat, _mode, _instances, _errors, _persistence):
            yield from check(one, more, facts)


def _memory(one: dict[str, Any], more: dict[str, Any], facts: Facts) -> Iterator[Finding]:
    total, free = one["memory_bytes"], one["free_bytes"]
    if total is None or free is None or facts["l4t"] or total - free < max(_IN_USE, total // 20):
        return
    users = ", ".join(f"{name} (process {pid})" for pid, name in more.get("processes") or ())
    yield warning(
        "gpu.memory",
        _name(one),
        f"{size(total - free)} of {size(total)} are in use{f' by {users}' if users else ''}",
        "End what uses it, choose another GPU, or lower --mem-fraction-static.",
    )


def _heat(one: dict[str, Any], more: dict[str, Any], _facts: Facts) -> Iterator[Finding]:
    now, limit, reasons = one["temperature_c"], more.get("slowdown_c"), more.get("throttle") or 0
    if reasons & _THERMAL or (now is not None and now >= (limit - 3 if limit else _HOT)):
        yield warning(
            "gpu.hot",
            _name(one),
            f"{now} degrees Celsius; it slows down at {limit or 'about 90'}",
            "Look after its cooling, and what else it computes.",
        )
    if reasons & _POWER_BRAKE:
        yield warning(
            "gpu.power",
            _name(one),
            "the power supply holds its clocks down (power brake)",
            "Check the host's power supplies and its power cap.",
        )


def _mode(one: dict[str, Any], more: dict[str, Any], _facts: Facts) -> Iterator[Finding]:
    mode = more.get("compute_mode")
    if mode == _PROHIBITED:
        yield error(
            "gpu.compute-mode",
            _name(one),
            "its compute mode lets no program use it",
            f"nvidia-smi -i {one['index']} -c DEFAULT (as root).",
        )
    elif mode in _EXCLUSIVE:
        yield warning(
            "gpu.compute-mode",
            _name(one),
            "its compute mode lets one process at a time use it",
            f"nvidia-smi -i {one['index']} -c DEFAULT (as root), if more than one is to be served.",
        )


def _instances(one: dict[str, Any], _more: dict[str, Any], _facts: Facts) -> Iterator[Finding]:
    if one.get("mig") is None:
        return
    if not one["mig"]:
        yield error(
            "gpu.mig",
            _name(one),
            "is in MIG mode and has no instance, so no program can use it",
            f"Make one (nvidia-smi mig -cgi ... -C), or leave MIG: nvidia-smi -i {one['index']} -mig 0.",
        )
        return
    parts = ", ".join(f"{part['uuid']} ({size(part['memory_bytes'] or 0)})" for part in one["mig"])
    yield warning(
        "gpu.mig",
        _name(one),
        f"is divided (MIG); a program sees one instance: {parts}",
        "Choose one by its UUID in CUDA_VISIBLE_DEVICES; NCCL does not work between instances.",
    )


def _errors(one: dict[str, Any], more: dict[str, Any], _facts: Facts) -> Iterator[Finding]:
    if more.get("remap_failed"):
        yield error(
            "gpu.ecc", _name(one), "a defective row of its memory could not be replaced", "Have the GPU exchanged."
        )
    elif more.get("remap_pending"):
        yield warning(
            "gpu.ecc",
            _name(one),
            "a defective row of its memory waits to be replaced",
            f"Reset the GPU when it is idle: nvidia-smi -i {one['index']} -r, or restart the host.",
        )
    elif more.get("ecc_uncorrected"):
        yield warning(
            "gpu.ecc",
            _name(one),
            f"{more['ecc_uncorrected']} memory errors since the driver was loaded could not be corrected",
            f"Reset the GPU when it is idle: nvidia-smi -i {one['index']} -r; if they return, have it exchanged.",
        )


def _persistence(one: dict[str, Any], more: dict[str, Any], facts: Facts) -> Iterator[Finding]:
    if more.get("persistence") == 0 and not facts["container"]:
        yield note(
            "gpu.persistence",
            _name(one),
            "the driver lets go of an idle GPU: each start takes seconds",
            "Run nvidia-persistenced, or nvidia-smi -pm 1 (as root).",
        )


def _xids(facts: Facts) -> Iterator[Finding]:
    for where, code, count in facts["nvidia"]["xids"]:
        yield warning(
            "gpu.xid",
            where,
            f"the kernel log has Xid {code}, {count} times since the start",
            "Look it up in NVIDIA's Xid catalogue (docs.nvidia.com/deploy/xid-errors); 48, 64, 79, 94 and 95 "
            "are the hardware's.",
        )


def _peers(facts: Facts) -> Iterator[Finding]:
    if len(_seen(facts)) > 1 and facts["iommu"]:
        yield note(
            "gpu.iommu",
            "kernel",
            "an IOMMU translates: transfers between GPUs over PCIe may be slow, or hang, without NVLink",
            "If they do: start the kernel with iommu=pt, and switch off ACS in the firmware.",
        )
