"""The shipped lanes on the real index: each plans for what it claims, and the forward lane builds with every proof."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from composer.steps.load import load_recipe

pytestmark = pytest.mark.real

COMPOSE = Path(__file__).resolve().parents[2] / "scripts/compose"
ISA = {"x86_64": "avx2", "aarch64": "armv8_2"}
#: The recipe and what is given beside it. The machine that runs the tests needs no CPython for AArch64.
LANES = [
    ("sglang", ()), ("sglang", ("--overlay", "sm120")), ("sglang-forward", ()),
    ("sglang-forward-aarch64", ("--python", "host")), ("vllm", ()),
]  # fmt: skip


def compose(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMPOSE, *words], capture_output=True, text=True)


@pytest.mark.parametrize(("name", "more"), LANES)
def test_a_lane_plans_for_what_it_claims(name: str, more: tuple[str, ...]) -> None:
    recipe = load_recipe(name, more[1:] if "--overlay" in more else ()).recipe
    for sm in recipe.sm:
        done = compose("plan", "--recipe", name, "--sm", str(sm), "--isa", ISA[recipe.machines[0]], "--locked",
                       "--torch", "wheel", *more)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"-sm{sm}-" in done.stdout


@pytest.mark.parametrize("sm", ["90", "120"])
def test_the_forward_lane_builds_and_verifies(sm: str, tmp_path: Path) -> None:
    built = compose("build", "--recipe", "sglang-forward", "--sm", sm, "--isa", "avx512", "--torch", "wheel",
                    "--compress", "fast", "--locked", "-o", tmp_path)  # fmt: skip
    assert built.returncode == 0, built.stderr
    (bundle,) = tmp_path.glob("*.tar.zst")
    assert bundle.name == f"sglang-python312-cuda13_0-sm{sm}-avx512.tar.zst"
    checked = compose("verify", bundle)
    assert checked.returncode == 0, checked.stdout + checked.stderr
