"""Compiled kernels of FlashInfer for one GPU architecture. FlashInfer looks here before it compiles anything.

It calls `get_jit_cache_dir`, opens `MODULE/MODULE.so` below it, and takes it only if `__version__` begins with its own.
"""

from pathlib import Path

from flashinfer_jit_cache._build import ARCH, CUDA, MODULES, __version__

__all__ = ["ARCH", "CUDA", "MODULES", "__version__", "get_jit_cache_dir"]


def get_jit_cache_dir() -> str:
    """The folder with one folder per module."""
    return str(Path(__file__).parent / "jit_cache")
