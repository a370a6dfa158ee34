"""Compiled kernels of SGLang for some GPU architectures. Its `load_jit` looks here before it compiles anything.

A module is found by a key of everything that it is made from: names, template arguments, sources, flags, architecture.
No folder of a machine is part of it, nor whether a compiler or a GPU is there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sglang_jit_cache._build import ARCHES, CUDA, __version__
from sglang_jit_cache.keys import key

__all__ = ["ARCHES", "CUDA", "__version__", "find", "folder"]


def find(spec: Any, arch: str, site: Path) -> Path | None:  # noqa: ANN401
    """The compiled module that fits exactly, if there is one; the parameters are those of `keys.key`."""
    path = folder() / f"{spec.module_name}.{key(spec, arch, site)}.so"
    return path if path.is_file() else None


def folder() -> Path:
    """Where the modules are."""
    return Path(__file__).parent / "modules"
