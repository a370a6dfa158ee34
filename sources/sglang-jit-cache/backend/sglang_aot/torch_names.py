"""The few names of torch and of SGLang's own modules that describing a kernel uses, so that neither need be installed
or imported whole. What is not here raises AttributeError.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

_TYPES = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "bfloat16", "float32",
    "float64", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
)  # fmt: skip


# Named as torch's: SGLang asks for it.
class dtype:  # noqa: N801
    """A type of elements: equal to itself only."""

    def __init__(self, name: str) -> None:
        self.name = name


def install(cuda: str) -> None:
    """Let these names be found in the places of torch and of parts of SGLang. cuda: torch's, `13.0`."""
    types = {name: dtype(name) for name in _TYPES}
    tensor, device = type("Tensor", (), {}), type("device", (), {})
    nn = _module("torch.nn", {"Module": object, "Parameter": tensor})
    compiler = _module("torch.compiler", {"disable": _same, "assume_constant_result": _same})
    gpu = _module("torch.cuda", {"is_available": lambda: False})
    version = _module("torch.version", {"cuda": cuda, "hip": None})
    library = _module("torch.library", {})
    names = {"dtype": dtype, "Tensor": tensor, "device": device, "nn": nn, "compiler": compiler, "cuda": gpu,
             "version": version, "library": library}  # fmt: skip
    _module("torch", {**types, **names})
    release = tuple(map(int, cuda.split(".")))
    _module("sglang.srt.utils.common", {"is_cuda": lambda: True, "get_cuda_version": lambda: release})
    _module("sglang.srt.utils.custom_op", {"register_custom_op": _decorator})
    _module("sglang.kernels.kernel_api_logging", {"debug_kernel_api": _decorator})
    _module("sglang.kernels.fused_op", {"BaseFusedOp": object, "register_fused_op": lambda op, *_: op})


def _module(name: str, names: Mapping[str, Any]) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(names)
    sys.modules[name] = module
    return module


def _same(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _decorator(function: Callable[..., Any] | None = None, **_: object) -> Callable[..., Any]:
    """A decorator, with and without parameters, that leaves a function as it is."""
    return _same if function is None else function
