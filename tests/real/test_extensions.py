"""Extension modules built from source: a CUDA kernel by a toolchain of wheels, and torch-scatter beside PyTorch.

The kernel's numbers are checked on a GPU, by tests/gpu/hopper_kernel.py. Measured on two cores of a Zen 4 with
g++ 12.2, shared with other work:

- hopper_kernel: 6.5 CPU seconds, 0.2 GB of memory for the largest compiler, 0.1 GB of disk; a wheel of 0.2 MB.
- torch_scatter: 329 CPU seconds, 1.6 GB of memory for the largest compiler, 7.0 GB of disk, nearly all PyTorch and
  NVIDIA's libraries in the build's environment; a wheel of 0.75 MB with the flags of avx512, 0.70 MB without. Alone on
  the machine the environment takes 33 s, beside other work that writes to the disk it took 9 min.
- PyTorch and torch_scatter as a bundle with the lean overlay: 1.3 GB, 3.0 GB unpacked.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from composer.formats.elf import Elf
from composer.formats.gpu_code import read_gpu_code
from composer.formats.symbols import defined_symbols, undefined_symbols
from composer.steps.rpath import read_object

pytestmark = pytest.mark.real

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(__file__).resolve().parent / "data"
TARGET = ("--sm", "90", "--isa", "avx512")
#: What every host of these wheels has.
HOST = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "ld-linux-x86-64.so.2"}
# zmm instructions by library, with the flags of avx512; without flags there are none.
ZMM = {"_scatter_cpu.so": 61, "_segment_coo_cpu.so": 1747, "_segment_csr_cpu.so": 763, "_version_cpu.so": 12}
USE = """
import torch, torch_scatter
rows, index = torch.arange(12.).reshape(3, 4), torch.tensor([0, 1, 0])
print(torch_scatter.scatter_sum(rows, index, dim=0).tolist())
print(torch_scatter.segment_csr(rows, torch.tensor([0, 2, 3])).tolist())
"""
USED = "[[8.0, 10.0, 12.0, 14.0], [4.0, 5.0, 6.0, 7.0]]\n[[4.0, 6.0, 8.0, 10.0], [8.0, 9.0, 10.0, 11.0]]\n"


def compose(*words: str | Path) -> str:
    """What a command prints; without CUDA_HOME, so that the toolchain is the one of the wheels."""
    environ = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH")}
    done = subprocess.run(["nice", ROOT / "scripts/compose", *words], capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wheel(recipe: Path, *target: str) -> Any:
    """What `compose wheel` says of the last component of a recipe in tests/real/data."""
    name = recipe.stem.split(".")[0].replace("_", "-")
    built = json.loads(compose("wheel", name, "--recipe", recipe, *target, "--json"))
    print({key: built[key] for key in ("filename", "size", "seconds", "cpu_seconds", "memory", "disk", "jobs")})
    return built


def libraries(path: str, folder: Path) -> dict[str, Path]:
    """The shared objects of a wheel, unpacked, by file name."""
    with zipfile.ZipFile(path) as archive:
        found = [Path(archive.extract(one, folder)) for one in archive.namelist() if one.endswith(".so")]
    return {one.name: one for one in found}


def symbols(read: Any, path: Path) -> Any:
    with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as view:
        return read(view, path.name)


def images(path: Path) -> list[str]:
    """The GPU code in a library: `elf 90a`."""
    code = symbols(read_gpu_code, path)
    return [f"{one.kind} {one.sm}{one.variant}" for region in code.regions for box in region.containers
            for one in box.entries]  # fmt: skip


# --- a kernel for SM 90a ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By SM, what was built; from a copy, because locks are written beside a recipe."""
    folder = tmp_path_factory.mktemp("kernel")
    shutil.copytree(DATA / "hopper_kernel", folder / "hopper_kernel")
    recipe = Path(shutil.copy(DATA / "hopper_kernel.toml", folder))
    return {sm: wheel(recipe, "--sm", sm, "--isa", "avx512") for sm in ("90", "120")}


@pytest.mark.parametrize("sm", ["90", "120"])
def test_a_kernel_for_one_architecture(kernels: Mapping[str, Any], tmp_path: Path, sm: str) -> None:
    built = kernels[sm]
    assert built["filename"] == f"hopper_kernel-1.0+sm{sm}-py3-none-linux_x86_64.whl"
    assert built["inputs"]["tools"]["toolchain"].startswith("wheels ")
    (path,) = libraries(built["path"], tmp_path).values()
    assert images(path) == [f"elf {sm}a"]
    elf = read_object(path)
    assert set(elf.needed) <= HOST
    assert not elf.rpath + elf.runpath
    assert b"/builds/" not in path.read_bytes()


def test_what_the_kernel_says_without_a_gpu(kernels: Mapping[str, Any], tmp_path: Path) -> None:
    (path,) = libraries(kernels["90"]["path"], tmp_path).values()
    library = ctypes.CDLL(str(path))
    library.hopper_error_name.restype = ctypes.c_char_p
    device = ctypes.create_string_buffer(512)
    status = library.hopper_device(device, len(device))
    said = {0, "cudaErrorInsufficientDriver", "cudaErrorNoDevice"}
    assert (status and library.hopper_error_name(status).decode()) in said


# --- torch-scatter ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torch-scatter beside the shipped recipes' PyTorch."""
    folder = tmp_path_factory.mktemp("scatter")
    shutil.copytree(ROOT / "recipes/components", folder / "components")
    return Path(shutil.copy(DATA / "torch_scatter.toml", folder))


@pytest.fixture(scope="module", params=["avx512", "source"])
def extension(request: pytest.FixtureRequest, recipe: Path) -> Any:
    """With the flags of an instruction set, and without."""
    if request.param == "avx512":
        return wheel(recipe, *TARGET)
    plain = recipe.with_name("torch_scatter.plain.toml")
    plain.write_text(recipe.read_text().replace("{isa.flags} ", ""))
    return wheel(plain, *TARGET)


@pytest.fixture(scope="module")
def torch(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The libraries of the PyTorch that it was built against, as far as it needs them."""
    built = wheel(recipe, *TARGET)
    (name,) = (one for one in built["inputs"]["requires"] if one.startswith("torch-"))
    sha256 = built["inputs"]["requires"][name]
    path = Path(built["path"]).parents[2] / sha256[:2] / sha256 / name
    folder = tmp_path_factory.mktemp("torch")
    with zipfile.ZipFile(path) as archive:
        names = ("libc10.so", "libtorch_cpu.so")
        return {one: Path(archive.extract(f"torch/lib/{one}", folder)) for one in names}


def test_the_raw_extension(extension: Any, torch: Mapping[str, Path], tmp_path: Path) -> None:
    found = libraries(extension["path"], tmp_path)
    label = "avx512" if "avx512" in extension["filename"] else "source"
    assert extension["filename"].startswith(f"torch_scatter-2.1.2+{label}-cp31")
    assert found.keys() == ZMM.keys()
    elves: list[Elf] = [read_object(path) for path in found.values()]
    assert {tuple(sorted(set(one.needed) - HOST)) for one in elves} == {("libc10.so", "libtorch_cpu.so")}
    assert not any(one.rpath or one.runpath for one in elves)
    defined = {one.name for path in torch.values() for one in symbols(defined_symbols, path)}
    used = {name for path in found.values() for name in symbols(undefined_symbols, path)}
    of_torch = {name for name in used if re.match(r"_ZN?K?(TV|TI|St)?N?K?(3c10|2at|5torch|6caffe2)", name)}
    assert len(of_torch) > 100
    assert of_torch <= defined
    assert not any(b"/builds/" in path.read_bytes() for path in found.values())


def test_its_instructions(extension: Any) -> None:
    said = json.loads(compose("isa", extension["path"], "--isa", "avx512", "--json"))
    counts = {Path(one["path"]).name: one["counts"].get("zmm", 0) for one in said["libraries"]}
    print(counts, said["judgement"]["verdict"])
    applied = "avx512" in extension["filename"]
    assert counts == (ZMM if applied else dict.fromkeys(ZMM, 0))
    assert said["judgement"]["verdict"] == ("applied" if applied else "not used")


def test_beside_pytorch_in_a_bundle(recipe: Path, tmp_path: Path) -> None:
    text = recipe.read_text().replace("sm = [90]", 'sm = [90]\ninclude = ["components/torch.toml"]', 1)
    stack = recipe.with_name("stack.toml")
    stack.write_text(re.sub(r'\[\[component\]\]\nname = "torch"\n(.+\n)+\n', "", text))
    words = ("--overlay", "lean", "--compress", "fast", "--torch", "wheel", "--output", tmp_path)
    compose("build", "--recipe", stack, *TARGET, *words)
    (bundle,) = tmp_path.glob("*.tar.zst")
    tree = tmp_path / "tree"
    compose("unpack", bundle, tree)
    bundle.unlink()
    (site,) = tree.glob("lib/python3*/site-packages")
    rpaths = {read_object(site / "torch_scatter" / name).rpath for name in ZMM}
    assert rpaths == {("$ORIGIN/../torch/lib",)}
    program: list[str | Path] = [tree / "bin/python", "-W", "ignore", "-c"]
    assert subprocess.run([*program, USE], env={}, check=True, capture_output=True, text=True).stdout == USED
    # Its own RPATH finds PyTorch's libraries, with nothing of it loaded before.
    alone = f"import ctypes; ctypes.CDLL({str(site / 'torch_scatter/_segment_coo_cpu.so')!r})"
    subprocess.run([*program, alone], env={}, check=True)
