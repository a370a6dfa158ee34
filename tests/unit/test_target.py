"""Targets: every spelling that people use of an SM, the nearest known name of an instruction set, the bundle's slug."""

from __future__ import annotations

import itertools

import pytest
from packaging.tags import compatible_tags

from composer.errors import RecipeError
from composer.model.target import GLIBC_CEILING, Target, Targets, parse_isa, parse_sm, parse_sms, parse_targets
from composer.steps.load import load_targets

DATA = {
    "sm": {"90": {"name": "Hopper", "gpus": ["H100"]}, "100": {"name": "Blackwell", "gpus": []}},
    "isa": {
        "avx2": {"machine": "x86_64", "flags": ["-mavx2"], "features": ["avx2"], "cpus": "Haswell"},
        "avx512": {"machine": "x86_64", "flags": [], "features": [], "cpus": "Skylake"},
    },
    "driver": {"source": "a test", "compatible": {"12": "525"}, "native": {}},
}
TARGETS = parse_targets(DATA, "targets.toml")
TARGET = Target(sm=90, isa="avx512", cuda="12.8", python="3.12")


@pytest.mark.parametrize(
    ("text", "sm"),
    [("90", 90), ("sm90", 90), ("sm_90", 90), ("SM_90", 90), ("9.0", 90), (" 90 ", 90), ("10.0", 100), ("sm100", 100)],
)
def test_spellings_of_an_sm(text: str, sm: int) -> None:
    assert parse_sm(text, TARGETS) == sm


@pytest.mark.parametrize(
    ("text", "sms"),
    [("90", (90,)), ("100,90", (90, 100)), ("9.0, sm_100 ,90", (90, 100)), ("all", ()), (" ALL\n", ())],
)
def test_several_sms(text: str, sms: tuple[int, ...]) -> None:
    assert parse_sms(text, TARGETS) == sms


@pytest.mark.parametrize("text", ["", ",", "90,", ",90", "90,,100", "90;100", "90 100", "all,90", "90,91", "none"])
def test_several_of_which_one_is_unknown(text: str) -> None:
    with pytest.raises(RecipeError, match="unknown GPU architecture"):
        parse_sms(text, TARGETS)


@pytest.mark.parametrize("text", ["", "9", "91", "sm-90", "90a", "9.00", "-90", "90\n91", "9 0", "$(id)", "٩٠", "1000"])
def test_unknown_sm(text: str) -> None:
    with pytest.raises(RecipeError, match="unknown GPU architecture") as caught:
        parse_sm(text, TARGETS)
    assert repr(text) in str(caught.value)
    assert "Known: 90, 100" in str(caught.value.fix)


@pytest.mark.parametrize(("text", "near"), [("avx521", "avx512"), ("avx-2", "avx2"), ("AVX5", "avx512")])
def test_unknown_isa_names_the_nearest(text: str, near: str) -> None:
    assert parse_isa(near.upper(), TARGETS) == near
    with pytest.raises(RecipeError) as caught:
        parse_isa(text, TARGETS)
    assert caught.value.fix == f"Did you mean {near!r}?"


def test_isa_like_no_other_lists_all() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_isa("; rm -rf /", TARGETS)
    assert caught.value.fix == "Known: avx2, avx512."


def test_slug() -> None:
    assert TARGET.slug == "python312-cuda12_8-sm90-avx512"


def test_platforms_are_those_of_pep_600() -> None:
    platforms = TARGET.platforms
    assert platforms[0] == f"manylinux_2_{GLIBC_CEILING}_x86_64"
    assert {"manylinux2014_x86_64", "manylinux1_x86_64", "manylinux_2_5_x86_64", "linux_x86_64"} < set(platforms)
    assert len(set(platforms)) == len(platforms)
    assert all(tag.platform in {"any", *platforms} for tag in compatible_tags((3, 12), platforms=platforms))


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"sm": {"90": {"name": 5, "gpus": []}}}, "sm[...].name"),
        ({"sm": {"90": {"name": "x", "gpus": [], "gpu": []}}}, "sm.90.gpu"),
        ({"isa": {"avx2": {"machine": "x86_64", "cpus": ""}}}, "flags"),
        ({"isas": {}}, "isas"),
    ],
)
def test_a_wrong_vocabulary_names_the_place(change: dict[str, object], where: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_targets(DATA | change, "targets.toml")
    assert where in str(caught.value)
    assert str(caught.value.where).startswith("targets.toml")


def test_the_shipped_vocabulary_makes_file_names() -> None:
    targets: Targets = load_targets()
    assert {"90", "100", "120"} <= targets.sm.keys()
    for sm, isa in itertools.product(targets.sm, targets.isa):
        assert parse_sm(sm, targets) == int(sm)
        target = Target(sm=int(sm), isa=parse_isa(isa, targets), cuda="12.8", python="3.13")
        assert target.slug.replace("_", "").replace("-", "").isalnum()
