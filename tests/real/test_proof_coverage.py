"""Coverage of the real wheels: the facts that were measured by other means are the expectation, for every GPU in them.

`targets.json` is in no release: its folder is `../shared/facts` beside the checkout, or WHEEL_COMPOSER_FACTS.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from composer.formats.cubin import Cubin
from composer.formats.gpu_images import GpuImages, cubin_images, read_images
from composer.model.finding import Finding
from composer.model.globs import matches
from composer.model.recipe import Recipe
from composer.proofs.coverage import check_coverage, cover, needed_libraries
from composer.steps.load import load_recipe, load_targets
from composer.steps.objects import objects
from composer.store import Store

pytestmark = pytest.mark.real

_FACTS = Path(os.environ.get("WHEEL_COMPOSER_FACTS", Path(__file__).resolve().parents[3] / "shared/facts"))
_NOT_THE_WHEELS = "aarch64"  # only wheels for this recipe's machine are in the store


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    path = _FACTS / "targets.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("sglang").recipe


@pytest.fixture(scope="module")
def wheels(recipe: Recipe) -> dict[str, dict[str, GpuImages]]:
    """The GPU code of every wheel that a rule is about, by distribution and path."""
    names = [one.name for one in recipe.component if one.coverage]
    return {name: _code(name) for name in [*names, "flashinfer-cubin"]}


def _code(name: str) -> dict[str, GpuImages]:
    found = sorted(Store().artifacts.glob(f"*/*/{name.replace('-', '_')}-*.whl"))
    assert found, f"no wheel of {name} in the store: run `compose fetch --sm 100 --isa avx512`"
    return {
        path: cubin_images(content, size) if isinstance(content, Cubin) else read_images(content, path)
        for path, size, content in objects(found[0])
    }


def _sms(facts: Mapping[str, Any]) -> list[int]:
    """Every GPU that the facts know."""
    numbers = {int(re.match(r"\d+", str(one["sm"]))[0]) for one in facts["gpus_verified"]}  # type: ignore[index]
    return sorted(numbers | {int(sm) for sm in facts["sms"]})


def _composed(recipe: Recipe, wheels: Mapping[str, Mapping[str, GpuImages]], sm: int) -> dict[str, GpuImages]:
    """What the recipe leaves of the wheels for a target."""
    tree: dict[str, GpuImages] = {}
    for name, code in wheels.items():
        pruned = [text for one in recipe.component_of(name).prune if one.applies(sm) for text in one.paths]
        kept = {path: one for path, one in code.items() if not any(matches(path, text) for text in pruned)}
        tree |= kept if recipe.composed(name, [sm]) else {}
    return tree


def _check(recipe: Recipe, tree: Mapping[str, GpuImages], sm: int) -> tuple[Finding, ...]:
    rules = [rule for one in recipe.component for rule in one.coverage]
    return check_coverage(tree, [sm], rules, site="")


def _runs(image: str, sm: int) -> bool:
    """Whether a binary `90a` or `86` of the facts runs on a GPU, by NVIDIA's rules; Jetson's boards run their own."""
    own, specific = int(image.rstrip("af")), image.endswith("a")
    if own == sm or {own, sm} == {101, 110}:
        return True
    return not specific and own // 10 == sm // 10 and own < sm and not {own, sm} & {87, 101, 110}


# --- what the facts say of libraries ----------------------------------------------------------------------------------


def test_libraries_hold_what_was_measured(facts: dict[str, Any], wheels: dict[str, dict[str, GpuImages]]) -> None:
    checked = 0
    for wheel, libraries in facts["wheel_sass_coverage_measured"].items():
        code = wheels[wheel.partition("-")[0].replace("_", "-")]
        for name, images in libraries.items():
            if name == "note" or wheel.endswith(_NOT_THE_WHEELS):
                continue
            held = [
                one for path, one in code.items() if name == "all" or path.rpartition("/")[2].startswith(f"{name}.")
            ]
            assert held, f"{wheel}: {name}"
            for sm in _sms(facts):
                found = cover(held, sm)
                native = any(_runs(image, sm) for image in images if not image.startswith("ptx"))
                text = any(int(image[3:]) <= sm for image in images if image.startswith("ptx"))
                assert (found.native > 0) == native, f"{wheel}: {name} on SM {sm}: {found}"
                assert (found.ptx > 0) == (text and not native) or name == "all", f"{wheel}: {name} on SM {sm}: {found}"
                checked += 1
    assert checked >= 7 * len(_sms(facts))


# --- what the facts say of the stack ----------------------------------------------------------------------------------


def test_the_stack_serves_what_the_facts_say(facts: dict[str, Any], recipe: Recipe,
                                             wheels: dict[str, dict[str, GpuImages]]) -> None:  # fmt: skip
    """Found by the proof alone: it knows nothing of what the recipe refuses."""
    for sm in _sms(facts):
        status = facts["sms"].get(str(sm), {}).get("serving_status_sglang_0_5_9", "in no table")
        errors = [one for one in _check(recipe, _composed(recipe, wheels, sm), sm) if one.severity == "error"]
        assert bool(errors) == (not status.startswith("ok")), f"SM {sm}: {status}: {errors}"
        if errors:
            kernels = [one for one in errors if one.subject == "sgl_kernel/sm100/common_ops.abi3.so"]
            assert [(one.id, f"nothing for SM {sm} in 74 of its 74" in one.evidence) for one in kernels] == [
                ("coverage.nothing", True)
            ]


def test_it_finds_what_the_recipe_refuses(recipe: Recipe, wheels: dict[str, dict[str, GpuImages]]) -> None:
    found = {
        int(sm) for sm in load_targets().sm
        if any(one.severity == "error" for one in _check(recipe, _composed(recipe, wheels, int(sm)), int(sm)))
    }  # fmt: skip
    assert found == {sm for one in recipe.refuse for sm in one.sm}


@pytest.mark.parametrize("sm", [80, 86, 89, 90, 100, 120])
def test_no_false_alarm(sm: int, recipe: Recipe, wheels: dict[str, dict[str, GpuImages]]) -> None:
    found = _check(recipe, _composed(recipe, wheels, sm), sm)
    assert [one for one in found if one.severity != "note"] == []
    # SM 100 has FlashInfer's cubins; the others compile its kernels, unless the optional cache is there.
    assert any(one.id == "coverage.fallback" for one in found) == (sm != 100)


def test_ptx_is_told(recipe: Recipe, wheels: dict[str, dict[str, GpuImages]]) -> None:
    tree = _composed(recipe, wheels, 120)
    compiled = {one.subject: one.evidence for one in _check(recipe, tree, 120) if one.id == "coverage.compiled"}
    assert set(compiled) == {"nvidia/cufft/lib/libcufft.so.11"}
    assert "only PTX in 8183 of its 23532 containers, 410.4 MB" in compiled["nvidia/cufft/lib/libcufft.so.11"]
    rules = [rule for one in recipe.component for rule in one.coverage]
    needed = needed_libraries(tree, [120], rules, site="")
    assert {path for path, ptx in needed.items() if ptx} == set(compiled)


# --- real trees, broken in one way ------------------------------------------------------------------------------------


def test_a_tree_for_another_gpu(recipe: Recipe, wheels: dict[str, dict[str, GpuImages]]) -> None:
    found = [one for one in _check(recipe, _composed(recipe, wheels, 80), 90) if one.severity == "error"]
    assert [(one.id, one.subject) for one in found] == [("coverage.absent", "sgl_kernel/sm90/common_ops.*")]


@pytest.mark.parametrize(
    ("path", "finding"),
    [
        ("sgl_kernel/flash_ops.abi3.so", "sgl_kernel/flash_ops.*"),
        ("torch/lib/libtorch_cuda.so", "torch/lib/libtorch_cuda.so"),
        ("nvidia/cudnn/lib/libcudnn_ops.so.9", "nvidia/cudnn/lib/libcudnn_ops.so.9"),
    ],
)  # fmt: skip
def test_a_library_that_is_gone_or_empty(path: str, finding: str, recipe: Recipe,
                                         wheels: dict[str, dict[str, GpuImages]]) -> None:  # fmt: skip
    tree = _composed(recipe, wheels, 90)
    before = set(_check(recipe, tree, 90))
    gone = set(_check(recipe, {key: one for key, one in tree.items() if key != path}, 90)) - before
    assert [(one.id, one.subject) for one in gone] == [("coverage.absent", finding)]
    empty = set(_check(recipe, {**tree, path: GpuImages()}, 90)) - before
    assert [(one.id, one.subject) for one in empty] == [("coverage.nothing", path)]
