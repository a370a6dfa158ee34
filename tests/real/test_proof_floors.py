"""Floors of real wheels, and the tables behind them against their facts, found as in test_proof_coverage."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from composer.formats.cubin import Cubin
from composer.formats.elf import Elf, read_elf
from composer.formats.notes import minimum_kernel
from composer.proofs.floors import host_floors
from composer.steps.load import load_targets
from composer.steps.objects import objects
from composer.store import Store

pytestmark = pytest.mark.real

_FACTS = Path(os.environ.get("WHEEL_COMPOSER_FACTS", Path(__file__).resolve().parents[3] / "shared/facts"))


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    path = _FACTS / "targets.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _floors(*names: str, **more: Any) -> dict[str, tuple[str, str]]:
    elfs: dict[str, Elf] = {}
    kernels: dict[str, tuple[int, int, int]] = {}
    for name in names:
        wheels = sorted(Store().artifacts.glob(f"*/*/{name}-*.whl"))
        assert wheels, f"no wheel of {name} in the store: run `compose fetch --sm 90 --isa avx512`"
        for path, _, content in objects(wheels[0]):
            if not isinstance(content, Cubin):
                elfs[path] = read_elf(content, path)
                if found := minimum_kernel(content, path):
                    kernels[path] = found
    found = host_floors(elfs, load_targets().driver, cuda="12.8", kernels=kernels, **more)
    return {name: (one.version, one.because.rpartition("/")[2]) for name, one in found.items()}


def test_a_tag_is_not_believed() -> None:
    """It says manylinux2014, which is glibc 2.17."""
    floors = _floors("sgl_kernel")
    assert floors["glibc"] == ("2.27", "common_ops.abi3.so")
    assert set(floors) == {"glibc", "libstdc++ GLIBCXX", "libstdc++ CXXABI"}


def test_cuda_and_its_compiler(facts: dict[str, Any]) -> None:
    known = facts["driver_floor"]
    floors = _floors("nvidia_cuda_runtime_cu12", "triton")
    assert floors["driver"] == (known["minor_version_compat"]["12.x"], "libcudart.so.12")
    assert floors["CUDA"] == ("12.0", "libcudart.so.12")
    assert floors["driver (native)"] == (known["nvidia_branch_native"]["12.8"], "libcudart.so.12")
    assert floors["kernel"] == ("3.2.0", "FileCheck")
    assert _floors("nvidia_cuda_runtime_cu12", ptx=["x.so"])["driver"] == (
        known["nvidia_branch_native"]["12.8"],
        "x.so",
    )


def test_the_table_of_drivers(facts: dict[str, Any]) -> None:
    known, ours = facts["driver_floor"], load_targets().driver
    assert ours.native == known["nvidia_branch_native"]
    assert {f"{major}.x": branch for major, branch in ours.compatible.items()} == known["minor_version_compat"]


def test_the_features_of_instruction_sets(facts: dict[str, Any]) -> None:
    ours = load_targets().isa
    for name, known in facts["isas"].items():
        assert (ours[name].machine, list(ours[name].flags)) == (known["arch"], known["flags"]), name
        missing = set(known["cpu_features"]) - set(ours[name].features)
        assert not missing, name
