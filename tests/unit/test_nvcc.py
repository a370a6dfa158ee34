"""What a CUDA toolkit says of itself."""

from __future__ import annotations

import pytest

from composer.errors import HostError, RecipeError
from composer.formats.nvcc import (
    CompilerVersion,
    HostLimits,
    Release,
    driver_functions,
    parse_compiler,
    parse_gpu_codes,
    parse_host_limits,
    parse_release,
)
from composer.model.toolchain import Span, parse_toolchains, release_key
from tests.toolkits import CUDA_H, host_config

LIMITS = HostLimits(gcc_newest=13, clang_oldest=3, clang_newest=17)
VERSION_13 = """\
nvcc: NVIDIA (R) Cuda compiler driver
Copyright (c) 2005-2025 NVIDIA Corporation
Built on Wed_Aug_20_01:58:59_PM_PDT_2025
Cuda compilation tools, release 13.0, V13.0.88
Build cuda_13.0.r13.0/compiler.36424714_0
"""


def test_release():
    assert parse_release(VERSION_13, "nvcc") == Release(cuda="13.0", version="13.0.88")


@pytest.mark.parametrize("text", ["", "nvcc: NVIDIA (R) Cuda compiler driver", "gcc (Debian) 12.2.0", "release x, Vy"])
def test_no_release(text):
    with pytest.raises(HostError, match="does not tell its release"):
        parse_release(text, "nvcc")


def test_gpu_codes_are_those_of_machines_in_order():
    assert parse_gpu_codes("compute_75\nsm_75\nsm_110\nsm_103\nsm_90\nsm_90a\n", "nvcc") == (75, 90, 103, 110)


def test_no_gpu_codes():
    with pytest.raises(HostError, match="does not tell its GPU architectures"):
        parse_gpu_codes("compute_75\nnvcc fatal : unknown option", "nvcc")


def test_host_limits_are_the_conditions_of_the_header():
    assert parse_host_limits(host_config(13, 18), "h") == LIMITS


@pytest.mark.parametrize(
    "text",
    [
        "",
        "#error -- unsupported GNU version!\n",
        host_config().replace("unsupported clang version!", "unsupported!"),
        host_config().replace("__GNUC__ > 13", "TOO_NEW"),
        host_config().replace("__clang_major__ >= 18", "0"),
    ],
)
def test_unknown_host_limits_are_an_error(text):
    with pytest.raises(HostError, match=r"which (GNU|clang) versions|unknown form"):
        parse_host_limits(text, "crt/host_config.h")


@pytest.mark.parametrize(
    ("family", "major", "takes"),
    [("gcc", 13, True), ("gcc", 14, False), ("clang", 17, True), ("clang", 18, False), ("clang", 2, False)],
)
def test_limits_include_their_ends(family, major, takes):
    assert LIMITS.takes(family, major) is takes


def test_clang_claims_to_be_gcc_and_is_not():
    macros = (
        "#define __GNUC__ 4\n#define __clang_major__ 16\n#define __clang_minor__ 0\n#define __clang_patchlevel__ 6\n"
    )
    assert parse_compiler(macros, "c++") == CompilerVersion(family="clang", major=16, full="16.0.6")
    assert parse_compiler("#define __GNUC__ 12\n#define __GNUC_MINOR__ 2\n", "c++").full == "12.2.0"


def test_another_compiler():
    with pytest.raises(HostError, match="neither gcc nor clang"):
        parse_compiler("#define __TINYC__ 928\n", "tcc")


def test_driver_functions_have_all_their_names():
    names = (
        "cuInit",
        "cuMemAlloc",
        "cuMemAllocAsync",
        "cuMemAllocAsync_ptsz",
        "cuMemAlloc_v2",
        "cuMemcpy",
        "cuMemcpy_ptds",
    )
    assert driver_functions(CUDA_H) == names


@pytest.mark.parametrize(
    ("cuda", "old", "new"), [("12.8", True, False), ("12.9", True, True), ("12.10", False, True), ("13.0", False, True)]
)
def test_spans_include_their_ends_and_compare_numbers(cuda, old, new):
    assert Span(since="8.0", until="12.9").has(cuda) is old
    assert Span(since="12.9").has(cuda) is new


@pytest.mark.parametrize("cuda", ["", "12", "12.x", "12.8.1", "cu128", "１2.8"])
def test_not_a_release(cuda):
    with pytest.raises(RecipeError, match="not a CUDA release"):
        release_key(cuda)


def test_a_wrong_file_names_the_place():
    with pytest.raises(RecipeError) as caught:
        parse_toolchains({"toolchain": {}, "sm": {"61": {"since": "8.0", "untill": "12.9"}}}, "toolchains.toml")
    assert "sm.61.untill" in str(caught.value)
