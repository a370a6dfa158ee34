"""CUDA 13 from the real wheels: killed and resumed, made by two at once, moved to a site without a network, used."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from composer.formats.gpu_code import read_gpu_code

pytestmark = pytest.mark.real

COMPOSE = [sys.executable, "-c", "from composer.cli.main import main; main()", "toolchain"]
SMALL = "cuda13.0-compiler"
KERNEL = """\
#include <cub/cub.cuh>
#include <cublas_v2.h>
#include <cuda.h>
#include <curand_kernel.h>
__global__ void reduce(const float *in, float *out) {
    using Block = cub::BlockReduce<float, 128>;
    __shared__ typename Block::TempStorage scratch;
    asm volatile("wgmma.fence.sync.aligned;");
    float sum = Block(scratch).Sum(in[threadIdx.x]);
    if (threadIdx.x == 0) *out = sum;
}
extern "C" int run(const float *in, float *out) {
    cublasHandle_t handle;
    reduce<<<1, 128>>>(in, out);
    return cublasCreate(&handle) + cuInit(0);
}
"""


def start(store: Path, *words: str) -> subprocess.Popen[bytes]:
    environ = os.environ | {"WHEEL_COMPOSER_STORE": str(store)}
    return subprocess.Popen([*COMPOSE, *words], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ask(store: Path, *words: str) -> Any:
    process = start(store, *words, "--json")
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err.decode()
    return json.loads(out)


def killed_when(store: Path, condition: Callable[[], bool]) -> None:
    process = start(store, "ensure", SMALL)
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which a run was killed while it downloaded and another one while it unpacked."""
    root = tmp_path_factory.mktemp("toolchain") / "store"
    killed_when(root, lambda: any(root.glob("artifacts/*/*/*.part")))
    assert [one["state"] for one in ask(root, "list")["toolchains"]][:2] == ["to download"] * 2
    killed_when(root, lambda: any(root.glob("tmp/*/*/nvidia/cu13/bin/nvcc")))
    assert ask(root, "show", SMALL)["state"] == "to download"
    return root


def test_a_killed_one_is_resumed_by_two_at_once(store):
    done = {path: path.stat().st_mtime_ns for path in store.glob("artifacts/*/*/*.whl")}
    assert len(done) == 7, "the second run had fetched all"
    both = [start(store, "ensure", SMALL, "--offline", "--json") for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err.decode()
        assert json.loads(out)["state"] == "ensured"
    assert {path: path.stat().st_mtime_ns for path in store.glob("artifacts/*/*/*.whl")} == done
    assert not list((store / "tmp").iterdir())
    assert len(list(store.glob("objects/toolchain/*/*/nvidia"))) == 1


def test_a_second_run_costs_nothing(store):
    ask(store, "ensure", SMALL)
    started = time.monotonic()
    ask(store, "ensure", SMALL, "--offline")
    seconds = time.monotonic() - started
    print(f"a second run takes {seconds:.2f} s")
    assert seconds < 10


def test_a_site_without_a_network(store, tmp_path):
    wheelhouse = tmp_path / "wheels"
    ask(store, "ensure", SMALL, "--output", str(wheelhouse))
    assert len(list(wheelhouse.iterdir())) == 7
    there = ask(tmp_path / "other", "ensure", SMALL, "--offline", "--wheelhouse", str(wheelhouse))
    assert there["state"] == "ensured"
    assert Path(there["root"]).is_relative_to(tmp_path)


@pytest.mark.parametrize(("name", "code"), [("90a", "elf 90a"), ("120", "elf 120")])
def test_all_of_it_compiles_and_links_what_uses_libraries(store, tmp_path, name, code):
    made = ask(store, "ensure", "cuda13.0")
    source, library = tmp_path / "reduce.cu", tmp_path / "reduce.so"
    source.write_text(KERNEL if name == "90a" else KERNEL.replace('asm volatile("wgmma.fence.sync.aligned;");', ""))
    environ = made["environ"] | {"PATH": "/usr/bin:/bin"}
    subprocess.run(
        [environ["CUDACXX"], "-ccbin", environ["CUDAHOSTCXX"], "-shared", "-Xcompiler", "-fPIC", "-cudart", "shared",
         "-gencode", f"arch=compute_{name},code=sm_{name}", str(source), "-o", str(library), "-lcublas", "-lcuda"],
        env=environ, check=True, timeout=300,
    )  # fmt: skip
    with library.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as view:
        found = read_gpu_code(view, library.name)
        # Its own, and what the device linker made of it and of libcudadevrt.
        images = {f"{one.kind} {one.sm}{one.variant}" for region in found.regions for box in region.containers
                  for one in box.entries}  # fmt: skip
    assert images == {code}
    dynamic = subprocess.run(["readelf", "-d", str(library)], capture_output=True, check=True, text=True).stdout
    assert all(f"[{one}]" in dynamic for one in ("libcublas.so.13", "libcudart.so.13", "libcuda.so.1"))


def test_a_torn_toolkit_is_made_again(store):
    root = Path(ask(store, "ensure", SMALL)["root"])
    os.truncate(root / "bin/ptxas", 1000)
    assert ask(store, "show", SMALL)["state"] == "to download"
    ask(store, "ensure", SMALL, "--offline")
    assert (root / "bin/ptxas").stat().st_size > 1 << 20
    assert shutil.which(str(root / "bin/ptxas"))
