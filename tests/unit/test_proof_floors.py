"""The oldest host that runs a bundle, by its files; and a host compared with it."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import pytest

from composer.errors import ElfError, HostError
from composer.formats.elf import Elf
from composer.formats.notes import minimum_kernel
from composer.model.manifest import Floor, Manifest
from composer.model.target import Drivers
from composer.proofs.floors import check_host, cpu_floor, host_floors, render_floors, sm_floor
from composer.runtime import floors as runtime
from composer.runtime import gpu
from composer.steps import host as step
from composer.steps.load import load_targets
from tests.shared_objects import gcc, library

DRIVERS = Drivers(source="a test", compatible={"12": "525", "13": "580"}, native={"12.8": "570", "13.0": "580"})


def elf(soname: str | None = None, *wants: str) -> Elf:
    needed = {"libc.so.6": frozenset(wants)} if wants else {}
    return Elf(machine="x86_64", bits=64, kind="shared", soname=soname, dynamic=True, size=1, versions_needed=needed)


def floors(objects: dict[str, Elf], cuda: str = "12.8", **facts: object) -> dict[str, tuple[str, str]]:
    known = {"kernels": {}, **facts}
    found = host_floors(objects, DRIVERS, cuda=cuda, **known)  # type: ignore[arg-type]
    return {name: (one.version, one.because) for name, one in found.items()}


# --- C libraries ------------------------------------------------------------------------------------------------------


def test_versions_are_numbers_and_the_fallback_does_not_count() -> None:
    objects = {
        "b.so": elf(None, "GLIBC_2.4", "GLIBC_2.28", "GLIBCXX_3.4.9"),
        "a.so": elf(None, "GLIBCXX_3.4.22", "CXXABI_1.3.11"),
        "lib/fallback/libstdc++.so.6": elf(None, "GLIBC_2.36"),
    }  # fmt: skip
    assert floors(objects) == {
        "glibc": ("2.28", "b.so"), "libstdc++ GLIBCXX": ("3.4.22", "a.so"), "libstdc++ CXXABI": ("1.3.11", "a.so"),
    }  # fmt: skip


def test_a_tree_that_asks_for_nothing() -> None:
    assert floors({"a.so": elf()}) == {}


# --- kernel -----------------------------------------------------------------------------------------------------------


def test_the_note_of_a_program_is_readelfs(tmp_path: Path) -> None:
    gcc("-o", tmp_path / "program", source="int main(void) { return 0; }")
    notes = subprocess.run(["readelf", "-n", tmp_path / "program"], capture_output=True, text=True, check=True).stdout
    expected = re.search(r"OS: Linux, ABI: (\d+)\.(\d+)\.(\d+)", notes)
    assert expected
    assert minimum_kernel((tmp_path / "program").read_bytes(), "x") == tuple(map(int, expected.groups()))


def test_a_library_has_none(tmp_path: Path) -> None:
    assert minimum_kernel(library(tmp_path / "lib.so").read_bytes(), "x") is None


def _note(name: bytes, kind: int, *words: int, align: int = 4, size: int | None = None) -> bytes:
    body = struct.pack(f"<{len(words)}I", *words)
    head = struct.pack("<3I", len(name), len(body) if size is None else size, kind) + name
    return head.ljust(-(-len(head) // align) * align, b"\0") + body.ljust(-(-len(body) // align) * align, b"\0")


TAG = _note(b"GNU\0", 1, 0, 4, 18, 0)


def _object(notes: bytes, align: int = 4) -> bytes:
    """An ELF header and one PT_NOTE."""
    header = struct.pack("<4s5B7x2HI3QI6H", b"\x7fELF", 2, 1, 1, 0, 0, 3, 62, 1, 0, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    return header + struct.pack("<2I6Q", 4, 4, 120, 0, 0, len(notes), len(notes), align) + notes


@pytest.mark.parametrize(
    ("notes", "align", "kernel"),
    [
        (TAG, 4, (4, 18, 0)), (_note(b"GNU\0", 3, 1, 2, 3, 4) + TAG, 4, (4, 18, 0)),
        (_note(b"GNU\0", 5, 1, 2, 3, align=8) + _note(b"GNU\0", 1, 0, 5, 4, 0, align=8), 8, (5, 4, 0)),
        (_note(b"GNU\0", 1, 2, 4, 18, 0), 4, None),  # another system
        (_note(b"ELF\0", 1, 0, 4, 18, 0), 4, None), (_note(b"GNU\0", 1, 0, 4), 4, None),
        (_note(b"GNU\0", 1, 0, 4, 18, 0, size=1 << 31), 4, None),
        (struct.pack("<3I", 0xFFFFFFFF, 16, 1) + TAG, 4, None), (b"X" * 512, 4, None), (b"", 4, None),
        (TAG, 1, (4, 18, 0)), (TAG, 16, None),
        (_note(b"", 9) * 1000 + TAG, 4, None),
    ],
)  # fmt: skip
def test_notes(notes: bytes, align: int, kernel: tuple[int, int, int] | None) -> None:
    assert minimum_kernel(_object(notes, align), "x") == kernel


def test_no_elf() -> None:
    with pytest.raises(ElfError):
        minimum_kernel(b"#!/bin/sh\n" * 10, "x")


def test_the_newest_kernel_sets_the_floor() -> None:
    kernels = {"bin/a": (2, 6, 32), "bin/b": (3, 2, 0), "bin/c": (3, 2, 0), "lib/fallback/x": (9, 0, 0)}
    assert floors({}, kernels=kernels) == {"kernel": ("3.2.0", "bin/b")}


# --- driver -----------------------------------------------------------------------------------------------------------

CUDART = {"x/libcudart.so.12": elf("libcudart.so.12"), "y/libcudart-1a.so.12": elf("libcudart.so.12")}


def test_minor_version_compatibility() -> None:
    assert floors(CUDART) == {
        "driver": ("525", "x/libcudart.so.12"), "CUDA": ("12.0", "x/libcudart.so.12"),
        "driver (native)": ("570", "x/libcudart.so.12"),
    }  # fmt: skip


def test_ptx_needs_the_branch_of_its_cuda() -> None:
    assert floors(CUDART, ptx=["k.so", "l.so"]) == {"driver": ("570", "k.so"), "CUDA": ("12.8", "k.so")}


@pytest.mark.parametrize(
    ("objects", "cuda", "driver"),
    [
        ({"a": elf("libcublas.so.13"), "b": elf("libcudart.so.12")}, "12.8", ("580", "a")),
        ({"b": elf("libcublas.so.12")}, "12.1", ("525", "b")),
        ({"b": elf("libcublasLt.so.12"), "c": elf("libcudart.so.12.8")}, "12.8", None),
        ({"b": elf("libcudart.so.99")}, "99.0", None), ({}, "12.8", None),
    ],
)  # fmt: skip
def test_the_cuda_of_a_tree(objects: dict[str, Elf], cuda: str, driver: tuple[str, str] | None) -> None:
    found = floors(objects, cuda)
    assert found.get("driver") == driver
    assert ("CUDA" in found) == (driver is not None)


# --- what is known without files --------------------------------------------------------------------------------------


def test_the_cpu_counts_where_something_was_built_for_it() -> None:
    assert cpu_floor(["avx2", "fma"], []) == {}
    assert cpu_floor(["avx2", "fma"], ["torch", "a"]) == {"CPU": Floor(version="avx2 fma", because="a, torch")}


def test_gpus() -> None:
    assert sm_floor([90], ["a.so", "b.so"], ptx=False) == {"SM": Floor(version="90", because="a.so")}
    assert sm_floor([80, 90], ["a.so"], ptx=True)["SM"].version == "80+PTX 90+PTX"
    assert sm_floor([90], [], ptx=False) == {}


def test_every_instruction_set_names_features_that_its_flags_stand_for() -> None:
    """GCC calls a feature avx512vnni and Linux avx512_vnni."""
    for name, isa in load_targets().isa.items():
        known = {one.replace("_", "") for one in isa.features}
        plain = [flag.removeprefix("-m") for flag in isa.flags if "=" not in flag]
        assert isa.features, name
        assert set(plain) <= known, name


# --- a host -----------------------------------------------------------------------------------------------------------

FLOORS = {
    "glibc": Floor(version="2.28", because="a.so"), "kernel": Floor(version="3.2.0", because="bin/python"),
    "CPU": Floor(version="avx2 fma", because="torch"), "driver": Floor(version="525", because="b.so"),
    "CUDA": Floor(version="12.0", because="b.so"), "libstdc++ CXXABI": Floor(version="1.3.11", because="c.so"),
    "driver (native)": Floor(version="570", because="b.so"), "SM": Floor(version="90", because="d.so"),
}  # fmt: skip


def test_the_text_form_is_what_the_runtime_reads() -> None:
    text = render_floors("small-sm90", FLOORS).decode()
    assert text.startswith("small-sm90\nglibc\t2.28\ta.so\n")
    assert runtime.parse(text) == {name: (one.version, one.because) for name, one in FLOORS.items()}


def test_a_host_below_every_floor() -> None:
    old = {
        "glibc": "2.17",
        "kernel": "2.6.32-754.el6.x86_64",
        "CPU": "sse2 avx2",
        "driver": "470.199.02",
        "CUDA": "11.4",
    }
    found = check_host(FLOORS, old)
    assert [(one.id, one.severity, one.subject) for one in found] == [
        ("floors.glibc", "error", "a.so"), ("floors.kernel", "error", "bin/python"), ("floors.cpu", "error", "torch"),
        ("floors.driver", "error", "b.so"),
    ]  # fmt: skip
    assert found[0].evidence == "the bundle needs glibc 2.28; this host has 2.17"
    assert found[0].fix == "Use a host with glibc 2.28 or newer."


@pytest.mark.parametrize(
    "host",
    [
        {}, {"glibc": "2.28", "kernel": "3.2", "CPU": "avx2 fma", "driver": "525.60.13"},
        {"driver": "470.199.02", "CUDA": "12.0"}, {"glibc": "", "driver": ""},
    ],
)  # fmt: skip
def test_a_host_that_will_do(host: dict[str, str]) -> None:
    assert check_host(FLOORS, host) == ()


def manifest(**floors: str) -> Manifest:
    return Manifest(
        name="small-sm90", fingerprint="", composer="", recipe={}, lock="", target={"machine": "x86_64"}, python="",
        interpreter="", torch="", serve=None, checks=[], left_out=[], warnings=[], layers=[],
        floors={name: Floor(version=version, because="a.so") for name, version in floors.items()},
    )  # fmt: skip


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What NVML shows of this host."""
    present: list[tuple[str, int]] = []
    monkeypatch.setattr(gpu, "gpus", lambda: present)
    monkeypatch.setattr(step.os, "uname", lambda: type("Uname", (), {"machine": "x86_64"}))
    monkeypatch.setattr(runtime, "_kernel", lambda: "6.1.0")
    return present


def test_unpacking_on_a_host_that_is_too_old(gpus: list[tuple[str, int]]) -> None:
    with pytest.raises(HostError, match=r"(?s)2 faults.*needs glibc 99.*why: a\.so.*--any-host.*needs Linux 99"):
        step.require_host(manifest(glibc="99", kernel="99"))


def test_unpacking_on_another_machine(gpus: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step.os, "uname", lambda: type("Uname", (), {"machine": "aarch64"}))
    with pytest.raises(HostError, match="is a bundle for x86_64, this host is aarch64"):
        step.require_host(manifest())


@pytest.mark.parametrize(
    ("present", "floor", "fits"),
    [
        ([], "90", True), ([("H100", 90)], "90", True), ([("A100", 80)], "90", False), ([("A10", 86)], "80", True),
        ([("A100", 80), ("H100", 90)], "90", True), ([("B200", 100)], "90+PTX", True), ([("A100", 80)], "80 90", True),
        ([("A100", 80)], None, True),
    ],
)  # fmt: skip
def test_unpacking_beside_other_gpus(gpus: list[tuple[str, int]], present: list[tuple[str, int]], floor: str | None,
                                     fits: bool) -> None:  # fmt: skip
    gpus += present
    asked = manifest(SM=floor) if floor else manifest()
    if fits:
        step.require_host(asked)
    else:
        with pytest.raises(HostError, match=r"GPU code for SM 90; this host has A100 \(SM 80\)"):
            step.require_host(asked)
