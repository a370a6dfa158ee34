"""What composing for another machine decides without running anything of that machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from composer.errors import ElfError, HostError, RecipeError
from composer.formats.elf import read_elf
from composer.formats.linkage import Linkage, Wanted
from composer.formats.loader import Tree
from composer.formats.stublib import render_stub
from composer.interpreter.foreign import read_python
from composer.model.recipe import Component, Recipe, Refusal, check_recipe
from composer.model.target import Target
from composer.proofs.abi import check_abi
from composer.proofs.closure import check_bundle, check_runtime
from composer.proofs.files import check_machine
from composer.steps.load import load_recipe
from composer.steps.locks import lock_request
from composer.steps.resolve import fits

ARM = read_elf(render_stub("liba.so", ["answer"], 0, "aarch64"), "liba.so")
X86 = read_elf(render_stub("liba.so", ["answer"], 0, "x86_64"), "liba.so")
GRACE = Target(sms=(90,), isa="armv9", cuda="12.8", python="3.12", machine="aarch64")


# --- files ------------------------------------------------------------------------------------------------------------


def test_an_object_for_another_machine_is_an_error_wherever_it_lies() -> None:
    (found,) = check_machine({"lib/a.so": ARM, "share/tool/helper": X86}, "aarch64")
    assert (found.id, found.severity, found.subject) == ("files.machine", "error", "share/tool/helper")
    assert found.evidence == "is for x86_64, the bundle for aarch64"
    assert [one.subject for one in check_machine({"lib/a.so": ARM, "b": X86}, "x86_64")] == ["lib/a.so"]


def test_a_32_bit_library_is_for_another_machine_too() -> None:
    (found,) = check_machine({"a": replace(X86, machine="i386", bits=32)}, "x86_64")
    assert found.evidence == "is for i386 (32 bits), the bundle for x86_64"
    assert check_machine({"a": replace(X86, bits=32)}, "x86_64")


def test_programs_count_and_what_only_a_linker_reads_does_not() -> None:
    program, relocatable = (replace(X86, kind=kind, dynamic=False) for kind in ("executable", "relocatable"))
    assert [one.subject for one in check_machine({"bin/a": program, "a.o": relocatable}, "aarch64")] == ["bin/a"]


@pytest.mark.parametrize("gpu", ["cuda", "amdgpu"])
def test_gpu_code_is_for_no_host(gpu: str) -> None:
    assert check_machine({"a.cubin": replace(X86, machine=gpu, kind="executable")}, "aarch64") == ()


# --- what is left to the host -----------------------------------------------------------------------------------------


def test_a_runtime_without_a_copy_is_the_hosts_and_said_to_be() -> None:
    user = replace(ARM, needed=("libstdc++.so.6", "libz.so.1", "libc.so.6"))
    tree = Tree(objects={"sp/a.so": user, "lib/libz.so.1": replace(ARM, soname="libz.so.1")})
    (found,) = check_runtime(tree)
    assert (found.id, found.severity, found.subject) == ("closure.host-runtime", "warning", "sp/a.so")
    assert found.evidence.startswith("libstdc++.so.6 must be the host's")
    assert check_runtime(Tree(objects={**tree.objects, "lib/fallback/x": replace(ARM, soname="libstdc++.so.6")})) == ()


def test_a_program_may_need_the_hosts_runtime_where_there_is_no_copy() -> None:
    program = replace(ARM, kind="executable", needed=("libgcc_s.so.1",), soname=None)
    assert check_bundle(Tree(objects={"sp/bin/tool": program}), "3.12") == ()
    copy = replace(ARM, soname="libgcc_s.so.1")
    found = check_bundle(Tree(objects={"sp/bin/tool": program, "lib/fallback/libgcc_s.so.1": copy}), "3.12")
    assert "closure.missing" in {one.id for one in found}, "the bundle's own must be found, for hosts without"


@pytest.mark.parametrize("name", ["lround", "llrint", "cosf", "atanhl", "fmod", "log1p", "nexttowardf", "erfc"])
def test_functions_of_libm_need_no_library_named(name: str) -> None:
    def faults(symbol: str) -> list[str]:
        linkage = {"sp/a.so": Linkage(modules=["a"], wanted=[Wanted(symbol)])}
        return [one.id for one in check_abi(Tree(objects={"sp/a.so": ARM}), linkage, "3.12").findings]

    assert faults(name) == []
    assert faults(f"{name}_of_nobody") == ["abi.missing"]


# --- wheels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tag", "fitting"),
    [
        ("cp312-cp312-manylinux_2_28_aarch64", True), ("cp310-abi3-manylinux2014_aarch64", True),
        ("py3-none-any", True), ("py3-none-linux_aarch64", True),
        ("cp312-cp312-manylinux_2_28_x86_64", False), ("cp313-cp313-manylinux_2_28_aarch64", False),
        ("cp313-abi3-manylinux2014_aarch64", False), ("cp312-cp312-musllinux_1_2_aarch64", False),
        ("cp312-cp312-manylinux_2_99_aarch64", False), ("cp312-cp312-macosx_11_0_arm64", False),
    ],
)  # fmt: skip
def test_wheels_that_fit_the_target(tag: str, fitting: bool) -> None:
    assert fits(f"alpha-1.0-{tag}.whl", GRACE.python, GRACE.platforms) == fitting


def recipe(*components: Component) -> Recipe:
    return msgspec.structs.replace(load_recipe("sglang").recipe, component=components, machines=("x86_64", "aarch64"))


@pytest.mark.parametrize(("machine", "locked"), [("x86_64", ["alpha"]), ("aarch64", [])])
def test_an_optional_wheel_is_not_locked_for_a_machine_that_it_is_not_for(machine: str, locked: list[str]) -> None:
    url = "https://example.org/alpha-1.0+cu128-cp39-abi3-manylinux_2_28_x86_64.whl"
    alpha = Component(name="alpha", version="1.0+cu128", url=url, sha256="a" * 64, optional=True)
    request = lock_request(recipe(alpha, Component(name="beta", version="2.0")), "3.12", machine)
    assert [one.name for one in request.url_sources] == locked
    assert request.roots == ("beta==2.0",)


def test_tools_are_asked_for_every_machine() -> None:
    request = lock_request(recipe(Component(name="zig", version="1.0", tool=True)), "3.12", "aarch64")
    assert request.tools == ("zig",)
    assert [platforms[0].partition("9_")[2] for platforms in request.tool_platforms] == ["x86_64", "aarch64"]
    assert {one.rpartition("_")[2] for one in request.platforms} == {"aarch64"}


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_the_parity_lane_says_why_it_has_no_aarch64() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("sglang").recipe.check_target(GRACE)
    assert caught.value.what == "sglang 0.5.9 is not offered for aarch64"
    assert "aarch64 wheels of torch 2.9.1 and torchvision 0.24.1 are for CPUs only" in (caught.value.why or "")


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (Refusal(reason="x"), "must name either `sm` or `machines`"),
        (Refusal(reason="x", sm=(61,), machines=("aarch64",)), "must name either `sm` or `machines`"),
        (Refusal(reason="x", machines=("x86_64",)), "x86_64 is also listed as served"),
        (Refusal(reason="x", sm=(90,)), "90 is also listed as served"),
    ],
)
def test_refusals_that_cannot_be_meant(row: Refusal, fault: str) -> None:
    with pytest.raises(RecipeError, match=fault):
        check_recipe(msgspec.structs.replace(load_recipe("sglang").recipe, refuse=(row,)), "r.toml")


# --- the interpreter --------------------------------------------------------------------------------------------------

SETTINGS = {"ABIFLAGS": "", "PLATLIBDIR": "lib", "SOABI": "cpython-312-aarch64-linux-gnu", "Py_DEBUG": 0}


def installation(prefix: Path, *, program: bytes | None = None, version: str = "3.12.12", **settings: object) -> Path:
    """As much of a CPython for aarch64 as is read of it."""
    files = {
        "bin/python3.12": program or render_stub("python", ["main"], 0, "aarch64"),
        "lib/python3.12/_sysconfigdata__linux_aarch64-linux-gnu.py":
            f"build_time_vars = { {**SETTINGS, **settings}!r}\n".encode(),
        "include/python3.12/patchlevel.h": f'#define PY_VERSION      \t"{version}"\n'.encode(),
    }  # fmt: skip
    for name, data in files.items():
        path = prefix / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return prefix


@pytest.mark.parametrize(
    ("version", "read"), [("3.12.12", "3.12.12"), ("3.12.0rc2", "3.12.0rc2"), ("3.12.4+", "3.12.4")]
)
def test_a_cpython_is_read_where_it_does_not_run(tmp_path: Path, version: str, read: str) -> None:
    found = read_python(installation(tmp_path, version=version), "3.12", "aarch64")
    assert (found.version, found.minor, found.program) == (read, "3.12", tmp_path / "bin/python3.12")
    assert (found.stdlib, found.include) == (tmp_path / "lib/python3.12", tmp_path / "include/python3.12")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"Py_DEBUG": 1}, "it is a debug build"), ({"Py_GIL_DISABLED": 1}, "it is a free-threaded build"),
        ({"PLATLIBDIR": "lib64"}, "its library folder is lib64"),
        ({"SOABI": "cpython-312-musl"}, "it is built for musl"),
        ({"program": render_stub("python", ["main"], 0, "x86_64")}, "a CPython for x86_64, not for aarch64"),
        ({"version": ""}, "does not say which CPython it is of"),
    ],
)  # fmt: skip
def test_a_cpython_that_cannot_be_taken(tmp_path: Path, changes: dict[str, object], fault: str) -> None:
    with pytest.raises(HostError) as caught:
        read_python(installation(tmp_path, **changes), "3.12", "aarch64")
    assert fault in str(caught.value)


def test_an_archive_that_holds_no_cpython(tmp_path: Path) -> None:
    with pytest.raises(ElfError):
        read_python(installation(tmp_path / "a", program=b"#!/bin/sh\n"), "3.12", "aarch64")
    (installation(tmp_path / "b") / "lib/python3.12/_sysconfigdata__linux_aarch64-linux-gnu.py").unlink()
    with pytest.raises(HostError, match="_sysconfigdata__linux_aarch64"):
        read_python(tmp_path / "b", "3.12", "aarch64")
