"""The shipped lanes on the real index: each plans for what it claims, and the forward lane builds with every proof."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from composer.steps.load import load_recipe

pytestmark = pytest.mark.real

COMPOSE = Path(__file__).resolve().parents[2] / "scripts/compose"
ISA = {"x86_64": "avx2", "aarch64": "armv8_2"}
#: The lane, the machine, overlays, and more options. The machine that runs the tests needs no CPython for AArch64.
LANES = [
    ("sglang", "x86_64", (), ()), ("sglang", "x86_64", ("sm120",), ()), ("sglang:0.5.23", "x86_64", (), ()),
    ("sglang:0.5.23", "aarch64", (), ("--python", "host")), ("vllm:0.15.1", "x86_64", (), ()),
]  # fmt: skip


def compose(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMPOSE, *words], capture_output=True, text=True)


@pytest.mark.parametrize(("name", "machine", "overlays", "more"), LANES)
def test_a_lane_plans_for_what_it_claims(
    name: str, machine: str, overlays: tuple[str, ...], more: tuple[str, ...]
) -> None:
    loaded = load_recipe(name, overlays, machine)
    lock = loaded.lock_path(loaded.recipe.pythons[0], machine).name
    chosen = [word for one in overlays for word in ("--overlay", one)]
    for sm in loaded.recipe.sm:
        done = compose("plan", "--recipe", name, "--sm", str(sm), "--isa", ISA[machine], "--locked",
                       "--torch", "wheel", *chosen, *more)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"-sm{sm}-" in done.stdout
        assert lock in done.stdout


@pytest.mark.parametrize("sm", ["90", "120"])
def test_the_forward_lane_builds_and_verifies(sm: str, tmp_path: Path) -> None:
    built = compose("build", "--recipe", "sglang-forward", "--sm", sm, "--isa", "avx512", "--torch", "wheel",
                    "--compress", "fast", "--locked", "-o", tmp_path)  # fmt: skip
    assert built.returncode == 0, built.stderr
    (bundle,) = tmp_path.glob("*.tar.zst")
    assert bundle.name == f"sglang-python312-cuda13_0-sm{sm}-avx512.tar.zst"
    checked = compose("verify", bundle)
    assert checked.returncode == 0, checked.stdout + checked.stderr
