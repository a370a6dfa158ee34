"""Bundles for several GPU architectures: what any of them needs is there, and nothing that none of them can run."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from composer.steps.bundle import open_bundle
from tests import gpu_wheels
from tests.fatbins import Parts, container, gpu_library, held
from tests.gpu_wheels import FATBINS, KERNELS, MIT, VENDOR, fatbin
from tests.servers import Index
from tests.stack import COMPOSE, NAME, PYTHON, SITE, Done, Stack, serve
from tests.wheels import build_wheel, wheel_filename

#: The host's Python: a bundle without one is made in a third of the time.
_HOST = ("--python", "host")
_ONE, _PAIR, _ALL = (f"{NAME.replace('sm90', name)}-hostpython" for name in ("sm90", "sm90_100", "sm80_90_100"))
_ROUTED = wheel_filename("routed", "1.0", gpu_wheels.TAG)
_ONLY = wheel_filename("only", "1.0", gpu_wheels.TAG)
_RECIPE = f"""
schema = 1
name = "small"
version = "1.0"
summary = "A small stack with GPU code"
cuda = "12.8"
pythons = ["{PYTHON}"]
as-of = 2026-03-10T00:00:00Z
sm = [80, 90, 100]
machines = ["x86_64"]

[[refuse]]
sm = [61, 75]
reason = "its kernels need 8.0"

[[untouched]]
names = ["nvidia-*"]
reason = "CUDA EULA"

[[component]]
name = "kernels"
version = "1.0"
imports = ["kernels"]

[component.slim]
files = ["kernels/lib/*.so"]
licence = "MIT"
text = "licenses/LICENSE"
sha256 = "{hashlib.sha256(MIT).hexdigest()}"

# It loads the folder of its GPU, and needs `only` on an SM 100.
[[component]]
name = "routed"
version = "1.0"
imports = ["routed"]
prune = [
    {{ paths = ["routed/sm90/**"], sm-not = [90], reason = "for 9.0 only" }},
    {{ paths = ["routed/sm100/**"], sm = [90], reason = "for all but 9.0" }},
]
links = [
    {{ path = "routed/fallback.so", to = "routed/sm90/ops.so", sm = [90], reason = "what it loads without a GPU" }},
]
[[component.coverage]]
files = ["routed/sm90/ops.so"]
requires = "every"
sm = [90]
reason = "loaded on 9.0 only"
[[component.coverage]]
files = ["routed/sm100/ops.so"]
requires = "every"
sm-not = [90]
reason = "loaded on all others"

[[component]]
name = "only"
sm = [100]
reason = "its kernels are for sm_100"
[[component.coverage]]
files = ["only/lib.so"]
requires = "every"
reason = "its kernels"
"""


def _object(*names: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return gpu_library(Path(folder, "ops.so"), Parts(fatbins=(fatbin(*names),))).read_bytes()


@pytest.fixture(scope="module")
def shelf() -> Iterator[Index]:
    routed = {"routed/__init__.py": b"", "routed/sm90/ops.so": _object("elf90"),
              "routed/sm100/ops.so": _object("elf80", "elf100")}  # fmt: skip
    only = {"only/__init__.py": b"", "only/lib.so": _object("elf100")}
    with Index() as index:
        serve(index, {
            KERNELS: gpu_wheels.kernels(), VENDOR: gpu_wheels.vendor(),
            _ROUTED: build_wheel("routed", "1.0", routed, tag=gpu_wheels.TAG, requires=["only==1.0"]),
            _ONLY: build_wheel("only", "1.0", only, tag=gpu_wheels.TAG),
        })  # fmt: skip
        yield index


def _changed(pair: Stack, home: Path, old: str, new: str) -> Stack:
    """The same with another recipe and the same lock; what both have in common is in the store."""
    assert old in _RECIPE
    stack = replace(pair, home=home, output=home / "out")
    stack.recipe.write_text(_RECIPE.replace(old, new))
    shutil.copyfile(pair.lock, stack.lock)
    return stack


def _built(stack: Stack, sms: str, *more: str) -> Done:
    return stack.build("--sm", sms, *_HOST, *more)


@pytest.fixture(scope="module")
def pair(shelf: Index, tmp_path_factory: pytest.TempPathFactory) -> Stack:
    """A bundle for SM 90 and 100, whose modules were imported. Tests do not change it, and may build beside it."""
    home = tmp_path_factory.mktemp("pair")
    stack = Stack(home=home, index_url=shelf.url, store=home / "store", output=home / "out")
    stack.recipe.write_text(_RECIPE)
    _built(stack, "90,100", "--imports").ok()
    return stack


@pytest.fixture(scope="module")
def tree(pair: Stack) -> Path:
    folder = pair.home / "tree"
    folder.mkdir()
    subprocess.run(["tar", "--zstd", "-xf", pair.output / f"{_PAIR}.tar.zst", "-C", folder], check=True)
    return folder


def _manifest(stack: Stack, name: str = _PAIR) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(open_bundle(stack.output / f"{name}.tar.zst").manifest_json)
    return found


def _paths(stack: Stack, name: str = _PAIR) -> set[str]:
    layers = _manifest(stack, name)["layers"]
    return {entry["path"].removeprefix(f"{SITE}/") for layer in layers for entry in layer["entries"]}


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_the_bundle_says_what_it_is_for(pair: Stack, tree: Path) -> None:
    manifest = _manifest(pair)
    assert (manifest["name"], manifest["target"]["sm"], manifest["floors"]["SM"]["version"]) == (
        _PAIR, "90 100", "90 100",
    )  # fmt: skip
    assert [one for one in manifest["properties"] if "sm_arch" in one] == [
        "nvidia :: sm_arch :: 100_real", "nvidia :: sm_arch :: 90_real",
    ]  # fmt: skip
    assert json.loads((tree / "share/compose/target.json").read_bytes())["sm"] == [90, 100]
    assert json.loads((tree / "share/compose/profiles.json").read_bytes())["sm"] == [90, 100]


def test_code_of_each_stays_and_other_code_is_cut(tree: Path) -> None:
    assert held(tree / SITE / "kernels/lib/libfat.so", 2) == [fatbin("elf90", "elf100"), container()]
    assert held(tree / SITE / "nvidia/vendor/lib/libvendor.so.12", 2) == [*FATBINS]


def test_only_what_no_sm_needs_is_pruned_and_what_one_needs_is_linked_and_composed(pair: Stack) -> None:
    assert {"routed/sm90/ops.so", "routed/sm100/ops.so", "routed/fallback.so", "only/lib.so"} <= _paths(pair)
    metadata = next(one for one in _manifest(pair)["layers"] if one["name"] == "routed")["changes"].get("requires", [])
    assert metadata == []  # the requirement of `only` is met for one of them


def test_it_verifies_packed_and_unpacked(pair: Stack, tree: Path) -> None:
    for place in (pair.output / f"{_PAIR}.tar.zst", tree):
        found = json.loads(pair.compose("verify", str(place), "--json").ok().out)
        assert [one for one in found["findings"] if one["severity"] == "error"] == []


def test_a_library_that_one_sm_has_no_use_for_need_not_cover_it(pair: Stack) -> None:
    rules = {rule["files"][0]: rule.get("sm-not", []) for rule in _manifest(pair)["coverage"]}
    assert rules == {"routed/sm90/ops.so": [], "routed/sm100/ops.so": [90], "only/lib.so": [90]}


# --- how it is asked for ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [
    ("--sm", "100+90"), ("--sm", "sm_90, 10.0,90"), ("--sm", "90,100", "--gpu", "H100", "--gpu", "B200"),
])  # fmt: skip
def test_one_set_is_one_bundle_however_it_is_spelled(pair: Stack, words: tuple[str, ...]) -> None:
    assert json.loads(pair.build("--dry-run", "--json", *_HOST, *words).ok().out)["up_to_date"] is True


def test_all_are_those_that_the_recipe_serves_and_the_others_are_told(pair: Stack) -> None:
    done = _built(pair, "all").ok()
    assert "without:  SM 61: its kernels need 8.0" in done.out
    assert "without:  SM 120: small 1.0 is not offered for SM 120" in done.out
    assert _manifest(pair, _ALL)["target"]["sm"] == "80 90 100"
    plan = pair.plan("--sm", "80,90,100", *_HOST)
    assert (plan["name"], plan["up_to_date"], plan["not_served"]) == (_ALL, True, {})
    assert pair.plan("--sm", "all", *_HOST)["not_served"].keys() == {
        "61",
        "75",
        "86",
        "87",
        "89",
        "103",
        "110",
        "120",
        "121",
    }


def test_all_of_a_recipe_for_one_is_the_bundle_for_that(pair: Stack, tmp_path: Path) -> None:
    stack = _changed(pair, tmp_path, "sm = [80, 90, 100]", "sm = [90]")
    assert stack.plan("--sm", "all", *_HOST)["name"] == _ONE


def test_what_is_the_same_for_all_is_shared_with_bundles_for_one(pair: Stack) -> None:
    _built(pair, "90").ok()
    one, both = (
        {layer["name"]: layer["key"] for layer in pair.plan("--sm", sms, *_HOST)["layers"]} for sms in ("90", "90,100")
    )
    assert {name for name in one if one[name] == both[name]} == {"nvidia-vendor"}
    assert both.keys() - one.keys() == {"only"}
    assert not {"routed/sm100/ops.so", "only/lib.so"} & _paths(pair, _ONE)


def test_a_matrix_makes_each_set_one_bundle(pair: Stack) -> None:
    words = ["matrix", "--recipe", str(pair.recipe), "--sm", "100,100+90,61+90", "--isa", "avx512", "--json", "-o",
             str(pair.output), "--no-imports", *_HOST]  # fmt: skip
    report = json.loads(pair.run([*COMPOSE, *words]).ok().out.splitlines()[-1])["report"]
    fates = {tuple(one["sms"]): one["fate"] for one in report["targets"]}
    assert fates == {(100,): "built", (90, 100): "up to date", (61, 90): "refused"}


@pytest.mark.parametrize("command", ["fetch", "estimate"])
def test_other_commands_take_a_set(pair: Stack, command: str) -> None:
    pair.run(pair.words("--sm", "90+100", *_HOST, command=command, output=False)).ok()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sms", "words"),
    [
        ("90,61", ("small 1.0 cannot serve SM 61", "its kernels need 8.0")),
        ("61+120,75", ("cannot serve SM 61", "cannot serve SM 75", "not offered for SM 120")),
        ("90,103", ("CUDA 12.8 emits no code for SM 103",)),
    ],
)  # fmt: skip
def test_a_set_is_refused_for_each_of_them(pair: Stack, sms: str, words: tuple[str, ...]) -> None:
    _built(pair, sms).refused(2, *words)


def test_code_must_be_there_for_each(pair: Stack, tmp_path: Path) -> None:
    stack = _changed(pair, tmp_path, "sm = [80, 90, 100]", "sm = [90, 100, 120]")
    _built(stack, "90,120").refused(9, "routed/sm100/ops.so", "nothing for SM 120")
    assert stack.leftovers() == []


@pytest.mark.parametrize(
    ("links", "words"),
    [
        ('{ path = "routed/fallback.so", to = "routed/sm100/ops.so", sm = [100], reason = "another" }',
         ("cannot point at both 'routed/sm100/ops.so' and 'routed/sm90/ops.so'", "asked for by SM 100 and SM 90")),
        ('{ path = "routed/sm100/ops.so", to = "routed/sm90/ops.so", sm = [90], reason = "in its place" }',
         ("'routed/sm100/ops.so' is there already", "pruned for some of SM 90, 100")),
    ],
)  # fmt: skip
def test_links_that_two_sms_want_differently(pair: Stack, tmp_path: Path, links: str, words: tuple[str, ...]) -> None:
    stack = _changed(pair, tmp_path, "links = [\n", f"links = [\n    {links},\n")
    _built(stack, "90", "--dry-run").ok()
    _built(stack, "90,100", "--dry-run").refused(2, *words)


def test_a_link_that_two_sms_want_alike_is_one(pair: Stack, tmp_path: Path) -> None:
    again = '{ path = "routed/fallback.so", to = "routed/sm90/ops.so", sm = [100], reason = "the same" }'
    stack = _changed(pair, tmp_path, "links = [\n", f"links = [\n    {again},\n")
    (edits,) = [one["edits"] for one in stack.plan("--sm", "90,100", *_HOST)["layers"] if one["name"] == "routed"]
    assert "1 link" in edits
