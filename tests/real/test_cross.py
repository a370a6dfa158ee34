"""Aarch64 bundles with their own CPython, composed on x86_64 and run under qemu-user.

Needs Debian's packages qemu-user-static and apt (`apt-get download` of arm64 packages; nothing is installed). The
CPython is Debian 12's in the layout of python-build-standalone's archives: what is tested is how one is made part of a
bundle where it cannot run. Measured on two cores of a Zen 4 that had other work, at `--compress fast`:

- extension modules: 30 MB of wheels, 10.9 s, 38.8 MB, 140.7 MB unpacked; imports 12 s.
- PyTorch 2.14.1 and sglang-kernel 0.4.10 on CUDA 13: 3.23 GB of wheels, about 150 s, 2.92 GB, 5.72 GB unpacked;
  `compose verify --no-imports` 30 s, imports 57 s.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from composer.formats.elf import Elf, is_elf, load_faults, read_elf
from composer.formats.stublib import render_stub
from composer.formats.symbols import undefined_symbols
from composer.proofs.imports import driver_functions
from tests.debian_arm64 import HOST, QEMU, emulated, python_archive, root

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="aarch64 is not another machine here"),
    pytest.mark.skipif(QEMU is None, reason="qemu-aarch64-static is not installed"),
]

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(__file__).resolve().parent / "data"
CUDA_ERROR_NO_DEVICE = 100
ARCHIVE = """
[[interpreter]]
python = "3.11"
machine = "aarch64"
url = "https://example.invalid/{name}"
sha256 = "{sha256}"
"""
USE = """
import ctypes, json, platform, sys
import msgspec, numpy, safetensors.numpy, tokenizers, uvloop, zmq

async def seven():
    return 7

rows = numpy.arange(6.0).reshape(2, 3)
vocabulary = tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a")
print(json.dumps({
    "machine": platform.machine(), "prefix": sys.prefix, "product": (rows @ rows.T).tolist(),
    "inverse": numpy.linalg.inv(rows @ rows.T).round(3).tolist(), "loop": uvloop.run(seven()),
    "tensor": safetensors.numpy.load(safetensors.numpy.save({"rows": rows}))["rows"].tolist(),
    "token": tokenizers.Tokenizer(vocabulary).encode("b").ids, "decoded": msgspec.json.decode(b"[1, 2.5]"),
    "socket": zmq.Context().socket(zmq.PAIR).closed, "numa": bool(ctypes.CDLL("libnuma.so.1").numa_available),
}))
"""


def compose(*words: str | Path) -> str:
    done = subprocess.run(["nice", ROOT / "scripts/compose", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return python_archive(tmp_path_factory.mktemp("archive"))


def build(name: str, archive: Path, folder: Path) -> Path:
    """The bundle of a recipe in data/, with the archive's CPython."""
    row = ARCHIVE.format(name=archive.name, sha256=hashlib.sha256(archive.read_bytes()).hexdigest())
    recipe = folder / f"{name}.toml"
    recipe.write_text((DATA / recipe.name).read_text() + row)
    shutil.copy(DATA / f"pylock.{name}-py311-aarch64.toml", folder)
    target = ("--sm", "90", "--isa", "armv9", "--compress", "fast")
    compose("build", "--recipe", recipe, *target, "--locked", "--wheelhouse", archive.parent, "-o", folder)
    return folder / f"{name}-python311-cuda13_0-sm90-armv9.tar.zst"


def unpacked(bundle: Path) -> Path:
    folder = bundle.parent / "a büñdle"
    folder.mkdir()
    subprocess.run(["tar", "--zstd", "-xf", bundle, "-C", folder], check=True)
    return folder


@pytest.fixture(scope="module")
def bundle(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("aarch64", archive, tmp_path_factory.mktemp("cross"))


@pytest.fixture(scope="module")
def prefix(bundle: Path) -> Path:
    return unpacked(bundle)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return root(tmp_path_factory.mktemp("host"), HOST)


@pytest.fixture(scope="module")
def elves(prefix: Path) -> dict[str, Elf]:
    files = {path.relative_to(prefix).as_posix(): path for path in prefix.rglob("*") if path.is_file()}
    return {name: read_elf(data, name) for name, path in files.items() if is_elf((data := path.read_bytes())[:64])}


def test_every_object_is_for_aarch64_and_its_largest_pages(elves: dict[str, Elf]) -> None:
    assert len(elves) > 60
    assert {elf.machine for elf in elves.values()} == {"aarch64"}
    assert {name: faults for name, elf in elves.items() if (faults := load_faults(elf))} == {}
    assert {load.align % 0x10000 for elf in elves.values() for load in elf.loads} == {0}, "pages of 64 KiB"


def test_verify_proves_it_but_for_the_imports(bundle: Path) -> None:
    out = compose("verify", bundle)
    assert "import.skipped" in out
    assert "closure.host-runtime" in out
    assert "error" not in out.replace("0 errors", "")


def test_nothing_of_this_machine_is_in_it(prefix: Path) -> None:
    assert not (prefix / "lib/fallback").exists()
    manifest = json.loads((prefix / "share/compose/manifest.json").read_text())
    assert manifest["target"]["machine"] == "aarch64"
    assert manifest["python"] == "3.11.2"
    assert manifest["floors"]["libstdc++ GLIBCXX"]["version"]


def test_it_runs_on_an_aarch64_host(prefix: Path, host: Path) -> None:
    before = sorted(prefix.rglob("*"))
    done = emulated(host, prefix / "bin/python3.11", "-c", USE)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "machine": "aarch64", "prefix": str(prefix), "product": [[5.0, 14.0], [14.0, 50.0]],
        "inverse": [[0.926, -0.259], [-0.259, 0.093]], "loop": 7, "tensor": [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]],
        "token": [1], "decoded": [1, 2.5], "socket": False, "numa": True,
    }  # fmt: skip
    assert sorted(prefix.rglob("*")) == before, "a start wrote into the bundle: its bytecode is not what it looks for"


def test_every_module_of_its_standard_library_loads(prefix: Path, host: Path) -> None:
    code = (
        "import importlib, os, sys\n"
        "folder = next(path for path in sys.path if path.endswith('lib-dynload'))\n"
        "names = sorted(name.partition('.')[0] for name in os.listdir(folder) if name.endswith('.so'))\n"
        "print(len([importlib.import_module(name) for name in names]))"
    )
    done = emulated(host, prefix / "bin/python3.11", "-I", "-c", code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 30


def test_its_launchers_find_it(prefix: Path, host: Path) -> None:
    assert os.readlink(prefix / "bin/python") == "python3"  # noqa: PTH115 - Path drops a leading ./
    done = emulated(host, prefix / "bin/python3.11", "-m", "_compose.host.detect", "--help")
    assert done.returncode == 0, done.stderr


# --- with GPU code ----------------------------------------------------------------------------------------------------

KERNELS = """
import json, torch, triton, xgrammar, tvm_ffi, sgl_kernel

rows = torch.arange(6.0).reshape(2, 3)
print(json.dumps({
    "torch": torch.__version__, "codes": torch._C._cuda_getArchFlags(), "gpu": torch.cuda.is_available(),
    "product": (rows @ rows.T).tolist(), "operators": hasattr(torch.ops.sgl_kernel, "rmsnorm"),
}))
"""


def test_pytorch_and_sglangs_kernels_for_grace(archive: Path, host: Path, tmp_path: Path) -> None:
    bundle = build("aarch64-cuda", archive, tmp_path)
    assert ": sound;" in compose("verify", "--no-imports", bundle)
    prefix = unpacked(bundle)
    bundle.unlink()
    symbols = (undefined_symbols(path.read_bytes(), path.name) for path in prefix.glob("**/sgl_kernel/**/*.so"))
    stub = render_stub("libcuda.so.1", driver_functions(symbols), CUDA_ERROR_NO_DEVICE, "aarch64")
    (tmp_path / "libcuda.so.1").write_bytes(stub)
    done = emulated(host, prefix / "bin/python3.11", "-c", KERNELS, LD_LIBRARY_PATH=str(tmp_path))
    shutil.rmtree(prefix)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "torch": "2.14.1+cu130", "codes": "sm_80 sm_90 sm_100 sm_110 sm_120", "gpu": False,
        "product": [[5.0, 14.0], [14.0, 50.0]], "operators": True,
    }  # fmt: skip
