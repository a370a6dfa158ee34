"""The few names of torch that FlashInfer's generators use, so that torch itself need not be installed to compile.

They take types apart by name and size, ask for GPUs where no architecture is set, and copy torch's C++ ABI, which has
been the new one since 2.6. Nothing that they make is linked with torch. What is not here raises AttributeError.
"""

from __future__ import annotations

import sys
from types import ModuleType

_BYTES = {
    "bool": 1, "int8": 1, "uint8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1, "int16": 2, "float16": 2, "bfloat16": 2,
    "int32": 4, "uint32": 4, "float32": 4, "int64": 8, "uint64": 8, "float64": 8,
}  # fmt: skip


# Named as torch's: annotations of the generators ask for it.
class dtype:  # noqa: N801
    """A type of elements: equal to itself only. itemsize: bytes."""

    def __init__(self, name: str, itemsize: int) -> None:
        self.name, self.itemsize = name, itemsize

    def __repr__(self) -> str:
        return f"torch.{self.name}"


def install() -> None:
    """Let `import torch` find these names; nothing, where it finds torch already."""
    if "torch" in sys.modules:
        return
    torch = ModuleType("torch")
    torch.__dict__.update({name: dtype(name, size) for name, size in _BYTES.items()})
    torch.__dict__.update(
        dtype=dtype, Tensor=type("Tensor", (), {}), device=type("device", (), {}), _C=ModuleType("torch._C"),
        cuda=ModuleType("torch.cuda"), version=ModuleType("torch.version"),
    )  # fmt: skip
    torch.__dict__["_C"]._GLIBCXX_USE_CXX11_ABI = True
    torch.__dict__["cuda"].device_count = lambda: 0
    torch.__dict__["version"].cuda = None
    sys.modules["torch"] = torch
