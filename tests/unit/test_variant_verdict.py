"""Verdicts: what becomes of every variant of the references, and what `compose targets` shows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from click.testing import CliRunner

from composer.cli.targets import targets as command
from composer.errors import RecipeError
from composer.model.recipe import Recipe, parse_recipe
from composer.model.target import parse_gpu, target_faults
from composer.model.variant import parse_variant
from composer.model.verdict import judge, matrix, names, recipe_for
from composer.steps.load import load_recipes, load_targets
from tests.unit.test_variant import ROWS

TARGETS = load_targets()
SHIPPED = {name: one.recipe for name, one in load_recipes().items()}


def recipe(**changes: object) -> Recipe:
    return parse_recipe({
        "schema": 1, "name": "vllm", "version": "0.15.1", "summary": "A test", "cuda": "12.9", "pythons": ["3.13"],
        "as-of": "2026-03-11T00:00:00Z", "sm": [75, 80, 86, 89, 90, 100, 103, 120],
        "machines": ["x86_64", "aarch64"], "component": [{"name": "vllm", "version": "0.15.1"}],
        "refuse": [{"sm": [61], "reason": "too old"}], **changes,
    }, "a test")  # fmt: skip


VLLM = {"vllm": recipe(), "vllm-cuda128": recipe(cuda="12.8", sm=[80, 90, 100])}


# --- the references ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_no_variant_of_the_references_contradicts_itself(row: dict[str, Any]) -> None:
    variant = parse_variant(row["name"], TARGETS)
    assert [str(one) for one in target_faults(variant.target(TARGETS), TARGETS)] == []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_every_variant_is_composed_or_refused_with_a_reason(row: dict[str, Any]) -> None:
    verdict = judge(parse_variant(row["name"], TARGETS), SHIPPED, TARGETS)
    assert verdict.plannable != bool(verdict.reasons)
    assert all(one.what and (one.why or one.fix) for one in verdict.reasons)
    if verdict.plannable:
        assert verdict.recipe in SHIPPED
        assert set(verdict.sms) <= set(SHIPPED[verdict.recipe].sm)


@pytest.mark.parametrize("row", [row for row in ROWS if row["stack"] == "sglang"], ids=lambda row: row["name"])
def test_verdicts_are_those_of_the_wheels(row: dict[str, Any]) -> None:
    """`verified_status`: what was found in the wheels of the index, and by running them."""
    verdict = judge(parse_variant(row["name"], TARGETS), SHIPPED, TARGETS)
    status: str = row["verified_status"]
    if row["sm"] == "all":
        assert status == "sm_75 part broken with PyPI sgl_kernel 0.3.21; 10.3 and 12.1 not covered"
        assert {75, 103, 121} <= verdict.left_out.keys()
        assert verdict.sms == (80, 86, 89, 90, 100, 120)
        return
    assert verdict.plannable == status.startswith("ok")
    if status.startswith("UNSERVABLE"):
        assert "SGLang only supports sm75 and above" in str(verdict.reasons[0].why)
    elif status.startswith("BROKEN"):
        assert "built from source" in str(verdict.reasons[0].why)


def test_a_recipe_for_the_other_half_of_the_table() -> None:
    verdicts = [judge(parse_variant(row["name"], TARGETS), VLLM, TARGETS) for row in ROWS if row["stack"] == "vllm"]
    composed = {one.variant.name for one in verdicts if one.plannable}
    assert {"vllm-python313-cuda12_9-sm103-armv9", "vllm-python313-cuda12_8-sm100-armv9"} <= composed
    assert {one.recipe for one in verdicts if one.plannable} == set(VLLM)
    refused = {one.variant.name: one.reasons[0] for one in verdicts if not one.plannable}
    assert {name: fault.why for name, fault in refused.items() if "cuda12_9" in name} == {
        "vllm-python313-cuda12_9-sm61-avx": "too old", "vllm-python313-cuda12_9-sm61-avx2": "too old",
    }  # fmt: skip
    assert refused["vllm-python313-cuda12_8-sm75-avx"].what == "vllm 0.15.1 is not offered for SM 75"
    assert len(composed) + len(refused) == 88


# --- reasons ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("sglang-python312-cuda12_8-sm103-avx512", ["CUDA 12.8 emits no code for SM 103", "cannot serve SM 103"]),
        ("sglang-python312-cuda12_8-sm61-avx2", ["cannot serve SM 61"]),
        ("sglang-python312-cuda12_8-sm87-avx2", ["the CPU of Orin does not run avx2", "cannot serve SM 87"]),
        ("sglang-python312-cuda12_8-sm80_103_61-avx2",
         ["cannot serve SM 61", "CUDA 12.8 emits no code for SM 103", "cannot serve SM 103"]),
        ("sglang-python310-cuda12_8-sm90-avx2", ["is not offered for Python 3.10"]),
        ("sglang-python312-cuda12_8-sm90-armv9", ["is not offered for aarch64"]),
        ("sglang-python312-cuda12_8-all-armv9", ["is not offered for aarch64"]),
        ("sglang-python312-cuda11_8-sm90-avx2", ["sglang is not offered on CUDA 11.8"]),
        ("sgalng-python312-cuda12_8-sm103-avx2", ["no recipe 'sgalng'", "CUDA 12.8 emits no code for SM 103"]),
    ],
)  # fmt: skip
def test_every_reason_is_told_once(name: str, told: list[str]) -> None:
    recipes = {"sglang": SHIPPED["sglang"]}
    verdict = judge(parse_variant(name, TARGETS), recipes, TARGETS)
    assert not verdict.plannable
    assert len(verdict.reasons) == len(told)
    assert [one for one, text in zip(verdict.reasons, told, strict=True) if text not in one.what] == []


def test_the_nearest_recipe_and_the_cudas_that_are_offered() -> None:
    unknown = judge(parse_variant("sgalng-python312-cuda12_8-sm90-avx2", TARGETS), SHIPPED, TARGETS)
    assert unknown.reasons[0].fix == "Did you mean 'sglang'?"
    cuda = judge(parse_variant("vllm-python313-cuda12_6-sm90-avx2", TARGETS), VLLM, TARGETS)
    assert cuda.reasons[0].fix == "Offered: 12.8, 12.9."
    nothing = judge(parse_variant("vllm-python313-cuda12_6-sm90-avx2", TARGETS), {}, TARGETS)
    assert nothing.reasons[0].fix == "Known: none."


def test_of_two_recipes_the_one_that_composes_it() -> None:
    both = {"a": recipe(machines=["x86_64"]), "b": recipe(machines=["aarch64"], sm=[87, 90])}
    assert judge(parse_variant("vllm-python313-cuda12_9-sm90-armv9", TARGETS), both, TARGETS).recipe == "b"
    assert judge(parse_variant("vllm-python313-cuda12_9-sm90-avx2", TARGETS), both, TARGETS).recipe == "a"
    neither = judge(parse_variant("vllm-python313-cuda12_9-sm87-avx2", TARGETS), both, TARGETS)
    assert [one.what for one in neither.reasons] == [
        "the CPU of Orin does not run avx2", "vllm 0.15.1 is not offered for SM 87",
        "vllm 0.15.1 is not offered for x86_64",
    ]  # fmt: skip


def test_the_recipe_for_a_variant_or_all_reasons() -> None:
    assert recipe_for(parse_variant("vllm-python313-cuda12_8-sm100-armv9", TARGETS), VLLM, TARGETS) == "vllm-cuda128"
    with pytest.raises(RecipeError, match="2 faults") as caught:
        recipe_for(parse_variant("vllm-python313-cuda12_8-sm103-armv9", TARGETS), VLLM, TARGETS)
    assert "CUDA 12.8 emits no code for SM 103" in str(caught.value)
    assert "vllm 0.15.1 is not offered for SM 103" in str(caught.value)


def test_all_leaves_out_what_the_cpu_rules_out() -> None:
    one = {"vllm": recipe(sm=[87, 90])}
    assert judge(parse_variant("vllm-python313-cuda12_9-all-armv8_2", TARGETS), one, TARGETS).sms == (87, 90)
    x86 = judge(parse_variant("vllm-python313-cuda12_9-all-avx2", TARGETS), one, TARGETS)
    assert x86.sms == (90,)
    assert x86.left_out[87][0].what == "the CPU of Orin does not run avx2"


def test_names_are_those_of_what_recipes_compose() -> None:
    found = names({"vllm": recipe(sm=[90, 103], machines=["aarch64"])}, TARGETS)
    assert set(found) == {f"vllm-python313-cuda12_9-{sm}-{isa}"
                          for sm in ("all", "sm90", "sm103") for isa in ("armv8_2", "armv9")}  # fmt: skip


# --- the matrix -------------------------------------------------------------------------------------------------------


def test_the_matrix() -> None:
    rows = {row.sm: row for row in matrix(VLLM, TARGETS)}
    assert list(rows) == sorted(map(int, TARGETS.sm))
    assert rows[103].drivers == {"12": "575", "13": "580"}
    assert rows[61].drivers == {"12": "525"}
    assert [one.machines for one in rows[90].offers] == [("x86_64", "aarch64"), ("x86_64", "aarch64")]
    assert [one.machines for one in rows[103].offers] == [("x86_64", "aarch64"), ()]
    assert [fault.what for fault in rows[103].offers[1].reasons] == [
        "CUDA 12.8 emits no code for SM 103", "vllm 0.15.1 is not offered for SM 103",
    ]  # fmt: skip


def test_a_gpu_with_a_cpu_of_its_own_is_composed_for_that() -> None:
    (row,) = matrix(VLLM, TARGETS, [parse_gpu("GH200", TARGETS)])
    assert [one.machines for one in row.offers] == [("aarch64",), ("aarch64",)]
    (row,) = matrix({"vllm": recipe(machines=["x86_64"])}, TARGETS, [parse_gpu("GH200", TARGETS)])
    assert [fault.why for fault in row.offers[0].reasons] == [
        "GH200 has a CPU of its own: aarch64, with armv8_2, armv9"
    ]


# --- the command ------------------------------------------------------------------------------------------------------


def shown(*words: str) -> str:
    done = CliRunner().invoke(command, words, catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_the_table() -> None:
    lines = shown("--recipe", "sglang").splitlines()
    hopper = next(line for line in lines if line.lstrip().startswith("90 "))
    assert hopper.split()[1:7] == ["H100,", "H200,", "H800,", "H20,", "GH200*", "90a"]
    assert hopper.rstrip().endswith("525       580   sglang (x86_64)")
    assert any("-mavx512vnni" in line for line in lines)
    assert not any(line.rstrip() != line[:160].rstrip() for line in lines)


def test_one_gpu() -> None:
    lines = shown("--gpu", "nvidia l40s", "--recipe", "sglang").splitlines()
    assert [line.split()[:2] for line in lines if "L40S" in line] == [["89", "L40S"]]
    assert not any("-mavx2" in line for line in lines)


def test_json() -> None:
    data: Mapping[str, Any] = json.loads(shown("--json", "--recipe", "sglang"))
    rows = {row["sm"]: row for row in data["sm"]}
    assert rows[100]["own_cpu"] == {"GB200": ["armv8_2", "armv9"]}
    assert rows[100]["codes"]["12.8"] == ["100", "100a"]
    assert rows[61]["recipes"][0]["machines"] == []
    assert rows[61]["recipes"][0]["reasons"][0]["what"] == "sglang 0.5.9 cannot serve SM 61"
    assert data["cuda"]["12.9"]["driver_native"] == "575"
    assert data["isa"]["armv9"]["machine"] == "aarch64"
    (one,) = json.loads(shown("--json", "--recipe", "sglang", "--gpu", "GB300"))["sm"]
    assert (one["sm"], one["gpus"]) == (103, ["GB300"])


def test_verdicts_on_names() -> None:
    assert shown("sglang-python312-cuda12_8-sm90-avx2") == (
        "sglang-python312-cuda12_8-sm90-avx2: SM 90, with --recipe sglang\n"
    )
    both = ["sglang-python312-cuda12_8-all-avx2", "sglang-python312-cuda12_8-sm61-avx2"]
    done = CliRunner().invoke(command, ["--recipe", "sglang", *both])
    assert isinstance(done.exception, RecipeError)
    assert str(done.exception) == "1 of 2 variants cannot be composed"
    assert "  without SM 75: sgl-kernel 0.3.21 from PyPI" in done.stdout
    assert "sm61-avx2: cannot be composed\n  sglang 0.5.9 cannot serve SM 61: " in done.stdout
    done = CliRunner().invoke(command, ["--json", both[1]])
    (verdict,) = json.loads(done.stdout)
    assert (verdict["plannable"], verdict["recipe"], verdict["sm"]) == (False, None, [])
    assert "sm75" in verdict["reasons"][0]["why"]


def test_a_name_that_is_none_has_a_nearest() -> None:
    done = CliRunner().invoke(command, ["sglang-py312-cuda12_8-sm90-avx2", "--recipe", "sglang"])
    assert isinstance(done.exception, RecipeError)
    assert done.exception.fix == "Did you mean 'sglang-python312-cuda12_8-sm90-avx2'?"
