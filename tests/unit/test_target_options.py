"""What the options of a build say of its target: decided, or refused, before anything is looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from composer.errors import RecipeError
from composer.model.variant import parse_variant
from composer.steps.load import load_targets
from composer.steps.outline import Request, outline
from composer.store import Store

NAME = "sglang-python312-cuda12_8-sm90-avx512"


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        (Request(gpus=["GB200"], isa="avx512"), ["the CPU of GB200 does not run avx512"]),
        (Request(sm="103", isa="avx512"), ["CUDA 12.8 emits no code for SM 103", "cannot serve SM 103"]),
        (Request(sm="61", isa="avx2"), ["SGLang only supports sm75 and above"]),
        (Request(sm="87", isa="avx2"), ["the CPU of Orin does not run avx2", "cannot serve SM 87"]),
        (Request(sm="61", isa="armv9"), ["cannot serve SM 61", "is not offered for aarch64"]),
        (Request(variant=NAME, sm="80"), ["--sm says SM 80, --variant says SM 90"]),
        (Request(variant=NAME.replace("sglang", "sgalng")), ["no recipe 'sgalng'", "Did you mean 'sglang'?"]),
        (Request(variant=NAME.replace("90", "61")), ["cannot serve SM 61"]),
        (Request(variant=NAME, recipe="sglang", python="3.11"), ["--python says 3.11, --variant says 3.12"]),
        (Request(sm="61,90+103", isa="avx2"), ["cannot serve SM 61", "only supports sm75", "cannot serve SM 103"]),
        (Request(gpus=["H100", "GB200"], isa="avx2"), ["the CPU of GB200 does not run avx2"]),
        (Request(variant="sglang-python312-cuda12_8-sm90_121-avx2"), ["cannot serve SM 121"]),
        (Request(sm="80,90", gpus=["H100"], isa="avx2"), ["--sm says SM 80, 90, --gpu says SM 90"]),
        (Request(sm="all", isa="armv9", recipe="sglang"), ["is not offered for aarch64"]),
        (Request(), ["missing --sm or --gpu or --variant", "missing --isa or --variant"]),
    ],
)  # fmt: skip
def test_refused(request_: Request, told: list[str], tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        outline(request_, Store(tmp_path))
    assert [one for one in told if one not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("asked", "variant", "python"),
    [(None, NAME, "3.12"), ("host", NAME, "host:3.12"), ("3.12", NAME, "3.12"), ("host:3.12", NAME, "host:3.12"),
     (None, None, None), ("host", None, "host")],
)  # fmt: skip
def test_the_python_of_a_variant(asked: str | None, variant: str | None, python: str | None) -> None:
    parsed = parse_variant(variant, load_targets()) if variant else None
    assert Request(python=asked, variant=variant).python_for(parsed) == python
