"""Names of variants, what a command line says of a target, and the properties of wheel variants."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from composer.errors import RecipeError
from composer.model.target import parse_gpu
from composer.model.variant import Asked, Variant, choose, parse_variant, parse_variants, variant_properties
from composer.steps.load import load_targets

TARGETS = load_targets()
#: All variants of flox/build-sglang and flox/build-vllm, as their repositories have them.
ROWS: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "data" / "variants.json").read_text())
NAME = "sglang-python312-cuda12_8-sm90-avx512"


# --- names ------------------------------------------------------------------------------------------------------------


def test_there_are_106() -> None:
    assert len({row["name"] for row in ROWS}) == len(ROWS) == 106
    assert [sum(row["stack"] == stack for row in ROWS) for stack in ("sglang", "vllm")] == [18, 88]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_every_name_of_the_references(row: dict[str, Any]) -> None:
    variant = parse_variant(row["name"], TARGETS)
    sms = () if row["sm"] == "all" else (row["sm"],)
    assert variant == Variant(stack=row["stack"], python=row["python"], cuda=row["cuda"], sms=sms, isa=row["isa"])
    assert variant.name == row["name"]
    assert parse_variant(variant.name, TARGETS) == variant
    assert f"{TARGETS.isa[variant.isa].machine}-linux" == row["platform"]


def test_the_gpus_of_the_references_are_of_their_sm() -> None:
    listed = {(name, row["sm"]) for row in ROWS if row["sm"] != "all" for name in row["gpus_reference"]}
    # The references list the L40S as Hopper; it is Ada.
    assert {(name, sm) for name, sm in listed if parse_gpu(name, TARGETS).sm != sm} == {("L40S", 90)}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("sglang-python312-cuda12_8-sm90_80_86-avx2", "sglang-python312-cuda12_8-sm80_86_90-avx2"),
        ("sglang-python312-cuda12_8-sm90_90-avx2", "sglang-python312-cuda12_8-sm90-avx2"),
        (f"  {NAME}\n", NAME), ("a-b.c-python39-cuda13_0-sm120-x86-64-v3", "a-b.c-python39-cuda13_0-sm120-x86-64-v3"),
        ("sglang-python312-cuda12_8-sm90-x86_64_v4", "sglang-python312-cuda12_8-sm90-x86-64-v4"),
    ],
)  # fmt: skip
def test_names_are_brought_into_one_form(text: str, name: str) -> None:
    assert parse_variant(text, TARGETS).name == name


@pytest.mark.parametrize("name", [NAME, "sglang-python312-cuda12_8-sm80_90-avx2", "x-python39-cuda13_0-sm90_120-avx"])
def test_the_slug_of_a_target_is_the_end_of_its_name(name: str) -> None:
    variant = parse_variant(name, TARGETS)
    assert f"{variant.stack}-{variant.target(TARGETS).slug}" == name


def test_the_machine_of_a_target_is_that_of_its_instruction_set() -> None:
    assert parse_variant("vllm-python313-cuda12_9-sm100-armv9", TARGETS).target(TARGETS).machine == "aarch64"


@pytest.mark.parametrize(
    "text",
    ["", "sglang", NAME.upper(), NAME + "\nx", "-python312-cuda12_8-sm90-avx2", "sglang-python3-cuda12_8-sm90-avx2",
     "sglang-python312-cuda12.8-sm90-avx2", "sglang-python312-cuda12_8-90-avx2", "sglang-python312-cuda12_8-sm90-",
     "sglang-python312-cuda12_8-sm90_-avx2", "sglang-python٣١٢-cuda12_8-sm90-avx2", "../x-python312-cuda12_8-sm90-avx2",
     "a" * 100_000],
)  # fmt: skip
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(RecipeError, match="not the name of a variant") as caught:
        parse_variant(text, TARGETS, [NAME] if len(text) > 1000 else [])
    assert caught.value.fix == "Names look like sglang-python312-cuda12_8-sm90-avx512."


def test_the_nearest_name() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_variant("sglang-py312-cuda12_8-sm90-avx512", TARGETS, [NAME, NAME.replace("90", "80")])
    assert caught.value.fix == f"Did you mean {NAME!r}?"


def test_everything_unknown_in_names_is_told_at_once() -> None:
    bad = "sglang-python312-cuda12_8-sm95_99-avx521"
    with pytest.raises(RecipeError, match="4 faults") as caught:
        parse_variants([bad, NAME, "sglang"], TARGETS)
    text = str(caught.value)
    assert f"{bad}: unknown GPU architecture '95'" in text
    assert f"{bad}: unknown GPU architecture '99'" in text
    assert f"{bad}: unknown CPU instruction set 'avx521'\n  fix: Did you mean 'avx512'?" in text
    assert "--variant: not the name of a variant: 'sglang'" in text


def test_an_overlay_is_not_part_of_a_name() -> None:
    with pytest.raises(RecipeError, match="unknown CPU instruction set 'avx512-lean'"):
        parse_variant(f"{NAME}-lean", TARGETS)


# --- command lines ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "sms", "isa"),
    [
        (Asked(sm="90", isa="avx2"), (90,), "avx2"), (Asked(sm="90,80", isa="avx2"), (80, 90), "avx2"),
        (Asked(sm="all", isa="avx2"), (), "avx2"), (Asked(gpus=["H100"], isa="avx2"), (90,), "avx2"),
        (Asked(gpus=["H100", "L40S", "H200"], isa="avx2"), (89, 90), "avx2"), (Asked(variant=NAME), (90,), "avx512"),
        (Asked(sm="9.0", gpus=["GH200"], isa="armv9"), (90,), "armv9"),
        (Asked(variant=NAME, sm="90", isa="AVX-512", gpus=["H100"], python="3.12"), (90,), "avx512"),
        (Asked(variant="sglang-python312-cuda12_8-all-avx2", sm="all"), (), "avx2"),
    ],
)  # fmt: skip
def test_options_that_agree(asked: Asked, sms: tuple[int, ...], isa: str) -> None:
    choice = choose(asked, TARGETS)
    assert (choice.sms, choice.isa) == (sms, isa)
    assert (choice.variant is not None) == (asked.variant is not None)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (Asked(), ["missing --sm or --gpu or --variant", "missing --isa or --variant"]),
        (Asked(sm="90"), ["missing --isa or --variant"]),
        (Asked(sm="90", gpus=["L40S"], isa="avx2"), ["--sm says SM 90, --gpu says SM 89"]),
        (Asked(sm="all", gpus=["H100"], isa="avx2"), ["--sm says all, --gpu says SM 90"]),
        (Asked(gpus=["GB200"], isa="avx512"), ["the CPU of GB200 does not run avx512"]),
        (Asked(gpus=["H100", "GH200"], isa="avx512"), ["the CPU of GH200 does not run avx512"]),
        (Asked(gpus=["GB200", "Thor"], isa="avx2"), ["the CPU of GB200 does not", "the CPU of Thor does not"]),
        (Asked(variant=NAME, sm="80", isa="avx2", python="3.11"),
         ["--sm says SM 80, --variant says SM 90", "--isa says avx2, --variant says avx512",
          "--python says 3.11, --variant says 3.12"]),
        (Asked(sm="95", gpus=["H1000"], isa="avx521", variant="sglang"),
         ["architecture '95'", "unknown GPU 'H1000'", "instruction set 'avx521'", "not the name of a variant"]),
    ],
)  # fmt: skip
def test_options_that_contradict_each_other(asked: Asked, told: list[str]) -> None:
    with pytest.raises(RecipeError, match=f"{len(told)} faults" if len(told) > 1 else None) as caught:
        choose(asked, TARGETS)
    assert [one for one in told if one not in str(caught.value)] == []


# --- properties of wheel variants -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sms", "cuda", "isa", "properties"),
    [
        ((90,), "12.8", None, ("nvidia :: cuda_version_lower_bound :: 12.8", "nvidia :: sm_arch :: 90_real")),
        ((80, 120), "13.0", "x86-64-v3",
         ("nvidia :: cuda_version_lower_bound :: 13.0", "nvidia :: sm_arch :: 120_real",
          "nvidia :: sm_arch :: 80_real", "x86_64 :: level :: v3")),
        ((100,), "12.9", "armv9",
         ("aarch64 :: bf16 :: on", "aarch64 :: i8mm :: on", "aarch64 :: sve2 :: on", "aarch64 :: version :: 9.0a",
          "nvidia :: cuda_version_lower_bound :: 12.9", "nvidia :: sm_arch :: 100_real")),
        ((90,), "12.8", "avx512vnni",
         ("nvidia :: cuda_version_lower_bound :: 12.8", "nvidia :: sm_arch :: 90_real", "x86_64 :: avx512_vnni :: on",
          "x86_64 :: avx512bw :: on", "x86_64 :: avx512dq :: on", "x86_64 :: avx512f :: on",
          "x86_64 :: avx512vl :: on", "x86_64 :: fma :: on")),
    ],
)  # fmt: skip
def test_properties(sms: tuple[int, ...], cuda: str, isa: str | None, properties: tuple[str, ...]) -> None:
    assert variant_properties(sms, cuda, TARGETS.isa[isa] if isa else None) == properties


def test_every_property_is_one_of_pep_825() -> None:
    form = re.compile(r"[a-z0-9_]+ :: [a-z0-9_]+ :: [a-z0-9_.]+")
    for isa in TARGETS.isa.values():
        found = variant_properties(tuple(map(int, TARGETS.sm)), "12.8", isa)
        assert list(found) == sorted(set(found))
        assert all(form.fullmatch(one) for one in found)
        assert any(one.startswith(isa.machine) for one in found)
