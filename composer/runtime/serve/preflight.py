"""What can be known before a server is started: whether its port is free, and whether there are GPUs for it."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from ..finding import Finding, error, finding, warning
from ..host import ports
from .options import DEFAULT_MODEL, Flag
from .report import HOST, PORT_OF_OTHER, PORT_OWN, PORT_UNKNOWN, Refusal

# The default model's weights are FP8, which GPUs have from SM 89 on.
_FP8 = 89
_COMMAND = 160


def port_state(port: int, host: str) -> dict[str, Any]:
    """`port`, `host`, whether it is `free`, else the `reason` and, of a busy one, its `owner`; ready for JSON."""
    fault = ports.bind_fault(port, host)
    state: dict[str, Any] = {"port": port, "host": host, "free": fault is None, "reason": None, "owner": None}
    if fault:
        state["reason"] = "busy" if fault.errno == errno.EADDRINUSE else fault.strerror or str(fault)
    if state["reason"] == "busy":
        owner = ports.owner(port, host)
        state["owner"] = asdict(owner) if owner else None
    return state


def port_refusal(state: Mapping[str, Any]) -> Refusal:
    """Why a server cannot have its port, by a `port_state` that is not free: the status says who has it."""
    port, owner = state["port"], state["owner"]
    if state["reason"] != "busy":
        return Refusal(HOST, error("serve.address", f"{state['host']}:{port}", f"cannot be bound: {state['reason']}",
                                     "Set SGLANG_HOST to an address of this host."))  # fmt: skip
    text = f"Port {port} is already in use (set SGLANG_PORT to use a different port)"
    if not owner:
        return Refusal(PORT_UNKNOWN, error("serve.port", str(port), f"{text}; /proc does not tell by whom"))
    own = owner["uid"] == os.geteuid()
    if owner["pid"] is None:
        evidence = f"{text}; by a process of {owner['user']}, which is not ours to see"
        return Refusal(PORT_UNKNOWN if own else PORT_OF_OTHER, error("serve.port", str(port), evidence))
    command = owner["command"]
    command = command if len(command) <= _COMMAND else f"{command[:_COMMAND]}..."
    evidence = f"{text}; by process {owner['pid']} of {owner['user']}: {command}"
    return Refusal(PORT_OWN if own else PORT_OF_OTHER, error("serve.port", str(port), evidence))


def gpu_findings(flags: Mapping[str, Flag], model: str, visible: str | None, made_for: Collection[int] = (), *,
                 absent: str = "") -> list[Finding]:  # fmt: skip
    """No GPU, too few for the tensor parallelism, or not those for the default model or a profile.

    `visible` is CUDA_VISIBLE_DEVICES; `made_for` are the SMs of a profile that is not for all of the bundle's. The
    driver is asked only where the answer matters. `absent` is how severe it is that there is no GPU at all, which is
    always asked if that is an error, and not judged if it is nothing. A server for another kind of device
    (`--device cpu`) needs none.
    """
    size = int(flags["--tp-size"].value) if "--tp-size" in flags else 1
    matters = absent == "error" or size > 1 or model == DEFAULT_MODEL or bool(made_for)
    if not matters or ("--device" in flags and not flags["--device"].value.startswith("cuda")):
        return []
    from ..host import devices

    host = devices.find()
    found = host["gpus"]
    gpus = [gpu for gpu in found if gpu["index"] in devices.visible(found, visible)]
    if not gpus:
        return [finding(absent, "serve.gpu", *_no_gpu(host, visible))] if absent else []
    findings = []
    if size > len(gpus) and "--nnodes" not in flags:
        evidence = f"{size} GPUs are asked for by {flags['--tp-size'].source}, and {len(gpus)} can be seen"
        findings.append(warning("serve.gpus", "--tp-size", evidence, "Ask for fewer, or look at CUDA_VISIBLE_DEVICES."))
    old = [gpu for gpu in gpus if (gpu["sm"] or _FP8) < _FP8]
    if old and model == DEFAULT_MODEL:
        evidence = f"its weights are FP8 and need SM {_FP8} or newer; {old[0]['name']} has SM {old[0]['sm']}"
        findings.append(warning("serve.model-sm", model, evidence, "Set SGLANG_MODEL to another model."))
    other = [gpu for gpu in gpus if made_for and gpu["sm"] not in (None, *made_for)]
    if other:
        evidence = f"is for SM {', '.join(map(str, made_for))}; {other[0]['name']} has SM {other[0]['sm']}"
        findings.append(warning("serve.profile-sm", "--profile", evidence, "Choose another profile, or other GPUs."))
    return findings


def _no_gpu(host: Mapping[str, Any], visible: str | None) -> tuple[str, str, str]:
    """Subject, evidence and fix, of a host where a CUDA program sees no GPU."""
    if host["gpus"]:
        return ("CUDA_VISIBLE_DEVICES", f"{visible!r} hides every GPU of this host",
                "Unset it, or name GPUs that `nvidia-smi -L` shows.")  # fmt: skip
    driver = host["driver"]
    why = f"driver {driver['version']} shows none" if driver else "there is no NVIDIA driver"
    notes = "".join(f"; {one}" for one in host["notes"])
    return ("GPU", f"no GPU was found: {why}{notes}",
            "Use a host with an NVIDIA GPU and its driver; give a container its GPUs (--gpus all, nvidia.com/gpu). "
            "bin/compose-doctor says more.")  # fmt: skip
