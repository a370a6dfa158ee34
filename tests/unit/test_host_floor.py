"""What a recipe asks of hosts: for which GPUs, and what it may not say."""

from __future__ import annotations

import tomllib

import pytest

from composer.errors import RecipeError
from composer.model.host_floor import HostFloor
from composer.model.manifest import Floor
from composer.model.recipe import Recipe, parse_recipe
from composer.proofs.floors import stated_floors
from composer.steps.load import load_recipe
from tests.recipes import head

RECIPE = (
    head(sm=(90, 110))
    + """\
[[refuse]]
sm = [87]
reason = "a test"
[[component]]
name = "alpha"
version = "1.0"
[[floor]]
name = "L4T"
version = "38"
sm = [87, 110]
reason = "the recipe: JetPack 7"
"""
)


def recipe(old: str = "", new: str = "") -> Recipe:
    return parse_recipe(tomllib.loads(RECIPE.replace(old, new)), "small.toml")


@pytest.mark.parametrize(
    ("sms", "asked"), [((110,), True), ((87, 110), True), ((90,), False), ((90, 110), False), ((80, 90), False)]
)
def test_it_holds_where_all_gpus_are_of_jetsons(sms: tuple[int, ...], asked: bool) -> None:
    wanted = {"L4T": Floor(version="38", because="the recipe: JetPack 7")} if asked else {}
    assert stated_floors(recipe().floor, sms) == wanted


@pytest.mark.parametrize("versions", [("38", "36.4"), ("36.4", "38"), ("9", "38")])
def test_of_several_that_hold_the_newest_counts(versions: tuple[str, str]) -> None:
    floors = [HostFloor(name="L4T", version=one, sm=(110,), reason=one) for one in versions]
    assert stated_floors(floors, [110]) == {"L4T": Floor(version="38", because="38")}


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ('"38"', '"r38"', "floor[0].version"), ('"38"', '"38.1.2.3"', "floor[0].version"),
        ("[87, 110]", "[]", "floor[0].sm"), ("[87, 110]", "[120]", "floor[0].sm"),
        ('"the recipe: JetPack 7"', '"a\\ttab"', "floor[0].reason"),
        ('"the recipe: JetPack 7"', '""', "floor[0].reason"),
        ('"L4T"', '"l4t"', "floor[0].name"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant(old: str, new: str, where: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(old, new)
    assert where in str(caught.value)


def test_thor_needs_jetpack_7() -> None:
    shipped = load_recipe("sglang-forward-aarch64").recipe
    assert stated_floors(shipped.floor, [110])["L4T"].version == "38"
    assert {sm for sm in shipped.sm if stated_floors(shipped.floor, [sm])} == {110}
