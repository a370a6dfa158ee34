"""SGLang's own descriptions of its kernels, made without a GPU and without torch, and compiled as it compiles them."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.metadata import distribution
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

from sglang_aot import torch_names

DISTRIBUTION = "sglang"
_FILE = Path(__file__).parents[2] / "modules.toml"
# Packages of SGLang whose `__init__` imports all of it, and of which only modules are needed.
_SHELLS = ("sglang", "sglang.srt", "sglang.srt.utils", "sglang.kernels", "sglang.kernels.ops")
_OPS = "sglang.kernels.ops"
# Of site-packages/sglang_jit_cache/modules/: what a module is linked with, where the stack's wheels put it.
_LIBRARIES = ("tvm_ffi/lib", "nvidia/cu13/lib")


class _Described(Exception):  # noqa: N818
    """Thrown where SGLang would look for a compiled module; carries what it would compile."""

    def __init__(self, spec: Any) -> None:  # noqa: ANN401
        super().__init__()
        self.spec = spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One module to compile. spec: SGLang's `BuildSpec`. name: of its file. rules: for ninja."""

    spec: Any
    name: str
    rules: str


class Generator:
    """SGLang as installed, imported as far as its descriptions need. folder: keeps everything made.

    arches: compute capabilities, `9.0`; the attribute has SGLang's names of what is compiled for, `9.0a`. It changes
    what the process imports, so there is one in a process.
    """

    def __init__(self, arches: Sequence[str], folder: Path) -> None:
        self.installed = distribution(DISTRIBUTION)
        self.folder = folder.resolve()
        self.site = Path(str(self.installed.locate_file(""))).resolve()
        self.cuda = _cuda()
        # It looks for torch itself, and must not find the names that come next.
        importlib.import_module("tvm_ffi")
        torch_names.install(self.cuda)
        for name in _SHELLS:
            self._shell(name)
        target: Any = importlib.import_module("sglang.kernels.jit.utils.arch")
        self._target: Any = target
        self._loader: Any = importlib.import_module("sglang.kernels.jit.utils.compile.loader")
        if "CUDAHOSTCXX" in os.environ:
            os.environ["NVCC_CCBIN"] = os.environ["CUDAHOSTCXX"]
        # SGLang chooses `a` or `f` by the release of nvcc, as it does where it compiles.
        self._arches = [target.make_jit_cuda_arch(*map(int, one.split("."))) for one in arches]
        self.arches = tuple(str(one.target_name) for one in self._arches)
        target._init_jit_cuda_arch_once = lambda: None
        # Asked anew for each architecture.
        package: Any = importlib.import_module("sglang.kernels.jit.utils")
        package.is_arch_support_pdl = package.is_arch_support_pdl.__wrapped__

    def kernels(self, key: Any) -> list[Kernel]:  # noqa: ANN401
        """The modules of modules.toml for each architecture. key: `sglang_jit_cache.keys.key`."""
        return [one for arch in self._arches for one in self._kernels_for(arch, key)]

    def _kernels_for(self, arch: Any, key: Any) -> Iterator[Kernel]:  # noqa: ANN401
        self._target._CUDA_ARCH = arch
        for row in _rows():
            for given in row["arguments"]:
                spec = self._describe(row["factory"], given)
                name = f"{spec.module_name}.{key(spec, arch.target_name, self.site)}.so"
                yield Kernel(spec=spec, name=name, rules=self._loader.ninja.generate(spec))

    def compile(self, kernels: Sequence[Kernel], jobs: int) -> dict[str, Path]:
        """The library of each module, by name. What an earlier run in the folder made is kept.

        RuntimeError of SGLang when a compiler fails.
        """
        with ThreadPoolExecutor(jobs) as pool:
            return dict(pool.map(self._compiled, kernels))

    def _compiled(self, kernel: Kernel) -> tuple[str, Path]:
        done = self.folder / kernel.name
        if not done.is_file():
            print(f"compiling {kernel.spec.module_name}", flush=True)  # noqa: T201
            build = self.folder / Path(kernel.name).stem
            rules = _portable(kernel.rules, [build, self.site])
            self._loader.ninja.build(spec=kernel.spec, build_dir=build, build_file=rules).rename(done)
        return kernel.name, done

    def _describe(self, factory: str, arguments: Sequence[object]) -> Any:  # noqa: ANN401
        """What `load_jit` would compile for one call of a factory."""
        module, _, name = factory.partition(":")
        self._shell(f"{_OPS}.{module.partition('.')[0]}")
        function = getattr(importlib.import_module(f"{_OPS}.{module}"), name)
        generate, self._loader.ninja.generate = self._loader.ninja.generate, _describe_only
        try:
            function(*map(_argument, arguments))
        except _Described as found:
            return found.spec
        finally:
            self._loader.ninja.generate = generate
        raise AssertionError(f"{factory} loads no module")

    def _shell(self, name: str) -> None:
        """A package without what its `__init__` does, unless it is there already."""
        if name not in sys.modules:
            package = module_from_spec(ModuleSpec(name, None, is_package=True))
            package.__path__ = [str(self.site.joinpath(*name.split(".")))]
            sys.modules[name] = package


def _describe_only(spec: Any) -> str:  # noqa: ANN401
    raise _Described(spec)


def _rows() -> Iterator[Mapping[str, Any]]:
    yield from tomllib.loads(_FILE.read_text("utf-8"))["module"]


def _argument(value: object) -> object:
    return getattr(sys.modules["torch"], value) if isinstance(value, str) else value


def _portable(text: str, folders: Sequence[Path]) -> str:
    """SGLang's rules for ninja, and: no folder of this machine and no local symbols, which hold numbers of nvcc's
    processes, in the result; and where it finds its libraries. `$$` is ninja's `$`.
    """
    maps = [f"-ffile-prefix-map={folder}=." for folder in folders]
    links = ["-s", *(f"-Wl,-rpath,'$$ORIGIN/../../{one}'" for one in _LIBRARIES)]
    added = {"cxxflags": maps, "cudaflags": [f"-Xcompiler={one}" for one in maps], "ldflags": links}
    lines = text.splitlines(keepends=True)
    return "".join(
        f"{line.rstrip()} {' '.join(added[name])}\n" if (name := line.partition(" = ")[0]) in added else line
        for line in lines
    )


def _cuda() -> str:
    """The release of the nvcc that is used, `13.0`."""
    nvcc = Path(os.environ["CUDA_HOME"], "bin/nvcc")
    told = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout  # noqa: S603
    return told.partition("release ")[2].partition(",")[0]
