"""`compose isa` on files, folders, wheels and bundles."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from composer.steps.isa import list_instructions
from tests.shared_objects import library
from tests.wheels import build_wheel, wheel_filename

COMPOSE = Path(sys.executable).parent / "compose"
WIDE = '__asm__(".text\\n vaddps %zmm1, %zmm0, %zmm0\\n vaddps %ymm1, %ymm0, %ymm0\\n");'
NARROW = '__asm__(".text\\n addps %xmm1, %xmm0\\n");'
DISPATCH = '__asm__(".text\\n cpuid\\n vaddps %zmm1, %zmm0, %zmm0\\n");'
FLAGS = "-mavx512f -fvisibility-inlines-hidden  -O2"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock build: canaries without a vector instruction, and a library that chooses."""
    folder = tmp_path_factory.mktemp("stock")
    library(folder / "lib" / "libc10.so", NARROW)
    library(folder / "lib" / "libtorch_cpu.so", f'{DISPATCH} const char flags[] = "{FLAGS}";')
    (folder / "lib" / "libc10.so.1").symlink_to("libc10.so")
    (folder / "notes.so").write_bytes(b"no object" * 100)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A canary that was compiled with -mavx512f."""
    return library(tmp_path_factory.mktemp("built") / "libc10.so", WIDE)


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMPOSE, "isa", *words], capture_output=True, text=True, check=False)


def test_a_folder(tree: Path) -> None:
    canary, chooser = list_instructions(tree)
    assert (canary.path, canary.role, canary.counts, canary.build_flags) == ("lib/libc10.so", "canary", {}, None)
    assert (chooser.path, chooser.role) == ("lib/libtorch_cpu.so", "dispatch")
    assert chooser.counts == {"avx512f": 1, "cpuid": 1, "evex": 1, "zmm": 1}
    assert chooser.build_flags == FLAGS.replace("  ", " ")


def test_a_wheel(tree: Path, built: Path, tmp_path: Path) -> None:
    wheel = tmp_path / wheel_filename("torch", "2.9.1")
    chooser = (tree / "lib" / "libtorch_cpu.so").read_bytes()
    files = {"torch/lib/libc10.so": built.read_bytes(), "torch/lib/libtorch_cpu.so": chooser}
    wheel.write_bytes(build_wheel("torch", "2.9.1", files))
    found, other = sorted(list_instructions(wheel), key=lambda one: one.path)
    assert other.build_flags == FLAGS.replace("  ", " ")
    assert (found.path, found.machine, found.instructions) == ("torch/lib/libc10.so", "x86_64", 2)
    assert found.counts == {"avx": 1, "avx512f": 1, "evex": 1, "vex": 1, "ymm": 1, "zmm": 1}


def test_an_unsound_object_is_reported_and_the_rest_counted(built: Path, tmp_path: Path) -> None:
    data = built.read_bytes()
    (tmp_path / "cut.so").write_bytes(data[: len(data) // 2])
    (tmp_path / "whole.so").write_bytes(data)
    cut, whole = list_instructions(tmp_path)
    assert cut.fault
    assert not cut.counts
    assert whole.counts["zmm"] == 1


@pytest.mark.parametrize(("isa", "verdict"), [("avx512", "run-time dispatch only"), ("avx2", "not used")])
def test_a_stock_build_is_told_from_a_built_one(tree: Path, isa: str, verdict: str) -> None:
    done = run(tree, "--isa", isa)
    assert done.returncode == 0, done.stderr
    assert f"{isa}: {verdict}" in done.stdout
    assert f"built with {FLAGS.replace('  ', ' ')}" in done.stdout


def test_a_build_for_avx512_is_proven_and_refused_for_avx2(built: Path) -> None:
    assert "avx512: applied\n  libc10.so" in run(built, "--isa", "avx512").stdout
    refused = run(built, "--isa", "avx2")
    assert refused.returncode == 9
    assert "needs more than avx2" in refused.stderr
    assert "libc10.so: avx512f" in refused.stderr


def test_json(built: Path) -> None:
    found = json.loads(run(built, "--isa", "avx512", "--json").stdout)
    assert found["judgement"] == {"verdict": "applied", "witnesses": ["libc10.so"], "excess": {}}
    assert [one["counts"]["zmm"] for one in found["libraries"]] == [1]
    refused = run(built, "--isa", "avx", "--json")
    assert json.loads(refused.stdout)["judgement"]["verdict"] == "needs more than ISA"
    assert refused.returncode == 9


@pytest.mark.parametrize(("words", "code", "said"), [
    (["missing.so"], 10, "missing.so"),
    ([__file__], 9, "neither a shared object"),
    ([".", "--isa", "avx5l2"], 2, "Did you mean 'avx512'"),
])  # fmt: skip
def test_what_is_wrong_is_said(words: list[str], code: int, said: str) -> None:
    done = run(*words)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_without_objects(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert (done.returncode, done.stdout) == (0, "no code for x86-64 or AArch64\n")
