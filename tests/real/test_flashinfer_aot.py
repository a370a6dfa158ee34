"""FlashInfer's cache built for SM 90 by `compose wheel`, and FlashInfer's own loader, which must compile nothing.

Needs a CUDA 12 toolkit that knows sm_90a (CUDA_HOME). FLASHINFER_SET names another set of modules than `smoke`, whose
five files take a CPU minute. FLASHINFER_PYTHON names a Python with PyTorch for CUDA 12 and FlashInfer 0.6.5, such as a
bundle's: the loader is then also run with PyTorch instead of the names that the sources bring along.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from composer.errors import ComposerError
from composer.formats.elf import read_elf
from composer.formats.gpu_code import read_gpu_code
from composer.interpreter import choose_python
from composer.steps.survey import mapped
from composer.steps.toolchain import choose_toolchain
from composer.store import Store

pytestmark = pytest.mark.real

REPOSITORY = Path(__file__).resolve().parents[2]
COMPOSE = [sys.executable, "-c", "from composer.cli.main import main; main()"]
SET = os.environ.get("FLASHINFER_SET", "smoke")
RUNTIME = "$ORIGIN/../../../nvidia/cuda_runtime/lib"
NEEDED = {
    "libcuda.so.1", "libcudart.so.12", "libcublas.so.12", "libcublasLt.so.12", "libstdc++.so.6", "libgcc_s.so.1",
    "libm.so.6", "libc.so.6", "ld-linux-x86-64.so.2",
}  # fmt: skip
RECIPE = f"""
schema = 1
name = "cache"
version = "1.0"
summary = "FlashInfer's cache"
cuda = "12.8"
pythons = ["3.12", "3.11"]
as-of = 2026-03-11T00:00:00Z
sm = [90]

[[component]]
name = "flashinfer-python"
version = "0.6.5"

[[component]]
name = "apache-tvm-ffi"
version = "0.1.9"

[[component]]
name = "flashinfer-jit-cache"
version = "0.6.5+cu128"

[component.build]
shipped = "flashinfer-jit-cache"
cuda = true
requires = ["flashinfer-python", "apache-tvm-ffi", "filelock", "jinja2", "ninja", "packaging", "requests"]
unneeded = ["click", "einops", "numpy", "nvidia-cudnn-frontend", "nvidia-cutlass-dsl", "nvidia-ml-py", "tabulate", "torch", "tqdm"]
config = {{ arch = "{{sm.specific}}", set = "{SET}", build-dir = "{{folder}}/build" }}
"""  # noqa: E501
# What FlashInfer does for a kernel, for every module of the set.
ASK = """
import json, os, pathlib, subprocess, sys
sources, name, with_torch, home = sys.argv[1:5]
sys.path[:0] = [f"{sources}/backend", *sys.argv[5:]]
os.environ.update(FLASHINFER_CUDA_ARCH_LIST="9.0a", FLASHINFER_WORKSPACE_BASE=home)
if with_torch == "yes":
    import flashinfer
from flashinfer_aot.modules import Generator
from flashinfer_aot.selection import select
generator = Generator("9.0a", pathlib.Path(home))
os.environ["FLASHINFER_DISABLE_JIT"] = "1"
import torch
torch.version.cuda = torch.version.cuda or "12.8"
from flashinfer.jit import core
found = {}
for spec in generator.specs(select({"set": name})):
    found[spec.name] = [spec.is_aot, str(spec.get_library_path()), type(spec.build_and_load()).__name__]
absent = core.gen_jit_spec("no_such_module", [])
try:
    absent.build_and_load()
except core.MissingJITCacheError as fault:
    missing = fault.spec.name
made = [str(path) for path in pathlib.Path(home).rglob("*") if path.suffix in (".so", ".o", ".ninja")]
print(json.dumps({"found": found, "missing": missing, "made": made, "torch": getattr(torch, "__version__", None)}))
"""


@dataclass(frozen=True)
class Cache:
    """The wheel, unpacked beside nothing else. driver: a folder with the toolkit's stub of the driver's library."""

    facts: dict[str, Any]
    site: Path
    driver: Path

    @property
    def libraries(self) -> list[Path]:
        return sorted(self.site.glob("flashinfer_jit_cache/jit_cache/*/*.so"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    try:
        toolkit = choose_toolchain("12.8", [90], "x86_64", Store()).candidate.root
    except ComposerError as fault:
        pytest.skip(str(fault))
    folder = tmp_path_factory.mktemp("cache")
    recipe = folder / "cache.toml"
    recipe.write_text(RECIPE)
    words = [
        *COMPOSE,
        "wheel",
        "flashinfer-jit-cache",
        "--recipe",
        str(recipe),
        "--sm",
        "90",
        "--isa",
        "avx512",
        "--json",
    ]
    done = subprocess.run(["nice", *words], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    print({key: facts[key] for key in ("filename", "size", "cpu_seconds", "memory", "disk")})
    with zipfile.ZipFile(facts["path"]) as archive:
        archive.extractall(folder / "site")
    (folder / "driver").mkdir()
    stubs = [*toolkit.glob("lib64/stubs/libcuda.so"), *toolkit.glob("lib/*/stubs/libcuda.so")]
    (folder / "driver/libcuda.so.1").symlink_to(stubs[0])
    return Cache(facts, folder / "site", folder / "driver")


@pytest.fixture(scope="module")
def environment(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with FlashInfer, what its loader imports, the CUDA runtime and the cache."""
    folder = tmp_path_factory.mktemp("environment")
    python = choose_python(("3.12", "3.11")).path
    subprocess.run([python, "-I", "-m", "venv", "--without-pip", folder / "env"], check=True)
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", folder / "env/bin/python", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "flashinfer-python==0.6.5", cache.facts["path"]], check=True)
    subprocess.run([*pip, "apache-tvm-ffi==0.1.9", "nvidia-cuda-runtime-cu12==12.8.90", "filelock", "jinja2",
                    "packaging", "requests"], check=True)  # fmt: skip
    return folder / "env/bin/python"


def ask(cache: Cache, python: Path | str, home: Path, *site: Path, with_torch: bool = False) -> dict[str, Any]:
    sources = REPOSITORY / "sources/flashinfer-jit-cache"
    words = [python, "-B", "-c", ASK, sources, SET, "yes" if with_torch else "no", home, *site]
    environ = {"PATH": "/nonexistent", "HOME": str(home), "LD_LIBRARY_PATH": str(cache.driver)}
    done = subprocess.run(words, capture_output=True, text=True, env=environ, cwd="/")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_modules_hold_code_for_this_gpu_only_and_name_no_folder(cache: Cache) -> None:
    assert cache.facts["filename"] == "flashinfer_jit_cache-0.6.5+cu128.sm90-py3-none-linux_x86_64.whl"
    with_code = 0
    for path in cache.libraries:
        with mapped(path) as view:
            code, elf = read_gpu_code(view, path.name), read_elf(view, path.name)
        names = {f"{one.kind} {one.sm}{one.variant}" for region in code.regions for box in region.containers
                 for one in box.entries}  # fmt: skip
        assert names <= {"elf 90a"}, path.name
        with_code += bool(names)
        assert elf.runpath == (RUNTIME,)
        assert set(elf.needed) <= NEEDED, path.name
        assert str(Store().root).encode() not in path.read_bytes()
    print(f"{len(cache.libraries)} modules, {with_code} with code for the GPU")
    assert with_code >= 3


def test_flashinfer_finds_every_module_and_compiles_nothing(cache: Cache, environment: Path, tmp_path: Path) -> None:
    done = ask(cache, environment, tmp_path)
    assert done["found"].keys() == {path.stem for path in cache.libraries}
    site = environment.parents[1] / "lib"
    for name, (is_aot, path, kind) in done["found"].items():
        assert (is_aot, kind) == (True, "Module"), name
        assert Path(path).is_relative_to(site), name
        assert path.endswith(f"/flashinfer_jit_cache/jit_cache/{name}/{name}.so")
    assert done["missing"] == "no_such_module"
    assert done["made"] == []


def test_so_does_flashinfer_with_pytorch(cache: Cache, tmp_path: Path) -> None:
    python = os.environ.get("FLASHINFER_PYTHON")
    if not python:
        pytest.skip("FLASHINFER_PYTHON names no Python that has PyTorch and FlashInfer")
    done = ask(cache, python, tmp_path, cache.site, with_torch=True)
    print(f"PyTorch {done['torch']}")
    assert done["torch"]
    assert done["found"].keys() == {path.stem for path in cache.libraries}
    assert all(is_aot and Path(path).is_relative_to(cache.site) for is_aot, path, _ in done["found"].values())
    assert done["made"] == []
