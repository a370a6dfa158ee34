"""SGLang's kernels in a bundle of the forward lane for SM 90, and SGLang's own `load_jit`, which must compile nothing.

WHEEL_COMPOSER_FORWARD_TREE: that bundle, unpacked. No GPU and no compiler is used; a toolkit
of CUDA 13 lends the stub of the driver's library.
"""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from composer.errors import ComposerError
from composer.formats.elf import read_elf
from composer.formats.gpu_code import read_gpu_code
from composer.steps.survey import mapped
from composer.steps.toolchain import choose_toolchain
from composer.store import Store

pytestmark = pytest.mark.real

MODULES = Path(__file__).resolve().parents[2] / "sources/sglang-jit-cache/modules.toml"
NEEDED = {
    "libcuda.so.1", "libcudart.so.13", "libtvm_ffi.so", "libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6",
    "ld-linux-x86-64.so.2",
}  # fmt: skip
# Calls SGLang's own functions as serving on SM 90 does, and writes down which library each opened.
ASK = """
import importlib, json, sys
import torch
from sglang.kernels.jit.utils import arch
from sglang.kernels.jit.utils.compile import loader

arch.is_cuda = lambda: True
opened, load = [], loader._load
loader._load = lambda path: (opened.append(path.name), load(path))[1]
with arch.override_jit_cuda_arch(9, 0):
    for factory, given in json.loads(sys.argv[1]):
        module, _, name = factory.partition(":")
        function = getattr(importlib.import_module(f"sglang.kernels.ops.{module}"), name)
        function(*(getattr(torch, one) if isinstance(one, str) else one for one in given))
    try:
        importlib.import_module("sglang.kernels.ops.kvcache.kvcache")._jit_kvcache_module(48, 48, 32)
    except RuntimeError as fault:
        refused = str(fault)
print(json.dumps({"opened": opened, "refused": refused}))
"""


@pytest.fixture(scope="module")
def tree() -> Path:
    if not (given := os.environ.get("WHEEL_COMPOSER_FORWARD_TREE")):
        pytest.skip("WHEEL_COMPOSER_FORWARD_TREE is not set")
    return Path(given)


@pytest.fixture(scope="module")
def libraries(tree: Path) -> list[Path]:
    return sorted(tree.glob("lib/python*/site-packages/sglang_jit_cache/modules/*.so"))


@pytest.fixture(scope="module")
def answer(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("driver")
    try:
        toolkit = choose_toolchain("13.0", [90], "x86_64", Store(), libraries=False).candidate.root
    except ComposerError as fault:
        pytest.skip(str(fault))
    (folder / "libcuda.so.1").symlink_to(next(toolkit.glob("lib64/stubs/libcuda.so")))
    calls = [(row["factory"], given) for row in tomllib.loads(MODULES.read_text())["module"]
             for given in row["arguments"]]  # fmt: skip
    environ = {"PATH": "/nonexistent", "CUDA_HOME": "/nonexistent", "HOME": str(folder), "LD_LIBRARY_PATH": str(folder)}
    done = subprocess.run([tree / "bin/python", "-B", "-c", ASK, json.dumps(calls)], capture_output=True, text=True,
                          env=environ, cwd="/")  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


def test_sglang_opens_every_module_and_compiles_nothing(answer: dict[str, Any], libraries: list[Path]) -> None:
    assert sorted(answer["opened"]) == [path.name for path in libraries]
    assert len(libraries) >= 20


def test_what_is_not_there_is_one_clear_error(answer: dict[str, Any]) -> None:
    assert "JIT module 'sgl_kernel_jit_kvcache_48_48_32_true' was not compiled ahead of time" in answer["refused"]
    assert "needs what this host lacks: " in answer["refused"]
    assert "nvcc" in answer["refused"]
    assert "c++" in answer["refused"]


def test_modules_hold_code_for_this_gpu_only_and_name_no_folder(libraries: list[Path]) -> None:
    with_code = 0
    for path in libraries:
        with mapped(path) as view:
            code, elf = read_gpu_code(view, path.name), read_elf(view, path.name)
        names = {f"{one.kind} {one.sm}{one.variant}" for region in code.regions for box in region.containers
                 for one in box.entries}  # fmt: skip
        assert names <= {"elf 90a"}, path.name
        with_code += bool(names)
        assert set(elf.needed) <= NEEDED, path.name
        assert str(Store().root).encode() not in path.read_bytes(), path.name
    assert with_code >= len(libraries) - 2
