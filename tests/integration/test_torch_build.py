"""The shipped recipe of PyTorch through the real step, with a small source that has PyTorch's build interface."""

from __future__ import annotations

import json
import platform
import re
import shutil
import signal
import subprocess
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest

from composer.errors import HostError
from composer.formats.elf import read_elf
from composer.interpreter import choose_python
from composer.steps.isa import judge_libraries, list_instructions
from composer.steps.load import load_targets
from tests.servers import File, Index
from tests.stack import PYTHON, Stack
from tests.toolkits import write_toolkit
from tests.torch_trees import archive, offer, shipped, write_recipe
from tests.wheels import build_wheel, wheel_filename

pytestmark = [
    pytest.mark.skipif(None in map(shutil.which, ("cmake", "ninja", "g++")), reason="needs cmake, ninja and g++"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="its kernels are for x86-64"),
]
TARGETS = load_targets()
X86 = [name for name, one in TARGETS.isa.items() if one.machine == "x86_64"]
#: Objects that a second Python compiles again: its own, and those that see a header of the new environment.
AGAIN = {"torch/csrc/module.cpp", "cuda/streams.cpp", "aten/context.cpp"}
PATCH = """--- a/c10/core.cpp
+++ b/c10/core.cpp
@@ -1 +1 @@
-// A line that is not there.
+// Another line.
"""


@pytest.fixture(scope="module")
def index() -> Iterator[Index]:
    with Index() as server:
        offer(server)
        yield server


@dataclass(frozen=True, kw_only=True)
class Built:
    """What `compose wheel --json` said, and where."""

    stack: Stack
    facts: dict[str, Any]

    @property
    def wheel(self) -> Path:
        return Path(self.facts["path"])

    def read(self, name: str) -> bytes:
        with zipfile.ZipFile(self.wheel) as wheel:
            (path,) = (one for one in wheel.namelist() if one.endswith(name))
            return wheel.read(path)

    def compiled(self) -> list[str]:
        """The sources that its log says were compiled."""
        return compiled(self.stack.store / f"logs/torch-{version(self)}-{self.facts['key'][:12]}.log")


def version(built: Built) -> str:
    return str(built.facts["filename"]).split("-")[1]


def compiled(log: Path) -> list[str]:
    text = log.read_text() if log.is_file() else ""
    return re.findall(r"Building \w+ object CMakeFiles/\w+\.dir/(\S+)\.o", text)


def build(stack: Stack, *more: str, sm: str = "90", isa: str = "avx512") -> Built:
    done = stack.compose(*words(stack, "--json", *more, sm=sm, isa=isa)).ok()
    return Built(stack=stack, facts=json.loads(done.out))


def words(stack: Stack, *more: str, sm: str = "90", isa: str = "avx512") -> list[str]:
    return ["wheel", "torch", "--recipe", str(stack.recipe), "--sm", sm, "--isa", isa, *more]


@pytest.fixture(scope="module")
def first(index: Index, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Built once for SM 90 and AVX-512; tests do not change it."""
    return build(write_recipe(tmp_path_factory.mktemp("torch"), index.url))


@pytest.fixture
def stack(index: Index, tmp_path: Path) -> Stack:
    return write_recipe(tmp_path, index.url)


# --- what is made -----------------------------------------------------------------------------------------------------


def test_the_wheel_says_what_it_is_for_and_what_it_links(first: Built) -> None:
    tag = f"cp{PYTHON.replace('.', '')}"
    assert first.wheel.name == f"torch-2.9.1+sm90.avx512-{tag}-{tag}-linux_x86_64.whl"
    metadata = Parser().parsestr(first.read(".dist-info/METADATA").decode())
    assert metadata["Version"] == "2.9.1+sm90.avx512"
    told = shipped().environment["PYTORCH_EXTRA_INSTALL_REQUIREMENTS"].split("|")
    assert metadata.get_all("Requires-Dist") == ["filelock", "sympy>=1.13.3", *told]


def test_every_variable_of_the_recipe_reaches_the_source(first: Built) -> None:
    assert first.facts["inputs"]["environment"].keys() == shipped().environment.keys()
    assert first.facts["inputs"]["environment"]["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert str(first.stack.store) not in json.dumps(first.facts["inputs"])


def test_the_canaries_prove_the_instruction_set(first: Built) -> None:
    prove(first, "avx512")


@pytest.mark.real
@pytest.mark.parametrize("isa", [name for name in X86 if name != "avx512"])
def test_every_instruction_set_lands_in_the_objects(isa: str, stack: Stack) -> None:
    prove(build(stack, isa=isa), isa)


def prove(built: Built, isa: str) -> None:
    found = {Path(one.path).name: one for one in list_instructions(built.wheel)}
    roles = {name: found[name].role for name in ("libc10.so", "libtorch_python.so", "libtorch_cpu.so")}
    assert roles == {"libc10.so": "canary", "libtorch_python.so": "canary", "libtorch_cpu.so": "dispatch"}
    judgement = judge_libraries(list(found.values()), TARGETS.isa[isa])
    assert (judgement.verdict, judgement.excess) == ("applied", {})
    flags = found["libtorch_cpu.so"].build_flags
    assert flags
    assert [one for one in TARGETS.isa[isa].flags if one not in flags.split()] == []


def test_what_is_linked_is_what_the_recipe_chose(first: Built) -> None:
    cuda = read_elf(first.read("libtorch_cuda.so"), "libtorch_cuda.so")
    assert "libnccl.so.2" in cuda.needed
    cpu = read_elf(first.read("libtorch_cpu.so"), "libtorch_cpu.so")
    assert not [name for name in cpu.needed if "mkl" in name]  # it is linked statically


def test_the_openmp_of_the_compiler_is_in_the_wheel(first: Built) -> None:
    assert "libgomp.so.1" in read_elf(first.read("libtorch_cpu.so"), "libtorch_cpu.so").needed
    assert read_elf(first.read("torch/lib/libgomp.so.1"), "libgomp.so.1").soname == "libgomp.so.1"


def test_cudnn_is_found_in_its_wheel(first: Built) -> None:
    assert "libcudnn.so.9" in read_elf(first.read("libtorch_cuda.so"), "libtorch_cuda.so").needed


def test_the_raw_build_looks_for_libraries_where_it_was_built(first: Built) -> None:
    """Which is why composing rewrites it; not so in a folder of the environment, which is the same for all Pythons."""
    (found,) = (one for one in read_elf(first.read("libtorch_cuda.so"), "x").runpath if "nccl" in one)
    assert found.startswith(str(first.stack.store / "builds"))
    assert found.endswith("/site/nvidia/nccl/lib")


def test_a_wheel_does_not_depend_on_where_it_was_built(first: Built) -> None:
    assert str(first.stack.store).encode() not in first.read("libc10.so")


# --- other targets ----------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_pascal_is_built_without_cudnn_and_flash_attention(stack: Stack) -> None:
    built = build(stack, sm="61", isa="avx2")
    assert version(built) == "2.9.1+sm61.avx2"
    assert "cuda/flash.cpp" not in built.compiled()
    assert b"cudnn" not in built.read(".dist-info/METADATA")
    assert not [name for name in read_elf(built.read("libtorch_cuda.so"), "x").needed if "cudnn" in name]
    assert b"\x006.1\x00" in built.read("libtorch_cuda.so")


@pytest.mark.real
def test_one_wheel_for_all_architectures(stack: Stack) -> None:
    built = build(stack, sm="all", isa="avx2")
    assert version(built) == "2.9.1+all.avx2"
    assert b"\x007.5;8.0;8.6;8.9;9.0;10.0;12.0\x00" in built.read("libtorch_cuda.so")


@pytest.mark.real
def test_a_bundle_of_it_is_closed_and_looks_nowhere_outside(index: Index, tmp_path: Path) -> None:
    for name in ("filelock", "sympy"):
        data = build_wheel(name, "1.14", {f"{name}.py": b""})
        index.add(name, File(filename=wheel_filename(name, "1.14", "py3-none-any"), data=data))
    stack = write_recipe(tmp_path, index.url)
    stack.edit('when = "auto"', "prebuilt = false")
    text = re.sub(
        r"^(PYTORCH_EXTRA\w+) = .*$", r'\1 = "nvidia-nccl-cu12==2.27.5"', stack.recipe.read_text(), flags=re.M
    )
    pins = {"filelock": "1.14", "sympy": "1.14", "nvidia-nccl-cu12": "2.27.5"}
    text += "".join(f'\n[[component]]\nname = "{name}"\nversion = "{pin}"\n' for name, pin in pins.items())
    stack.recipe.write_text(text)
    build(stack)
    stack.build().ok()
    subprocess.run(["tar", "--zstd", "-xf", stack.bundle, "-C", stack.output], check=True)
    torch = stack.output / f"lib/python{PYTHON}/site-packages/torch"
    objects = {path.name: read_elf(path.read_bytes(), path.name) for path in torch.rglob("*.so*")}
    entries = {name: elf.rpath + elf.runpath for name, elf in objects.items()}
    assert entries["libtorch_cuda.so"] == ("$ORIGIN", "$ORIGIN/../../nvidia/nccl/lib")
    assert not [name for name, places in entries.items() for one in places if not one.startswith("$ORIGIN")]
    stack.edit("BUILD_CUSTOM_STEP", "BUILD_OTHER_STEP")  # so without the compiler's OpenMP
    build(stack)
    stack.build().refused(9, "libtorch_cpu.so", "libgomp.so.1 is not found")


def other_python() -> str:
    try:
        return choose_python([minor for minor in ("3.12", "3.11", "3.13", "3.10") if minor != PYTHON]).minor
    except HostError:
        pytest.skip("needs two CPythons")


def test_a_second_python_is_linked_with_the_objects_of_the_first(index: Index, tmp_path: Path) -> None:
    other = other_python()
    stack = write_recipe(tmp_path, index.url, pythons=(PYTHON, other))
    one, two = (build(stack, "--python", minor) for minor in (PYTHON, other))
    assert len(one.compiled()) > 2 * len(AGAIN)
    assert set(two.compiled()) == AGAIN
    assert f"-cp{other.replace('.', '')}-" in two.wheel.name
    assert read_elf(two.read("libc10.so"), "x") == read_elf(one.read("libc10.so"), "x")
    assert two.read("libc10.so") == one.read("libc10.so")
    with zipfile.ZipFile(two.wheel) as wheel:
        assert [name for name in wheel.namelist() if name.startswith("torch/_C.")] == [
            f"torch/_C.cpython-{other.replace('.', '')}-x86_64-linux-gnu.so"
        ]


def test_a_killed_build_goes_on(stack: Stack) -> None:
    process = stack.start([*stack.words(output=False, command="wheel")[:3], *words(stack)])
    (log,) = wait_for(lambda: [one for one in stack.store.glob("logs/*.log") if len(compiled(one)) > 1])
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    before = compiled(log)
    done = stack.compose(*words(stack)).ok()
    assert "goes on with the source of an earlier run" in done.err
    after = compiled(log)[len(before) :]
    assert "c10/core.cpp" not in after
    assert set(after) | set(before) >= AGAIN


def wait_for(condition: Any, seconds: float = 100.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(stack: Stack, code: int, *told: str, sm: str = "90") -> None:
    stack.compose(*words(stack, sm=sm)).refused(code, *told)
    assert not list(stack.store.rglob("*.whl"))
    assert not list(stack.store.glob("builds/*/source"))


def test_a_source_with_another_digest(stack: Stack) -> None:
    (stack.home / "pytorch-v2.9.1.tar.gz").write_bytes(archive({"version.txt": "2.9.1a0\n"}))
    refused(stack, 4, "not the one with this sha256", "build.path")


def test_a_patch_that_does_not_fit_exactly(stack: Stack) -> None:
    patch = stack.home / "patches/torch/line.patch"
    patch.parent.mkdir(parents=True)
    patch.write_text(PATCH)
    stack.edit('when = "auto"', 'when = "auto"\npatches = ["torch/line.patch"]')
    stack.compose(*words(stack)).refused(2, "torch/line.patch", "c10/core.cpp", "does not fit")
    assert not list(stack.store.glob("builds/*/source"))


@pytest.mark.parametrize(("key", "told"), [("memory", "too little memory"), ("disk", "too little disk")])
def test_a_machine_that_is_too_small(stack: Stack, key: str, told: str) -> None:
    stack.edit(f"{key} = 1_000_000", f"{key} = 1_000_000_000_000_000")
    refused(stack, 10, told, "1000000.0")


@pytest.mark.parametrize(("cuda", "sm", "needs"), [("12.8", "103", "CUDA 12.9 or newer"), ("13.0", "61", "12.9")])
def test_an_architecture_that_the_cuda_release_cannot_emit(
    cuda: str, sm: str, needs: str, index: Index, tmp_path: Path
) -> None:
    stack, before = write_recipe(tmp_path, index.url, cuda=cuda), len(index.requests)
    refused(stack, 2, f"CUDA {cuda} has no code for sm_{sm}", needs, sm=sm)
    assert len(index.requests) == before


def test_no_toolchain_is_one_error_before_anything_is_asked_for(index: Index, tmp_path: Path) -> None:
    stack, before = write_recipe(tmp_path, index.url, cuda="12.1"), len(index.requests)
    refused(stack, 10, "no toolchain for CUDA 12.1 and sm_90", "cuda-toolkit-12-1", "No package index")
    assert len(index.requests) == before


def test_a_source_that_cannot_be_reached_is_named(index: Index, tmp_path: Path) -> None:
    """Everything until there is decided: toolchain, requirements with digests, and what it would be told."""
    toolkit = write_toolkit(tmp_path / "cuda-12.8", "12.8.93", (75, 80, 90))
    stack = write_recipe(tmp_path, index.url, cuda="12.8")
    found = re.search(r'^path = .*\nsha256 = "(.*)"$', stack.recipe.read_text(), re.MULTILINE)
    assert found
    stack.edit(found[0], f'url = "https://127.0.0.1:9/pytorch-v2.9.1.tar.gz"\nsha256 = "{found[1]}"')
    stack.extra["CUDA_HOME"] = str(toolkit)  # type: ignore[index]
    stack.compose(*words(stack)).refused(4, "https://127.0.0.1:9/pytorch-v2.9.1.tar.gz: cannot be asked for")
    assert not list(stack.store.glob("builds/*"))
    lock = (stack.home / f"pylock.small-build-torch-py{PYTHON.replace('.', '')}-x86_64.toml").read_text()
    assert 'name = "nvidia-cudnn-cu12"\nversion = "9.10.2.21"' in lock
