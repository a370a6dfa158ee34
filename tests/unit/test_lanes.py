"""The shipped lanes: each has a lock that fits it, serves what it claims, and says why of everything else."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from composer.errors import RecipeError
from composer.formats.patch import apply_patch
from composer.model.lock import parse_lock
from composer.model.overlay import overlaid, parse_overlay
from composer.model.recipe import Recipe
from composer.model.target import Target
from composer.steps import load
from composer.steps.load import data_root, load_named, load_recipe, load_targets
from composer.steps.locks import lock_request, read_lock
from tests.recipes import head

LANES = ("sglang", "sglang-forward", "sglang-forward-aarch64", "vllm")
SMALL = (
    head()
    + """\
[[component]]
name = "alpha"
version = "1.0"
"""
)
SMS = sorted(map(int, load_targets().sm))


def locks() -> Iterator[tuple[str, tuple[str, ...], str, str]]:
    """Recipe, overlays, Python and machine of every lock of a lane."""
    for name in LANES:
        recipe = load_recipe(name).recipe
        yield from ((name, (), python, machine) for python in recipe.pythons for machine in recipe.machines)
    yield "sglang", ("sm120",), "3.12", "x86_64"


def target(recipe: Recipe, sm: int) -> Target:
    return Target(sms=(sm,), isa="", cuda=recipe.cuda, python=recipe.pythons[0], machine=recipe.machines[0])


@pytest.mark.parametrize(("name", "overlays", "python", "machine"), list(locks()))
def test_the_lock_fits_the_lane(name: str, overlays: tuple[str, ...], python: str, machine: str) -> None:
    loaded = load_recipe(name, overlays)
    lock = read_lock(loaded.lock_path(python, machine))
    assert lock.recipe == lock_request(loaded.recipe, python, machine).recipe
    assert {"torch", "triton"} <= lock.pins.keys()


@pytest.mark.parametrize(("name", "overlays", "python", "machine"), list(locks()))
def test_a_lock_holds_one_cuda(name: str, overlays: tuple[str, ...], python: str, machine: str) -> None:
    loaded = load_recipe(name, overlays)
    major = loaded.recipe.cuda.partition(".")[0]
    names = read_lock(loaded.lock_path(python, machine)).pins
    assert {found[1] for one in names if (found := re.search(r"-cu(1\d)$", one))} == {major}


@pytest.mark.parametrize("name", LANES)
def test_every_gpu_is_served_or_refused_with_a_reason(name: str) -> None:
    recipe = load_recipe(name).recipe
    for sm in SMS:
        faults = list(recipe.target_faults(target(recipe, sm)))
        assert [sm in recipe.sm, False] == [not faults, any(not one.why for one in faults)], sm


def test_the_lanes_of_a_version_share_everything_but_the_machine() -> None:
    x86, arm = (load_recipe(name).recipe for name in ("sglang-forward", "sglang-forward-aarch64"))
    assert (x86.version, x86.cuda, x86.as_of, x86.constraints) == (arm.version, arm.cuda, arm.as_of, arm.constraints)
    mine, theirs = ({one.name: one for one in recipe.component} for recipe in (x86, arm))
    assert [name for name in mine if mine[name] != theirs[name]] == ["sglang-kernel"]


# --- names of versions ------------------------------------------------------------------------------------------------


def test_a_version_of_a_stack_names_its_recipe() -> None:
    assert load_recipe("sglang:0.5.9").spelling == "sglang"
    assert load_recipe("vllm:0.15.1").spelling == "vllm"


@pytest.mark.parametrize(("machine", "recipe"), [("x86_64", "sglang-forward"), ("aarch64", "sglang-forward-aarch64")])
def test_the_machine_decides_between_the_recipes_of_a_version(machine: str, recipe: str) -> None:
    assert load_recipe("sglang:0.5.23", machine=machine).spelling == recipe
    assert load_recipe("sglang:0.5.9", machine=machine).spelling == "sglang"  # which says itself why not
    assert [one.spelling for one in load_named("sglang:0.5.23")] == ["sglang-forward", "sglang-forward-aarch64"]


@pytest.mark.parametrize("name", ["sglang-builder", "sglang:0.5.9-builder"])
def test_a_builder_takes_from_source_what_the_lane_can_build(name: str) -> None:
    plain, builder = load_recipe("sglang"), load_recipe(name)
    assert {one.name for one in plain.recipe.component if one.build} == {"torch", "flashinfer-jit-cache"}
    assert {one.build.when for one in plain.recipe.component if one.build} != {"always"}
    assert {one.build.when for one in builder.recipe.component if one.build} == {"always"}
    assert (builder.digest, builder.spelling) == (plain.digest, plain.spelling)
    asked = [lock_request(one.recipe, "3.12", "x86_64") for one in (plain, builder)]
    assert asked[0].recipe == asked[1].recipe


def test_a_builder_of_what_nothing_says_how_to_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/small.toml").write_text(SMALL)
    monkeypatch.setattr(load, "data_root", lambda: tmp_path)
    assert load_recipe("small:1.0").spelling == "small"
    with pytest.raises(RecipeError) as caught:
        load_recipe("small-builder")
    assert caught.value.what == "small 1.0 does not say how anything of it is built"


def test_a_lock_is_called_as_its_file(tmp_path: Path) -> None:
    for name, overlays, python, machine in locks():
        path = load_recipe(name, overlays).lock_path(python, machine)
        assert read_lock(path).filename == path.name
        assert parse_lock(path.read_text(), path.name).filename == path.name
    other = tmp_path / "pylock.other.toml"
    shutil.copy(path, other)
    assert read_lock(other).filename == "pylock.other.toml"


@pytest.mark.parametrize(
    ("overlays", "command"),
    [((), "compose lock sglang"), (("lean",), "compose lock sglang"),
     (("lean", "sm120"), "compose lock sglang --overlay sm120")],
)  # fmt: skip
def test_the_command_that_makes_a_lock_anew(overlays: tuple[str, ...], command: str) -> None:
    assert load_recipe("sglang", overlays).lock_command == command


@pytest.mark.parametrize(
    ("name", "what", "words"),
    [
        ("sglang:0.5.23", "2 recipes are sglang:0.5.23", ("sglang-forward", "sglang-forward-aarch64")),
        ("sglang:9.9", "no recipe 'sglang:9.9'", ("sglang:0.5.9", "sglang:0.5.23")),
        ("sglng:0.5.9", "no recipe 'sglng:0.5.9'", ("Did you mean 'sglang'?",)),
        ("sglan-builder", "no recipe 'sglan'", ("Did you mean 'sglang'?",)),
        ("tgi:1.0", "no recipe 'tgi:1.0'", ("sglang",)),
    ],
)
def test_a_version_that_names_no_recipe(name: str, what: str, words: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    assert caught.value.what == what
    assert all(word in str(caught.value) for word in words)


# --- overlays that ask for other versions -----------------------------------------------------------------------------


def test_the_overlay_has_a_lock_of_its_own_and_the_versions_of_the_wiki() -> None:
    plain, changed = load_recipe("sglang"), load_recipe("sglang", ["sm120"])
    assert plain.lock_path("3.12", "x86_64") != changed.lock_path("3.12", "x86_64")
    before, after = (read_lock(one.lock_path("3.12", "x86_64")).pins for one in (plain, changed))
    moved = {name: after[name] for name in after if before.get(name) != after[name]}
    assert moved["transformers"] == "5.2.0"
    assert moved["nvidia-cudnn-cu12"].startswith("9.19.")
    assert after["torch"] == before["torch"]


def test_the_overlay_is_refused_for_other_gpus() -> None:
    recipe = load_recipe("sglang", ["sm120"]).recipe
    assert recipe.sm == (120,)
    with pytest.raises(RecipeError) as caught:
        recipe.check_target(target(recipe, 90))
    assert caught.value.why == "the overlay 'sm120' is meant for SM 120 only"


def test_overlays_compose() -> None:
    both = load_recipe("sglang", ["lean", "sm120"])
    assert both.recipe == load_recipe("sglang", ["sm120", "lean"]).recipe
    assert both.relocked == ("sm120",)
    assert both.lock_path("3.12", "x86_64") == load_recipe("sglang", ["sm120"]).lock_path("3.12", "x86_64")
    assert both.recipe.stub
    assert both.bundle_name(target(both.recipe, 120)).endswith("-lean-sm120")


def test_an_edit_takes_the_place_of_the_recipes_own() -> None:
    recipe = load_recipe("sglang").recipe
    data = {
        "schema": 1, "summary": "x",
        "requires": [{"name": "flashinfer-python", "to": "flashinfer-python==0.6.6", "reason": "x"}],
        "component": [{"name": "flashinfer-python", "version": "0.6.6"}],
    }  # fmt: skip
    with pytest.raises(RecipeError, match="contradicts the component's version"):
        overlaid(recipe, {"more": parse_overlay({**data, "component": []}, recipe, "more.toml")})
    changed = overlaid(recipe, {"more": parse_overlay(data, recipe, "more.toml")})
    assert [one.to for one in changed.requires if one.name == "flashinfer-python"] == ["flashinfer-python==0.6.6"]
    assert len(changed.requires) == len(recipe.requires)


@pytest.mark.parametrize(
    ("first", "second", "where"),
    [
        ({"component": [{"name": "torch", "version": "2.9.0"}]}, {"component": [{"name": "torch", "version": "2.9.1"}]},
         "component torch.version"),
        ({"requires": [{"name": "x", "reason": "y"}]}, {"requires": [{"name": "x", "to": "x==1", "reason": "y"}]},
         "requires x"),
        ({"sm": [90]}, {"sm": [120]}, "--overlay"),
    ],
)  # fmt: skip
def test_overlays_that_ask_for_different_things(first: dict[str, object], second: dict[str, object],
                                                where: str) -> None:  # fmt: skip
    recipe = load_recipe("sglang").recipe
    both = {
        name: parse_overlay({"schema": 1, "summary": "x", **one}, recipe, name)
        for name, one in (("a", first), ("b", second))
    }
    with pytest.raises(RecipeError) as caught:
        overlaid(recipe, both)
    assert caught.value.where == where


#: The end of SGLang 0.5.9's deep_gemm_wrapper/configurer.py, at its line.
CONFIGURER = (
    "\n" * 21
    + """\
ENABLE_JIT_DEEPGEMM = _compute_enable_deep_gemm()

DEEPGEMM_BLACKWELL = ENABLE_JIT_DEEPGEMM and is_blackwell_supported()
DEEPGEMM_SCALE_UE8M0 = DEEPGEMM_BLACKWELL
"""
)


def patched(text: str) -> str:
    """What the overlay's own patch makes of the file."""
    component = load_recipe("sglang", ["sm120"]).recipe.component_of("sglang")
    (path,) = (one for one in component.patches if "overlay-sm120" in one)
    (content,) = apply_patch((data_root() / "patches" / path).read_bytes(), lambda _: text.encode()).values()
    return content.decode()


def test_the_overlays_patch_changes_exactly_one_place() -> None:
    assert patched(CONFIGURER) == CONFIGURER.replace("= DEEPGEMM_BLACKWELL", "= False")


@pytest.mark.parametrize("text", [CONFIGURER.replace("UE8M0 = DEEPGEMM_BLACKWELL", "UE8M0 = False"), f"\n{CONFIGURER}"])
def test_the_overlays_patch_fits_no_other_file(text: str) -> None:
    with pytest.raises(RecipeError):
        patched(text)
