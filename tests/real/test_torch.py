"""What the stack's prebuilt wheels take from libtorch, so that a build of it lacks nothing, and real code by nvcc."""

from __future__ import annotations

import json
import re
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from composer.formats.cubin import Cubin
from composer.formats.elf import read_elf
from composer.formats.gpu_code import read_gpu_code
from composer.formats.symbols import defined_symbols, undefined_symbols
from composer.steps.artifact import artifact_path
from composer.steps.objects import objects
from composer.steps.toolchain import find_candidate
from composer.store import Store
from tests.servers import Index
from tests.torch_trees import offer, write_recipe

pytestmark = pytest.mark.real
TORCH = "torch-2.9.1-cp312"
EXTENSIONS = ("sgl_kernel-0.3.21", "torchvision-0.24.1-cp312", "torch_c_dlpack_ext-0.1.5-cp312")
LIBRARIES = {"libc10.so", "libc10_cuda.so", "libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libtorch_python.so"}
SWITCHED_OFF = re.compile(r"cudnn|cufile|cusparselt|nvshmem|magma|fbgemm|xnnpack|nnpack", re.IGNORECASE)
#: Of the official build, which holds parts of the C++ runtime of GCC 13, extensions take these without a version.
#: Newer than GCC 11's runtime is one, and only its name is in them: no relocation uses it.
UNUSED = "_ZSt21ios_base_library_initv"
RUNTIME = Path("/usr/lib/x86_64-linux-gnu/libstdc++.so.6")


def wheel(prefix: str) -> Path:
    found = sorted(Store().artifacts.glob(f"*/*/{prefix}-*x86_64.whl"))
    assert found, f"no {prefix} wheel in the store: run `compose fetch --sm 90 --isa avx512 --python 3.12`"
    return found[0]


def loaded(prefix: str) -> Iterator[tuple[str, bytes]]:
    for path, _, content in objects(wheel(prefix)):
        if not isinstance(content, Cubin):
            yield path, bytes(content)


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """The names that each library of the official build defines."""
    found = {path.rpartition("/")[2]: defined_symbols(data, path) for path, data in loaded(TORCH) if "/lib/" in path}
    return {name: {one.name for one in names} for name, names in found.items()}


@pytest.fixture(scope="module")
def taken(exported: dict[str, set[str]]) -> dict[str, frozenset[str]]:
    """The names that each object of the extensions takes from any of them."""
    everything = set().union(*exported.values())
    found = {}
    for prefix in EXTENSIONS:
        for path, data in loaded(prefix):
            if LIBRARIES & set(read_elf(data, path).needed):
                found[path] = undefined_symbols(data, path) & everything
    return found


def test_extensions_need_no_library_that_is_not_built(taken: dict[str, frozenset[str]]) -> None:
    assert len(taken) > 10
    for prefix in EXTENSIONS:
        for path, data in loaded(prefix):
            torch = {
                name for name in read_elf(data, path).needed if name.startswith(("libtorch", "libc10", "libcaffe2"))
            }
            assert torch <= LIBRARIES, path


def test_extensions_take_nothing_that_a_switch_takes_away(
    taken: dict[str, frozenset[str]], exported: dict[str, set[str]]
) -> None:
    kept = set().union(*(exported[name] for name in LIBRARIES))
    for path, names in taken.items():
        assert names <= kept, path
        assert not [name for name in names if SWITCHED_OFF.search(name)], path


def test_the_cxx_runtime_of_gcc_11_has_what_extensions_take_from_the_official_build(
    taken: dict[str, frozenset[str]],
) -> None:
    names = {name for found in taken.values() for name in found if name.startswith(("_ZSt", "_ZNSt", "_ZNKSt"))}
    assert "_ZSt28__throw_bad_array_new_lengthv" in names  # GLIBCXX_3.4.29, of GCC 11
    here = {one.name for one in defined_symbols(RUNTIME.read_bytes(), str(RUNTIME))}
    missing = {name for name in names if name not in here and not _is_template(name)}
    assert missing <= {UNUSED}


def _is_template(name: str) -> bool:
    """Whether it is an instance of a template, which the compiler of its user makes."""
    return "I" in name.removeprefix("_ZNSt").removeprefix("_ZNKSt").removeprefix("_ZSt")


def test_the_name_that_no_older_runtime_has_is_not_used(tmp_path: Path) -> None:
    for prefix in EXTENSIONS:
        for path, data in loaded(prefix):
            if UNUSED in undefined_symbols(data, path):
                (tmp_path / "one.so").write_bytes(data)
                shown = subprocess.run(
                    ["readelf", "-rW", tmp_path / "one.so"], capture_output=True, text=True, check=True
                )
                assert UNUSED not in shown.stdout, path


def test_real_code_for_one_gpu(tmp_path: Path) -> None:
    """With CUDA 13.0, whose compiler can be had anywhere; one of 12.8 must be installed."""
    compiler = find_candidate("cuda13.0-compiler", Store())
    assert compiler.wheels
    if compiler.wheels.missing(Store()):
        pytest.skip("run `compose toolchain ensure cuda13.0-compiler`")
    (tmp_path / "wheels").mkdir()
    for one in compiler.wheels.artifacts:
        (tmp_path / "wheels" / one.filename).symlink_to(artifact_path(Store().root, one))
    with Index() as index:
        offer(index)
        stack = write_recipe(tmp_path, index.url, cuda="13.0")
        stack.edit("cuda = true", "cuda = true\ncuda-libraries = false")
        words = ["wheel", "torch", "--recipe", str(stack.recipe), "--sm", "90", "--isa", "avx2", "--json"]
        facts = json.loads(stack.compose(*words, "--wheelhouse", str(tmp_path / "wheels")).ok().out)
    with zipfile.ZipFile(facts["path"]) as built:
        library = built.read("torch/lib/libtorch_cuda.so")
    code = read_gpu_code(library, "libtorch_cuda.so")
    found = {entry.sm for region in code.regions for one in region.containers for entry in one.entries}
    assert found == {90}
    assert facts["inputs"]["tools"]["toolchain"].startswith("wheels ")
