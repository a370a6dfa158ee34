"""FlashInfer's own descriptions of its modules, made without a GPU and without torch, and compiled with ninja."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, distribution
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

from flashinfer_aot import torch_names
from flashinfer_aot.selection import Selection, SelectionError

DISTRIBUTION = "flashinfer-python"
# What FlashInfer links a module with is found beside it, where NVIDIA's wheels put it, by the major version of CUDA.
_RUNTIME = {12: "nvidia/cuda_runtime/lib", 13: "nvidia/cu13/lib"}
# Of site-packages/flashinfer_jit_cache/jit_cache/MODULE/.
_UP = "$ORIGIN/../../.."


class Generator:
    """FlashInfer as installed, imported as far as its generators need. arch: `9.0a`. folder: keeps everything made.

    It is set up by variables of the process, so there is one in a process. SelectionError for a folder with a space.
    """

    def __init__(self, arch: str, folder: Path) -> None:
        self.installed = distribution(DISTRIBUTION)
        self.folder = folder.resolve()
        site = Path(str(self.installed.locate_file("")))
        for path in (self.folder, site):
            if " " in str(path):
                raise SelectionError(f"{path}: FlashInfer's rules for ninja take no path with a space")
        os.environ["FLASHINFER_CUDA_ARCH_LIST"] = arch
        os.environ["FLASHINFER_WORKSPACE_BASE"] = str(self.folder)
        os.environ.pop("FLASHINFER_DISABLE_JIT", None)
        _without_paths([self.folder, site])
        self._aot = _import_aot(self.installed)

    @property
    def cuda(self) -> str:
        """The release of the nvcc that is used, `12.8`."""
        return str(self._aot.get_cuda_version())

    def specs(self, selection: Selection) -> list[Any]:
        """The selected modules, as FlashInfer's `JitSpec`. Writes the sources of those that have generated ones.

        SelectionError if there are none.
        """
        made = self._aot.gen_all_modules(
            self._types(selection.f16), self._types(selection.f8), list(selection.fa2_head_dims),
            list(selection.fa3_head_dims), list(selection.sliding_window), list(selection.logits_soft_cap),
            self._aot.detect_sm_capabilities(), **selection.switches(),
        )  # fmt: skip
        found = [one for one in made if selection.has(one.name)]
        if not found:
            raise SelectionError(f"none of the {len(made)} modules is selected")
        return found

    def compile(self, specs: Sequence[Any], jobs: int | None) -> None:
        """Compile and link, as many files at a time as `jobs` says. What an earlier run in the folder made is kept.

        subprocess.CalledProcessError when a compiler fails.
        """
        cache = self._aot.jit_env.FLASHINFER_JIT_DIR
        cache.mkdir(parents=True, exist_ok=True)
        for spec in specs:
            spec.extra_ldflags = [*(spec.extra_ldflags or []), *_link_flags(self.cuda)]
            spec.write_ninja()
        plan = cache / "all.ninja"
        plan.write_text("".join(f"subninja {spec.ninja_path}\n" for spec in specs), "utf-8")
        argv = ["ninja", "-C", str(cache), "-f", str(plan)]
        subprocess.run([*argv, *(["-j", str(jobs)] if jobs else [])], check=True)  # noqa: S603

    def _types(self, names: Sequence[str]) -> list[Any]:
        return [getattr(self._aot.torch, name) for name in names]


def _import_aot(installed: Distribution) -> Any:  # noqa: ANN401
    """`flashinfer.aot` without `flashinfer/__init__.py`, which imports every kernel's Python side and so torch."""
    # It looks for torch itself, and must not find the names below.
    importlib.import_module("tvm_ffi")
    torch_names.install()
    package = module_from_spec(ModuleSpec("flashinfer", None, is_package=True))
    package.__path__ = [str(installed.locate_file("flashinfer"))]
    sys.modules["flashinfer"] = package
    return importlib.import_module("flashinfer.aot")


def _without_paths(folders: Sequence[Path]) -> None:
    """Keep the folders of this machine out of the objects: error messages name source files."""
    flags = [f"-ffile-prefix-map={folder}=." for folder in folders]
    for variable, prefix in (("FLASHINFER_EXTRA_CFLAGS", ""), ("FLASHINFER_EXTRA_CUDAFLAGS", "-Xcompiler=")):
        os.environ[variable] = " ".join(f"{prefix}{flag}" for flag in flags)


def _link_flags(cuda: str) -> list[str]:
    """No local symbols, which hold numbers of nvcc's processes; and where the CUDA runtime lies at run time.

    `$$` is ninja's `$`, the backslash is for the shell.
    """
    folder = _RUNTIME.get(int(cuda.partition(".")[0]))
    return ["-s", *([f"-Wl,-rpath,{_UP.replace('$', chr(92) + '$$')}/{folder}"] if folder else [])]
