"""Overlays as untrusted data: what they add, what they may not say, and when two of them contradict each other."""

from __future__ import annotations

import copy
import tomllib
from pathlib import Path
from typing import Any

import pytest

from composer.errors import RecipeError
from composer.model.overlay import Overlay, overlaid, parse_overlay
from composer.model.recipe import Recipe, parse_recipe
from composer.model.target import Target
from composer.steps.load import load_recipe
from composer.steps.locks import lock_request
from tests.recipes import head

RECIPE = (
    head()
    + """\
serve = "bin/serve"
[environment]
MODE = "full"
[[untouched]]
names = ["frozen"]
reason = "its licence"
[[component]]
name = "alpha"
version = "1.0"
prune = [{ paths = ["alpha/docs/**"], reason = "documentation" }]
imports = ["alpha"]
[[component]]
name = "closed"
untouched = "its licence"
"""
)
OVERLAY = """\
schema = 1
summary = "Less"
serve = "bin/serve --less"
[environment]
MODE = "less"
[[component]]
name = "alpha"
prune = [{ paths = ["alpha/more/**"], reason = "not served" }]
[[component]]
name = "beta"
links = [{ path = "beta/a", to = "beta/b", reason = "a copy" }]
[[stub]]
library = "vendor/lib/libvendor.so.1"
distribution = "vendor"
symbols = ["vendor*"]
status = 16
reason = "nobody calls it"
message = "compose without it"
"""
TARGET = Target(sms=(90,), isa="avx512", cuda="12.8", python="3.12")


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return parse_recipe(tomllib.loads(RECIPE), "small.toml")


def overlay(recipe: Recipe, **changes: Any) -> Overlay:
    return parse_overlay({**tomllib.loads(OVERLAY), **changes}, recipe, "less.toml")


def only(recipe: Recipe, **keys: Any) -> Overlay:
    return parse_overlay({"schema": 1, "summary": "x", **keys}, recipe, "other.toml")


# --- what it adds -----------------------------------------------------------------------------------------------------


def test_edits_are_added_and_values_replaced(recipe: Recipe) -> None:
    found = overlaid(recipe, {"less": overlay(recipe)})
    alpha = found.component_of("alpha")
    assert [rule.paths for rule in alpha.prune] == [("alpha/docs/**",), ("alpha/more/**",)]
    assert (alpha.version, alpha.imports) == ("1.0", ("alpha",))
    assert found.component_of("beta").links[0].to == "beta/b"
    assert (found.serve, found.environment) == ("bin/serve --less", {"MODE": "less"})
    assert recipe.component_of("alpha").prune == alpha.prune[:1]


def test_a_stub_leaves_out_what_it_replaces(recipe: Recipe) -> None:
    (rule,) = overlaid(recipe, {"less": overlay(recipe)}).component_of("vendor").prune
    assert rule.paths == ("vendor/lib/libvendor.so.1",)
    assert rule.reason == "a stub takes its place: nobody calls it"
    assert recipe.component_of("vendor").prune == ()


def test_the_order_of_overlays_does_not_matter(recipe: Recipe) -> None:
    less = overlay(recipe)
    other = only(recipe, component=[{"name": "alpha", "prune": [{"paths": ["alpha/x"], "reason": "y"}]}])
    assert overlaid(recipe, {"less": less, "other": other}) == overlaid(recipe, {"other": other, "less": less})


def test_a_lock_serves_a_recipe_and_its_overlays_that_ask_for_no_other_version(recipe: Recipe) -> None:
    changed = overlaid(recipe, {"less": overlay(recipe)})
    assert lock_request(changed, "3.12", "x86_64") == lock_request(recipe, "3.12", "x86_64")


# --- what it may not say ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("component.0.index", "pypi"), ("component.0.untouched", "x"), ("cuda", "13.0"), ("pythons", ["3.13"]),
        ("stub.0.states", 5), ("component.0.prun", []),
    ],
)  # fmt: skip
def test_what_is_the_recipes_own_and_unknown_keys_are_refused(recipe: Recipe, path: str, value: object) -> None:
    data: Any = copy.deepcopy(tomllib.loads(OVERLAY))
    *parents, last = [int(word) if word.isdigit() else word for word in path.split(".")]
    inner = data
    for word in parents:
        inner = inner[word]
    inner[last] = value
    with pytest.raises(RecipeError) as caught:
        parse_overlay(data, recipe, "less.toml")
    assert caught.value.what == f"unknown key {path.replace('.0.', '[0].')!r}"
    assert caught.value.where == "less.toml"


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"library": "../libvendor.so"}, "library"), ({"library": "vendor/*.so"}, "library"),
        ({"library": "/usr/lib/libc.so.6"}, "library"), ({"library": ""}, "library"),
        ({"distribution": "Vendor"}, "distribution"), ({"symbols": []}, "symbols"),
        ({"status": 65536}, "status"), ({"status": -65537}, "status"), ({"abort": True}, "status"),
        ({"status": None}, "status"), ({"message": ""}, "message"), ({"message": "a\nb"}, "message"),
        ({"message": "\x1b[31m"}, "message"), ({"message": "x" * 501}, "message"),
    ],
)  # fmt: skip
def test_a_stub_that_cannot_be_meant(recipe: Recipe, change: dict[str, Any], path: str) -> None:
    (stub,) = tomllib.loads(OVERLAY)["stub"]
    with pytest.raises(RecipeError) as caught:
        overlay(recipe, stub=[{**stub, **change}])
    assert caught.value.where == f"less.toml: stub[0].{path}"
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("status", ["16", 1.5, True])
def test_a_status_of_another_type(recipe: Recipe, status: object) -> None:
    (stub,) = tomllib.loads(OVERLAY)["stub"]
    with pytest.raises(RecipeError) as caught:
        overlay(recipe, stub=[{**stub, "status": status}])
    assert caught.value.where == "less.toml: stub[0].status"


def test_faults_have_the_overlays_own_paths(recipe: Recipe) -> None:
    with pytest.raises(RecipeError) as caught:
        overlay(recipe, component=[{"name": "alpha", "prune": [{"paths": ["../x"], "reason": "y"}]}])
    assert caught.value.where == "less.toml: component[0].prune[0].paths"
    with pytest.raises(RecipeError) as caught:
        overlay(recipe, environment={"LD_PRELOAD": "x"})
    assert caught.value.where == "less.toml: environment.LD_PRELOAD"


@pytest.mark.parametrize("schema", [None, 2, "1"])
def test_another_schema(recipe: Recipe, schema: object) -> None:
    with pytest.raises(RecipeError) as caught:
        overlay(recipe, schema=schema)
    assert caught.value.where == "less.toml: schema"


def test_an_overlay_cannot_edit_what_the_recipe_leaves_untouched(recipe: Recipe) -> None:
    other = only(recipe, component=[{"name": "closed", "prune": [{"paths": ["closed/x"], "reason": "y"}]}])
    with pytest.raises(RecipeError, match="contradicts the patches and prunes") as caught:
        overlaid(recipe, {"other": other})
    assert caught.value.where == "small with other: component[1].untouched"


# --- several ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "path"),
    [
        ({"environment": {"MODE": "other"}}, "environment.MODE"), ({"serve": "bin/other"}, "serve"),
        ({"stub": [{**tomllib.loads(OVERLAY)["stub"][0], "status": 17}]}, "stub vendor/lib/libvendor.so.1"),
    ],
)  # fmt: skip
def test_overlays_that_contradict_each_other(recipe: Recipe, keys: dict[str, Any], path: str) -> None:
    with pytest.raises(RecipeError, match="overlays 'less' and 'other' contradict each other") as caught:
        overlaid(recipe, {"other": only(recipe, **keys), "less": overlay(recipe)})
    assert caught.value.where == path


def test_overlays_that_say_the_same(recipe: Recipe) -> None:
    other = only(recipe, environment={"MODE": "less"}, serve="bin/serve --less")
    assert overlaid(recipe, {"less": overlay(recipe), "other": other}).environment == {"MODE": "less"}


def test_a_library_is_replaced_once(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="is replaced twice"):
        overlaid(recipe, {"less": overlay(recipe), "other": only(recipe, stub=tomllib.loads(OVERLAY)["stub"])})


@pytest.mark.parametrize("name", ["Less", "a-b", "a.b", "a b", "", "a" * 32, "ü", "../x"])
def test_a_name_that_cannot_be_part_of_a_bundles_name(recipe: Recipe, name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        overlaid(recipe, {name: overlay(recipe)})
    assert caught.value.where == "--overlay"


@pytest.mark.parametrize("name", ["private", "hostpython"])
def test_a_name_that_says_something_else_in_a_bundles_name(recipe: Recipe, name: str) -> None:
    with pytest.raises(RecipeError, match="has another meaning"):
        overlaid(recipe, {name: overlay(recipe)})


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "small.toml").write_text(RECIPE)
    (tmp_path / "overlays").mkdir()
    (tmp_path / "overlays/less.toml").write_text(OVERLAY)
    (tmp_path / "other.toml").write_text('schema = 1\nsummary = "x"\n')
    return tmp_path


def test_overlays_are_found_by_name_and_path_and_name_the_bundle(home: Path) -> None:
    plain = load_recipe(str(home / "small.toml"))
    other = str(home / "other.toml")
    found = [load_recipe(str(home / "small.toml"), names) for names in (["less", other], [other, "less"])]
    assert found[0] == found[1]
    assert found[0].overlays == ("less", "other")
    assert found[0].bundle_name(TARGET) == "small-python312-cuda12_8-sm90-avx512-less-other"
    assert plain.bundle_name(TARGET) == "small-python312-cuda12_8-sm90-avx512"
    assert plain.digest != found[0].digest
    assert plain.lock_path("3.12", "x86_64") == found[0].lock_path("3.12", "x86_64")


def test_every_byte_of_an_overlay_changes_the_digest(home: Path) -> None:
    before = load_recipe(str(home / "small.toml"), ["less"])
    (home / "overlays/less.toml").write_text(OVERLAY + "# more\n")
    after = load_recipe(str(home / "small.toml"), ["less"])
    assert (before.digest == after.digest, before.recipe == after.recipe) == (False, True)


def test_an_unknown_overlay_names_the_nearest(home: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(home / "small.toml"), ["les"])
    assert (caught.value.what, caught.value.fix) == ("no overlay 'les'", "Did you mean 'less'?")
    with pytest.raises(RecipeError, match="is given twice"):
        load_recipe(str(home / "small.toml"), ["less", str(home / "overlays/less.toml")])


@pytest.mark.parametrize("text", [b"\xff", b"schema = ", b"[" * 5000])
def test_a_file_that_is_no_overlay(home: Path, text: bytes) -> None:
    (home / "overlays/less.toml").write_bytes(text)
    with pytest.raises(RecipeError):
        load_recipe(str(home / "small.toml"), ["less"])


def test_the_shipped_overlay_holds_together() -> None:
    plain, lean = load_recipe("sglang"), load_recipe("sglang", ["lean"])
    assert lean.overlays == ("lean",)
    assert {one.distribution for one in lean.recipe.stub} <= {
        "nvidia-cublas-cu12", "nvidia-cudnn-cu12", "nvidia-cufft-cu12", "nvidia-cufile-cu12", "nvidia-curand-cu12",
        "nvidia-cusolver-cu12", "nvidia-cusparse-cu12", "nvidia-cusparselt-cu12", "nvidia-nvshmem-cu12",
    }  # fmt: skip
    assert lock_request(lean.recipe, "3.12", "x86_64") == lock_request(plain.recipe, "3.12", "x86_64")
