"""Which targets a matrix has: every combination once, what is refused with its reason, and the part of a shard."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from composer.cli.matrix import matrix
from composer.errors import RecipeError
from composer.steps.build import Settings
from composer.steps.matrix import Ask, aims
from composer.steps.matrix_step import Order
from composer.steps.outline import Request
from composer.steps.plan import Options

ORDER = Order(request=Request(), options=Options(), settings=Settings(jobs=1), output=Path("out"))
SERVED = {80, 86, 89, 90, 100, 120}


def ask(sms, isas=("avx512",), shard=(1, 1), recipes=("sglang",)):
    return aims(Ask(order=ORDER, recipes=recipes, sms=sms, isas=isas, shard=shard))


def pairs(found):
    return [(one.sm, one.isa) for one in found if not one.refused]


def test_every_sm_comes_with_every_instruction_set_once():
    assert pairs(ask(["90", "sm_80", "9.0"], ["avx2", "AVX-512", "avx512"])) == [
        (90, "avx2"), (80, "avx2"), (90, "avx512"), (80, "avx512"),
    ]  # fmt: skip


def test_all_is_every_sm_and_what_the_recipe_cannot_serve_is_refused_with_its_reason():
    found = ask(["all"])
    assert {one.sm for one in found if not one.refused} == SERVED
    refused = {one.sm: " ".join(map(str, one.refused)) for one in found if one.refused}
    assert "SGLang only supports sm75 and above" in refused[61]
    assert "CUDA 12.8" in refused[103]
    assert {61, 75, 87, 103, 110, 121} == refused.keys()


def test_a_request_is_for_its_own_target():
    (one,) = ask(["9.0"], ["avx2"])
    assert (one.order.request.recipe, one.order.request.sm, one.order.request.isa) == ("sglang", "90", "avx2")
    assert one.name == "sglang sm90 avx2"


@pytest.mark.parametrize("parts", [1, 3, 20])
def test_shards_are_all_targets_once(parts):
    whole = pairs(ask(["80", "90", "103", "120"], ["avx2", "avx512"]))
    shards = [pairs(ask(["80", "90", "103", "120"], ["avx2", "avx512"], (part, parts))) for part in range(1, parts + 1)]
    assert sorted(one for shard in shards for one in shard) == sorted(whole)
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("sms", "isas", "recipes", "words"), [
    (["90", "91"], ["avx512"], ["sglang"], "91"), (["90"], ["avx513"], ["sglang"], "'avx512'"),
    (["90"], ["avx512"], ["sglan"], "'sglang'"),
])  # fmt: skip
def test_an_unknown_name_is_refused_before_anything_else(sms, isas, recipes, words):
    with pytest.raises(RecipeError, match=words):
        ask(sms, isas, recipes=recipes)


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_a_shard_is_one_of_its_number(shard):
    done = CliRunner().invoke(matrix, ["--sm", "90", "--isa", "avx2", "--shard", shard])
    assert done.exit_code == 2
    assert "is not a part such as 1/4" in done.output


def test_a_shard_without_targets_is_none_and_a_matrix_without_is_an_error():
    assert pairs(ask(["90", "103"], shard=(2, 2))) == []
    with pytest.raises(RecipeError, match="SM 103") as fault:
        ask(["103", "61"])
    assert "SGLang only supports sm75" in str(fault.value)
