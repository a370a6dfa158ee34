"""What is known of a bundle, a launch and a host, in the fields that rules ask about.

A field that is not given is one that nobody could tell (composer.model.rule says what follows); None is known to be
unset.
"""

from __future__ import annotations

import errno
import json
import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from composer.model.manifest import Manifest
from composer.model.rule import Tables, Value
from composer.model.target import Targets
from composer.runtime.host.devices import visible
from composer.runtime.serve.quantization import method

Values = dict[str, Value | None]

_GIB: Final = 1 << 30
_CUDA_MAJOR: Final = re.compile(r"nvidia-.*-cu(\d+)")
#: Distributions whose versions rules know, by their fields below `stack`.
_STACK: Final = {
    "sglang": ("sglang",), "torch": ("torch",), "transformers": ("transformers",), "bitsandbytes": ("bitsandbytes",),
    "flashinfer_python": ("flashinfer-python",), "flashinfer_cubin": ("flashinfer-cubin",),
    "sgl_kernel": ("sgl-kernel", "sglang-kernel"),
}  # fmt: skip
#: What only a folder with the model's files tells for certain.
OF_FILES: Final = ("model.local", "model.multimodal", "model.tokenizer_class", "model.quant", "model.quant_method")


def manifest_values(manifest: Manifest, targets: Targets, sm: int) -> Values:
    """What a bundle's manifest tells: its target, its stack, its floors. What a stack lacks is known to be unset.

    sm: which of the bundle's architectures is looked at.
    """
    target, versions = manifest.target, {one.name: one.version for one in manifest.layers}
    isa = targets.isa.get(target["isa"])
    majors = sorted({int(found[1]) for name in versions if (found := _CUDA_MAJOR.fullmatch(name))})
    cudnn = next((name for name in versions if name.startswith("nvidia-cudnn-cu")), None)
    floor = manifest.floors.get("glibc")
    values: Values = {
        "target.sm": sm, "target.arch": str(sm), "target.isa": target["isa"],
        "target.cuda": target["cuda"], "target.cuda_major": int(target["cuda"].partition(".")[0]),
        "target.platform": target["machine"], "target.l4t": None, "target.gpu": None,
        "manifest.fingerprint": manifest.fingerprint,
        "stack.engine": "sglang" if "sglang" in versions else "vllm" if "vllm" in versions else None,
        "stack.cudnn": versions.get(cudnn or ""), "stack.cudnn_dist": cudnn, "stack.cuda_majors": majors or None,
        "stack.sglang_fork": "upstream" if "sglang" in versions else None,
    }  # fmt: skip
    for name, distributions in _STACK.items():
        values[f"stack.{name}"] = next((versions[one] for one in distributions if one in versions), None)
    if isa:
        values["target.isa_features"] = list(isa.features)
    if floor:
        values["artefact.glibc_max"] = floor.version
    return values


def launch_values(argv: Sequence[str], environment: Mapping[str, str], flags: Mapping[str, Value],
                  tables: Tables) -> Values:  # fmt: skip
    """What a command tells: its words, flags, variables, and its model by name or by the files of its folder."""
    values: Values = {"argv": list(argv)}
    values |= {f"flags.{name}": value for name, value in flags.items()}
    for name, others in tables.spellings.items():
        given = [flags[one] for one in (name, *others) if one in flags]
        if given:
            values[f"flags.{name}"] = given[0]
    values |= {f"env.{name}": value for name, value in environment.items()}
    model = flags.get("--model-path", flags.get("--model"))
    if isinstance(model, str):
        values |= tables.model_facts(model)
        if model.startswith(("/", ".", "~")) or Path(model).is_dir():
            values |= model_folder_values(Path(model).expanduser())
    return values


def model_folder_values(folder: Path) -> Values:
    """What the files of a model tell; `model.local` is whether its config.json is there."""
    config = _json_file(folder / "config.json")
    if config is None:
        return {"model.local": False}
    quantised = config.get("quantization_config")
    words = json.dumps(quantised).lower() if quantised else ""
    tokenizer = (_json_file(folder / "tokenizer_config.json") or {}).get("tokenizer_class")
    found = {"nvfp4": "nvfp4" in words, "fp8-torchao": "torchao" in words and ("fp8" in words or "float8" in words)}
    return {
        "model.local": True, "model.multimodal": "vision_config" in config,
        "model.quant": next((name for name, is_it in found.items() if is_it), None),
        "model.quant_method": method(config) or None,
        "model.tokenizer_class": tokenizer if isinstance(tokenizer, str) else None,
    }  # fmt: skip


def _json_file(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def host_values(host: Mapping[str, Any], sm: Value | None, environment: Mapping[str, str]) -> Values:
    """What a host's description tells, in the words of rules.

    Of several kinds of GPUs those count that the bundle is for, or all; what they do not agree on is unknown.
    """
    gpus = _visible(host, environment)
    gpus = [gpu for gpu in gpus if gpu.get("sm") == sm] or gpus
    driver, cpu, shm = (host.get(name) or {} for name in ("driver", "cpu", "shm"))
    memory, limits = (host.get(name) or {} for name in ("memory", "limits"))
    found: dict[str, Any] = {
        "host.sm": _common(gpu.get("sm") for gpu in gpus),
        "host.gpu": _common((gpu.get("name") or "").removeprefix("NVIDIA ") or None for gpu in gpus),
        "host.gpu_mem_gb": _gib(_common(gpu.get("memory_bytes") for gpu in gpus)),
        "host.driver": driver.get("version"), "host.driver_cuda": driver.get("cuda"),
        "host.glibc": host.get("glibc"), "host.cpu_flags": cpu.get("features"),
        "host.ram_gb": _gib(memory.get("total_bytes")), "host.shm_gb": _gib(shm.get("size_bytes")),
        "topo.numa_nodes_used": 1 if host.get("numa_nodes") == 1 else None,
        "topo.gpus": len(gpus),
    }  # fmt: skip
    values: Values = {name: value for name, value in found.items() if value is not None}
    for name, key in (("host.ulimit_memlock", "memlock_bytes"), ("host.ulimit_stack", "stack_bytes")):
        if key in limits:
            values[name] = _limit(limits[key], unlimited="unlimited" if key == "memlock_bytes" else 1 << 63)
    return values | {"host.l4t": host.get("l4t"), "host.tegra": host.get("l4t") is not None}


def _visible(host: Mapping[str, Any], environment: Mapping[str, str]) -> list[Mapping[str, Any]]:
    """The GPUs that a program sees: by CUDA_VISIBLE_DEVICES of the command, or else of the host's own description."""
    gpus: list[Mapping[str, Any]] = [gpu for gpu in host["gpus"] if isinstance(gpu, Mapping)]
    asked = environment.get("CUDA_VISIBLE_DEVICES")
    if asked is not None:
        indices = visible([dict(gpu) for gpu in gpus], asked)
    else:
        indices = host.get("visible") or [] if "visible" in host else [gpu["index"] for gpu in gpus]
    return [gpu for gpu in gpus if gpu.get("index") in indices]


def _common(values: Iterable[Any]) -> Any:  # noqa: ANN401
    """The one value of all, or None."""
    found = set(values)
    return found.pop() if len(found) == 1 else None


def _gib(size: Any) -> float | None:  # noqa: ANN401
    return round(size / _GIB, 3) if isinstance(size, int) else None


def _limit(value: Any, *, unlimited: str | int) -> str | int:  # noqa: ANN401
    return value if isinstance(value, int) else unlimited


def here_values(values: Mapping[str, Value | None]) -> Values:
    """What this host tells beyond its description, as far as the values so far ask for it."""
    found: dict[str, Any] = {
        "sysctl.vm.swappiness": _number("/proc/sys/vm/swappiness"),
        "sysctl.kernel.numa_balancing": _number("/proc/sys/kernel/numa_balancing"),
        "sysctl.kernel.sched_migration_cost_ns": _number("/sys/kernel/debug/sched/migration_cost_ns"),
        "host.governor": _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "host.cmdline": (_text("/proc/cmdline") or "").split() or None,
        "host.uvm_disable_hmm": {"Y": 1, "N": 0}.get(
            _text("/sys/module/nvidia_uvm/parameters/uvm_disable_hmm") or ""),
        "host.cuda_compat_dir": any(Path("/usr/local").glob("cuda*/compat")),
        "host.port_free": _is_free(values),
    }  # fmt: skip
    graph = values.get("env.NCCL_GRAPH_FILE")
    if isinstance(graph, str):
        found["file.NCCL_GRAPH_FILE"] = Path(graph).is_file()
    return {name: value for name, value in found.items() if value is not None}


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _number(path: str) -> int | None:
    text = _text(path)
    return int(text) if text and text.isdecimal() else None


def _is_free(values: Mapping[str, Value | None]) -> bool | None:
    """Whether the port of a command can be bound; None where it names none, or that cannot be tried."""
    try:
        port = int(str(values.get("flags.--port", "")))
    except ValueError:
        return None
    address = str(values.get("flags.--host") or "127.0.0.1")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OverflowError:
            return None
        except OSError as fault:
            return False if fault.errno == errno.EADDRINUSE else None
    return True
