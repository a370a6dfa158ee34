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
VARIANT = "sglang-python312-cuda12_8-{}-{}"


def ask(sms=(), isas=("avx512",), shard=(1, 1), recipes=("sglang",), **more):
    return aims(Ask(order=ORDER, recipes=recipes, sms=sms, isas=isas, shard=shard, **more))


def reasons(found):
    return {one.name: " ".join(map(str, one.refused)) for one in found if one.refused}


def pairs(found):
    return [(*one.sms, one.isa) for one in found if not one.refused]


def test_every_sm_comes_with_every_instruction_set_once():
    assert pairs(ask(["90", "sm_80", "9.0"], ["avx2", "AVX-512", "avx512"])) == [
        (90, "avx2"), (80, "avx2"), (90, "avx512"), (80, "avx512"),
    ]  # fmt: skip


def test_all_is_every_sm_and_what_the_recipe_cannot_serve_is_refused_with_its_reason():
    found = ask(["all"])
    assert {one.sms[0] for one in found if not one.refused} == SERVED
    refused = {one.sms[0]: " ".join(map(str, one.refused)) for one in found if one.refused}
    assert "SGLang only supports sm75 and above" in refused[61]
    assert "CUDA 12.8" in refused[103]
    assert {61, 75, 87, 103, 110, 121} == refused.keys()


def test_a_set_of_sms_is_one_target_and_is_refused_for_any_of_them():
    assert pairs(ask(["80,90", "80", "90+80", "9.0+80"])) == [(80, 90, "avx512"), (80, "avx512")]
    refused = {one.sms: " ".join(map(str, one.refused)) for one in ask(["90", "61+90"]) if one.refused}
    assert refused.keys() == {(61, 90)}
    assert "cannot serve SM 61" in refused[61, 90]
    (one,) = ask(["90+80"])
    assert (one.order.request.sm, one.name) == ("80+90", "sglang sm80_90 avx512")


def test_a_request_is_for_its_own_target():
    (one,) = ask(["9.0"], ["avx2"])
    assert (one.order.request.recipe, one.order.request.sm, one.order.request.isa) == ("sglang", "90", "avx2")
    assert one.name == "sglang sm90 avx2"


def test_gpus_are_sms_by_another_name():
    found = ask(["90", "80+90"], ["avx2"], gpus=["H200", "rtx-5090", "A100"])
    assert pairs(found) == [(90, "avx2"), (80, 90, "avx2"), (120, "avx2"), (80, "avx2")]
    assert [one.name for one in found[2:]] == ["sglang RTX 5090 avx2", "sglang A100 avx2"]


def test_a_gpu_whose_own_cpu_is_another_is_refused_and_its_architecture_is_not():
    found = ask(gpus=["GB200", "B200"], isas=["avx512"])
    assert pairs(found) == [(100, "avx512")]
    assert "the CPU of GB200 does not run avx512" in reasons(found)["sglang GB200 avx512"]


def test_variants_are_whole_targets_beside_the_others():
    found = ask(["80"], ["avx2"], variants=[VARIANT.format(*one) for one in (("sm90", "avx512"), ("sm80", "avx2"))])
    assert pairs(found) == [(80, "avx2"), (90, "avx512")]
    assert found[1].name == VARIANT.format("sm90", "avx512")
    assert (found[1].order.request.variant, found[1].order.request.sm) == (found[1].name, None)


def test_variants_that_differ_in_their_python_are_several():
    named = [f"sglang-python{minor}-cuda12_8-sm90-avx512" for minor in ("312", "311", "312")]
    assert [one.name for one in ask(isas=(), recipes=(), variants=named)] == named[:2]
    # The recipe's first Python is that of who names none.
    assert [one.name for one in ask(["90"], variants=named)] == ["sglang sm90 avx512", named[1]]


def test_variants_alone_are_enough_and_may_be_for_several_architectures():
    found = ask(isas=(), recipes=(), variants=[VARIANT.format("sm80_90", "avx512"), VARIANT.format("all", "avx2")])
    assert pairs(found) == [(80, 90, "avx512"), (*sorted(SERVED), "avx2")]
    assert {one.recipe for one in found} == {"sglang"}


def test_a_variant_that_no_recipe_composes_is_refused_with_its_reason():
    named = [VARIANT.format("sm90", "avx512"), "sglang-python312-cuda12_9-sm90-avx512", VARIANT.format("sm61", "avx2")]
    found = ask(isas=(), recipes=(), variants=named)
    assert pairs(found) == [(90, "avx512")]
    assert "is not offered on CUDA 12.9" in reasons(found)[named[1]]
    assert "only supports sm75 and above" in reasons(found)[named[2]]


@pytest.mark.parametrize(("more", "words"), [
    ({"sms": ["90"], "isas": ()}, "missing --isa"),
    ({"gpus": ["H100"], "isas": ()}, "missing --isa"),
    ({"sms": ["90"], "isas": (), "variants": [VARIANT.format("sm90", "avx2")]}, "missing --isa"),
    ({"variants": [VARIANT.format("sm90", "avx2")]}, "missing --sm or --gpu"),
    ({"isas": ()}, "missing --sm or --gpu"),
    ({"gpus": ["GB200"]}, "the CPU of GB200 does not run avx512"),
    ({"sms": ["103"]}, "CUDA 12.8 emits no code for SM 103"),
    ({"sms": ["61"]}, "only supports sm75 and above"),
])  # fmt: skip
def test_what_cannot_be_meant_is_an_error(more, words):
    with pytest.raises(RecipeError, match=words):
        ask(**more)


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


def test_all_unknown_names_are_told_together_with_the_nearest():
    with pytest.raises(RecipeError) as fault:
        ask(["91"], ["avx513"], gpus=["H101"])
    for words in ("'91'", "Did you mean 'avx512'?", "Did you mean 'H100'?"):
        assert words in str(fault.value)
    with pytest.raises(RecipeError, match="Did you mean 'avx512'"):
        ask(["90"], variants=[VARIANT.format("sm90", "avx513")])


def test_the_command_line_takes_several_of_each():
    words = ["--sm", "61", "--sm", "75,103", "--gpu", "GB200,P4", "--isa", "avx512", "--variant",
             VARIANT.format("sm61", "avx2")]  # fmt: skip
    done = CliRunner().invoke(matrix, words)
    assert isinstance(done.exception, RecipeError)
    for text in ("SM 61", "SM 75", "SM 103", "the CPU of GB200"):
        assert text in str(done.exception)


def test_a_key_without_a_remote_is_refused(tmp_path):
    done = CliRunner().invoke(matrix, ["--sm", "90", "--isa", "avx2", "--remote-key", str(tmp_path / "key")])
    assert isinstance(done.exception, RecipeError)
    assert "a key, but no remote" in str(done.exception)


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
