"""The overlay `lean` on the real stack, without a GPU: everything loads, and what is not there says so."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.real

COMPOSE = Path(__file__).resolve().parents[2] / "scripts/compose"
TARGET = ("--sm", "90", "--isa", "avx512", "--overlay", "lean")
#: Bytes of the bundle at the default level.
MOST = 1_750_000_000
LINE = (
    r"sglang-python3\d\d-cuda12_8-sm90-avx512-lean: {} of {} is not in this bundle: compose it without --overlay lean"
)


def compose(*words: str | Path) -> str:
    """Standard output of a command that succeeds."""
    done = subprocess.run([COMPOSE, *words], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("dist")
    compose("build", *TARGET, "-o", folder)
    (path,) = folder.glob("*.tar.zst")
    yield path
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def prefix(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("prefix")
    subprocess.run(["tar", "--zstd", "-xf", bundle, "-C", folder], check=True)
    yield folder
    shutil.rmtree(folder)


def on_host(prefix: Path, code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    words = [
        prefix / "bin/python",
        "-c",
        f"import ctypes, torch, pathlib\nnvidia = pathlib.Path(torch.__file__).parents[1] / 'nvidia'\n{code}",
    ]
    return subprocess.run(words, capture_output=True, text=True, env={"PATH": os.defpath, **environ}, cwd="/")


def library(folder: str, name: str) -> str:
    return f"ctypes.CDLL(str(nvidia / '{folder}/lib/{name}'))"


def test_the_bundle_is_small_and_named_by_its_overlay(bundle: Path) -> None:
    assert re.fullmatch(r"sglang-python3\d\d-cuda12_8-sm90-avx512-lean\.tar\.zst", bundle.name)
    assert bundle.stat().st_size <= MOST
    manifest = json.loads(compose("inspect", "--json", bundle))
    assert manifest["recipe"]["overlays"] == "lean"
    (own,) = (layer for layer in manifest["layers"] if layer["name"] == "wheel-composer")
    stubs = [one["path"] for one in own["changes"]["files"] if one["kind"] == "stub"]
    sizes = {entry["path"]: entry.get("size", 0) for layer in manifest["layers"] for entry in layer["entries"]}
    assert len(stubs) == 8
    assert sum(sizes[path] for path in stubs) < 1_000_000


def test_it_verifies_with_its_imports(prefix: Path) -> None:
    assert ": sound;" in compose("verify", prefix)


def test_torch_finds_every_symbol_at_its_start_and_calls_no_stub(prefix: Path) -> None:
    done = on_host(prefix, "print(torch.fft.rfft(torch.ones(4)).real.tolist(), torch.backends.cudnn.version())",
                   LD_BIND_NOW="1")  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "[4.0, 0.0, 0.0] 91002\n", "")


def test_direct_storage_is_refused_by_torch_itself(prefix: Path, tmp_path: Path) -> None:
    done = on_host(prefix, f"torch.cuda.gds.GdsFile({str(tmp_path / 'file')!r}, 66)")
    assert "cuFileHandleRegister failed: GPUDirect Storage not supported on current platform" in done.stderr
    assert re.search(LINE.format("cuFileHandleRegister", "libcufile.so.0"), done.stderr)


@pytest.mark.parametrize(
    ("folder", "name", "function", "status"),
    [
        ("cusparselt", "libcusparseLt.so.0", "cusparseLtInit", 10), ("cufft", "libcufft.so.11", "cufftCreate", 16),
        ("cusparse", "libcusparse.so.12", "cusparseCreate", 10),
        ("cusolver", "libcusolver.so.11", "cusolverDnCreate", 9),
        ("curand", "libcurand.so.10", "curandCreateGenerator", 204), ("cufile", "libcufile.so.0", "cuFileRead", -5007),
    ],
)  # fmt: skip
def test_a_stub_returns_its_status_and_says_why(
    prefix: Path, folder: str, name: str, function: str, status: int
) -> None:
    done = on_host(prefix, f"print({library(folder, name)}.{function}(0))")
    assert done.stdout == f"{status}\n"
    assert re.fullmatch(LINE.format(function, name) + "\n", done.stderr)


def test_the_text_of_a_status_is_a_text(prefix: Path) -> None:
    code = f"f = {library('cusparse', 'libcusparse.so.12')}.cusparseGetErrorString\n"
    code += "f.restype = ctypes.c_char_p\nprint(f(10))"
    assert re.fullmatch(
        r"b'not in the bundle \S+-lean: compose it without --overlay lean'\n", on_host(prefix, code).stdout
    )


def test_cudnn_reports_that_rnns_are_not_supported(prefix: Path) -> None:
    code = f"""
cudnn, made = {library("cudnn", "libcudnn.so.9")}, ctypes.c_void_p()
print(cudnn.cudnnCreateConvolutionDescriptor(ctypes.byref(made)), cudnn.cudnnCreateRNNDescriptor(ctypes.byref(made)))
"""
    done = on_host(prefix, code)
    assert done.stdout == "0 3000\n"
    assert re.fullmatch(LINE.format("cudnnCreateRNNDescriptor", "libcudnn_adv.so.9") + "\n", done.stderr)


def test_nvshmem_ends_the_process(prefix: Path) -> None:
    done = on_host(prefix, f"{library('nvshmem', 'libnvshmem_host.so.3')}.nvshmem_malloc(8)")
    assert done.returncode == -signal.SIGABRT
    assert re.match(LINE.format("nvshmem_malloc", "libnvshmem_host.so.3"), done.stderr)
