"""How the shipped recipe builds PyTorch: what each target is told, and that what it says agrees with itself."""

from __future__ import annotations

import re

import pytest
from packaging.requirements import Requirement

from composer.model.source import Build, Values, local_version
from composer.model.target import Target
from composer.steps.load import data_root, load_recipe, load_targets
from composer.steps.sourcing import _made_for_others
from tests.torch_trees import shipped

TARGETS = load_targets()
#: As PyTorch spells them in TORCH_CUDA_ARCH_LIST.
SPELLED = {61: "6.1", 75: "7.5", 80: "8.0", 86: "8.6", 87: "8.7", 89: "8.9", 90: "9.0", 100: "10.0", 103: "10.3",
           110: "11.0", 120: "12.0", 121: "12.1"}  # fmt: skip
REQUIRED = "PYTORCH_EXTRA_INSTALL_REQUIREMENTS"


def told(sms: tuple[int, ...], isa: str = "avx512") -> dict[str, str]:
    """The variables of a build, filled."""
    build = shipped().for_target(sms, isa)
    values = Values(flags=TARGETS.isa[isa].flags, sms=sms, cuda="12.8", version="2.9.1+sm90", jobs=4, folder="/b")
    return {name: values.fill(text) for name, text in build.environment.items()}


def linked(sms: tuple[int, ...]) -> dict[str, Requirement]:
    """What the built wheel will require, by name."""
    found = [Requirement(text) for text in told(sms)[REQUIRED].split("|")]
    assert len({one.name for one in found}) == len(found)
    return {one.name: one for one in found}


def left_out(build: Build) -> set[str]:
    return {name for one in build.without for name in one.names}


@pytest.mark.parametrize("sm", sorted(map(int, TARGETS.sm)))
def test_the_architectures_of_every_gpu(sm: int) -> None:
    assert told((sm,))["TORCH_CUDA_ARCH_LIST"] == SPELLED[sm]


def test_the_architectures_of_all() -> None:
    build = shipped()
    assert told(build.all)["TORCH_CUDA_ARCH_LIST"] == "7.5;8.0;8.6;8.9;9.0;10.0;12.0"
    assert told(build.all)["USE_FLASH_ATTENTION"] == "1"
    assert str(local_version("2.9.1", build, sms=build.all, isa="avx512")) == "2.9.1+all.avx512"


@pytest.mark.parametrize("isa", TARGETS.isa)
def test_the_flags_of_every_instruction_set(isa: str) -> None:
    found = told((90,), isa)
    flags = " ".join(TARGETS.isa[isa].flags)
    assert found["CFLAGS"] == found["CXXFLAGS"] == f"{flags} -ffile-prefix-map=/b=."
    assert found["USE_NATIVE_ARCH"] == "0"
    label = isa.replace("-", ".").replace("_", ".")
    assert str(local_version("2.9.1", shipped(), sms=(90,), isa=isa)) == f"2.9.1+sm90.{label}"


@pytest.mark.parametrize("isa", [name for name, one in TARGETS.isa.items() if one.machine == "aarch64"])
def test_no_library_for_x86_is_asked_for_elsewhere(isa: str) -> None:
    found = told((90,), isa)
    assert (found["BLAS"], found["USE_STATIC_MKL"]) == ("Eigen", "0")
    mkl = [one for one in map(Requirement, shipped().requires) if one.name.startswith("mkl-")]
    assert mkl
    assert not any(one.marker and one.marker.evaluate({"platform_machine": "aarch64"}) for one in mkl)
    assert all(one.marker and one.marker.evaluate({"platform_machine": "x86_64"}) for one in mkl)


def test_nothing_that_needs_avx2_to_run_is_built_in() -> None:
    off = ("USE_FBGEMM", "USE_NNPACK", "USE_XNNPACK", "USE_PYTORCH_QNNPACK")
    assert {told((90,), "avx")[name] for name in off} == {"0"}


def test_pascal_has_neither_cudnn_nor_flash_attention() -> None:
    found = told((61,))
    assert (found["USE_CUDNN"], found["USE_FLASH_ATTENTION"]) == ("0", "0")
    assert linked((90,)).keys() - linked((61,)).keys() == {"nvidia-cudnn-cu12"}
    assert linked((61,)).keys() <= linked((90,)).keys()
    assert {name: str(one) for name, one in linked((61,)).items()}.items() <= {
        name: str(one) for name, one in linked((90,)).items()
    }.items()
    assert "nvidia-cudnn-cu12" in left_out(shipped().for_target((61,), "avx2"))


def test_flash_attention_where_a_gpu_can_run_it() -> None:
    assert told((75,))["USE_FLASH_ATTENTION"] == "0"
    assert told((75,))["USE_CUDNN"] == "1"
    assert told((75, 80))["USE_FLASH_ATTENTION"] == "1"


def test_a_switch_that_is_off_is_no_requirement() -> None:
    libraries = {"USE_CUFILE": "cufile", "USE_CUSPARSELT": "cusparselt", "USE_NVSHMEM": "nvshmem", "USE_CUDSS": "cudss",
                 "USE_CUDNN": "cudnn", "USE_NCCL": "nccl", "USE_KINETO": "cuda-cupti"}  # fmt: skip
    for sms in ((61,), (75,), (90,)):
        found, names = told(sms), linked(sms).keys()
        for switch, library in libraries.items():
            assert (f"nvidia-{library}-cu12" in names) == (found[switch] == "1"), (sms, switch)


def test_what_is_left_out_is_not_required() -> None:
    for sms in ((61,), (90,)):
        assert not left_out(shipped().for_target(sms, "avx512")) & linked(sms).keys()


@pytest.mark.parametrize("python", ["311", "312", "313"])
def test_the_requirements_are_the_pins_of_the_lock(python: str) -> None:
    """What it is built with and what it requires are the versions that it is served with."""
    text = (data_root() / f"recipes/pylock.sglang-py{python}-x86_64.toml").read_text()
    locked = dict(re.findall(r'^name = "([^"]+)"\nversion = "([^"]+)"', text, re.MULTILINE))
    for name, one in linked((90,)).items():
        assert str(one.specifier) == f"=={locked[name]}"
    for one in map(Requirement, shipped().requires):
        if one.name.startswith("nvidia-"):
            assert str(one.specifier) == f"=={locked[one.name]}"


def test_what_upstream_refuses_or_would_download_is_not_set() -> None:
    found = told((90,))
    assert "CMAKE_INSTALL_PREFIX" not in found
    assert found["USE_SYSTEM_NCCL"] == "1"  # else setup.py clones NCCL
    assert found["USE_XPU"] == "0"  # else a SYCL compiler on the machine has it clone torch-xpu-ops
    assert found["PYTORCH_BUILD_VERSION"]
    assert found["PYTORCH_BUILD_NUMBER"] == "0"


def test_the_version_is_the_components() -> None:
    component = load_recipe("sglang").recipe.component_of("torch")
    assert component.version == "2.9.1"
    assert shipped().environment["PYTORCH_BUILD_VERSION"] == "{version}"
    url, sha256 = shipped().release("2.9.1")
    assert url == "https://github.com/pytorch/pytorch/releases/download/v2.9.1/pytorch-v2.9.1.tar.gz"
    assert sha256.startswith("e17504700ebc")
    assert shipped().release("2.13.0")[0].endswith("/v2.13.0/pytorch-v2.13.0.tar.gz")


@pytest.mark.parametrize(
    ("label", "sms", "fits"),
    [
        ("sm80.sm90.avx512", (80, 90), True), ("sm80.sm90.avx512", (90,), True), ("all.avx512", (80, 90), True),
        ("cu128", (80, 90), True), ("sm90.avx512", (80, 90), False), ("sm80.sm90.avx2", (80, 90), False),
        ("sm80.sm90", (80, 90), False),
    ],
)  # fmt: skip
def test_a_given_wheel_is_for_all_gpus_of_the_bundle(label: str, sms: tuple[int, ...], fits: bool) -> None:
    torch = load_recipe("sglang").recipe.component_of("torch")
    target = Target(sms=sms, isa="avx512", cuda="12.8", python="3.12")
    fault = _made_for_others(f"torch-2.9.1+{label}-cp312-cp312-linux_x86_64.whl", torch, target)
    assert (fault is None) == fits
    assert fits or f"it was built for {label}" in str(fault)
