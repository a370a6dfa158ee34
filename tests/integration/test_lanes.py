"""The command line on the small stack: inputs, names of lanes, locks of overlays, the graph."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import First
from tests.servers import Index
from tests.stack import COMPOSE, NAME, PYTHON, TARGET, Stack

OVERLAY = """
schema = 1
summary = "Files of a site"

[[input]]
name = "tuning"
kind = "folder"
files = ["configs/*.json"]
format = "json"
variable = "TUNING_DIR"
reason = "measured there"

[[input]]
name = "graph"
variable = "GRAPH_FILE"
reason = "rings"
"""
NEWER = """
schema = 1
summary = "Another version"

[[requires]]
name = "core-lib"
to = "core-lib==1.0"
reason = "a test of overlays that ask for other versions"
"""
DATA = b'{"1": 16}\n'


@pytest.fixture
def site(stack: Stack) -> Stack:
    """The stack with an overlay that takes inputs, and one that asks for other versions."""
    (stack.home / "overlays").mkdir()
    (stack.home / "overlays/site.toml").write_text(OVERLAY)
    (stack.home / "overlays/newer.toml").write_text(NEWER)
    (stack.home / "mine/configs").mkdir(parents=True)
    (stack.home / "mine/configs/a.json").write_bytes(DATA)
    (stack.home / "rings").write_text("rings\n")
    return stack


def bundle(stack: Stack, name: str) -> Path:
    return stack.output / f"{name}.tar.zst"


def manifest(stack: Stack, name: str) -> Any:
    return json.loads(stack.compose("inspect", str(bundle(stack, name)), "--json").ok().out)


def unpacked(stack: Stack, name: str, folder: Path) -> Path:
    stack.compose("unpack", str(bundle(stack, name)), str(folder)).ok()
    return folder


# --- inputs -----------------------------------------------------------------------------------------------------------

GIVEN = ("--overlay", "site", "--input", "tuning=mine", "--input", "graph=rings")


def test_the_bundle_carries_an_input_and_points_to_it(site: Stack, tmp_path: Path) -> None:
    plan = site.plan(*GIVEN)
    built = site.build(*GIVEN).ok()
    assert f"input:       tuning, 1 file, {len(DATA)} bytes" in built.out
    told = {one["name"]: one for one in manifest(site, f"{NAME}-site")["inputs"]}
    assert told["graph"]["sha256"] == hashlib.sha256(b"rings\n").hexdigest()
    assert plan["inputs"] == [told["graph"], told["tuning"]]
    tree = unpacked(site, f"{NAME}-site", tmp_path / "moved" / "tree")
    assert (tree / "share/inputs/tuning/configs/a.json").read_bytes() == DATA
    say = "import os; print(os.environ['TUNING_DIR'], open(os.environ['GRAPH_FILE']).read(), end='')"
    shown = subprocess.run([tree / "bin/python", "-c", say], capture_output=True, text=True, check=True,
                           env={"PATH": os.defpath}).stdout  # fmt: skip
    assert shown == f"{tree}/share/inputs/tuning rings\n"
    site.compose("verify", str(tree), "--no-imports").ok()
    assert "input:       graph" in site.compose("inspect", str(bundle(site, f"{NAME}-site"))).ok().out


def test_without_it_the_variable_is_not_set(site: Stack) -> None:
    site.build("--overlay", "site", "--input", "graph=rings").ok()
    raw = subprocess.run(["zstd", "-dcq", bundle(site, f"{NAME}-site")], capture_output=True, check=True).stdout
    (site.home / "a.tar").write_bytes(raw)
    with tarfile.open(site.home / "a.tar") as archive:
        lines = archive.extractfile("etc/env").read().decode()  # type: ignore[union-attr]
        assert "GRAPH_FILE?={prefix}/share/inputs/graph" in lines
        assert "TUNING_DIR" not in lines
        assert not [name for name in archive.getnames() if "tuning" in name]


def test_the_same_bytes_make_the_same_bundle_and_others_another(site: Stack) -> None:
    site.build(*GIVEN).ok()
    before = bundle(site, f"{NAME}-site").read_bytes()
    (site.home / "mine").rename(site.home / "yours")
    again = ("--overlay", "site", "--input", "graph=rings", "--input", "tuning=yours")
    assert "up to date" in site.build(*again).ok().out
    assert bundle(site, f"{NAME}-site").read_bytes() == before
    (site.home / "rings").write_text("other\n")
    assert "up to date" not in site.build(*again).ok().out
    assert bundle(site, f"{NAME}-site").read_bytes() != before
    shown = site.compose("plan", "--recipe", str(site.recipe), *TARGET, *again, "--json").ok().out
    assert json.loads(shown)["inputs"][0]["sha256"] == hashlib.sha256(b"other\n").hexdigest()


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        ("build", ("tunin=mine",), "Did you mean 'tuning'?"),
        ("plan", ("tuning=gone",), "gone: is not there"),
        ("estimate", ("tuning=rings",), "rings: is a file"),
        ("build", ("graph=rings", "graph=rings"), "is given twice"),
        ("plan", ("graph",), "'graph' is not NAME=PATH"),
    ],
)
def test_an_input_that_cannot_be_taken(site: Stack, command: str, words: tuple[str, ...], said: str) -> None:
    given = [word for one in words for word in ("--input", one)]
    site.run(site.words("--overlay", "site", *given, command=command)).refused(2, said)
    assert site.leftovers() == []


def test_a_recipe_that_takes_none(site: Stack) -> None:
    site.build("--input", "graph=rings").refused(2, "small 1.0 takes no such input")


def test_the_matrix_takes_inputs_and_refuses_at_once(site: Stack) -> None:
    words = [*COMPOSE, "matrix", "--recipe", str(site.recipe), "--sm", "90", "--isa", "avx512", "--no-imports", "-o",
             str(site.output), "--overlay", "site"]  # fmt: skip
    site.run([*words, "--input", "tuning=gone"]).refused(2, "gone: is not there")
    site.run([*words, "--input", "tuning=mine", "--input", "graph=rings"]).ok()
    assert [one["name"] for one in manifest(site, f"{NAME}-site")["inputs"]] == ["graph", "tuning"]


# --- names, locks -----------------------------------------------------------------------------------------------------


def test_a_lock_of_an_overlay(site: Stack, shelf: Index) -> None:
    own = site.home / f"pylock.small-newer-py{PYTHON.replace('.', '')}-x86_64.toml"
    words = ["--overlay", "newer", "--locked"]
    site.run(site.words(*words, command="plan")).refused(3, str(own), f"compose lock {site.recipe} --overlay newer")
    before = site.lock.read_bytes()
    assert str(own) in site.compose("lock", str(site.recipe), "--overlay", "newer").ok().out
    assert site.lock.read_bytes() == before
    assert f'name = "small-newer-py{PYTHON.replace(".", "")}-x86_64"' in own.read_text()
    planned = json.loads(site.run(site.words(*words, "--json", command="plan")).ok().out)
    assert planned["lock"] == own.name


def test_a_plan_names_the_file_of_its_lock(site: Stack) -> None:
    other = site.home / "pylock.other-py{PYTHON}-x86_64.toml"
    site.recipe.rename(site.home / "other.toml")
    site.lock.rename(other.with_name(f"pylock.other-py{PYTHON.replace('.', '')}-x86_64.toml"))
    shown = site.compose("plan", "--recipe", str(site.home / "other.toml"), *TARGET, "--locked").ok().out
    assert f"pylock.other-py{PYTHON.replace('.', '')}-x86_64.toml" in shown


def test_lanes_lists_what_is_shipped(stack: Stack) -> None:
    rows = {one["alias"]: one for one in json.loads(stack.compose("lanes", "--json").ok().out)}
    assert rows["sglang"]["name"] == "sglang:0.5.9"
    assert all(lock["present"] for row in rows.values() for lock in row["locks"])
    assert "sglang:0.5.9" in stack.compose("lanes").ok().out


def test_targets_shows_every_recipe_of_a_version(stack: Stack) -> None:
    shown = json.loads(stack.compose("targets", "--recipe", "sglang:0.5.23", "--gpu", "GB200", "--json").ok().out)
    assert [one["recipe"] for one in shown["sm"][0]["recipes"]] == ["sglang-forward", "sglang-forward-aarch64"]


# --- the graph --------------------------------------------------------------------------------------------------------


def test_the_graph_is_that_of_the_wheels(first: First) -> None:
    words = ["--recipe", str(first.stack.recipe), *TARGET]
    shown = first.stack.compose("graph", *words).ok().out
    assert "└── core-lib 1.0 (core-lib==0.9), replaced by core-lib==1.0: the pin of native-ext is too old" in shown
    assert "dropped: heavy>=3: only training needs it" in shown
    assert "4 distributions; of 3 requirements 1 dropped, 1 replaced" in shown
    told = json.loads(first.stack.compose("graph", *words, "--json").ok().out)
    assert {one["name"]: one["root"] for one in told["nodes"]} == {
        "app": True, "core-lib": False, "hook": True, "native-ext": False,
    }  # fmt: skip
    assert (told["name"], told["lock"]) == (NAME, first.stack.lock.name)


def test_the_graph_downloads_nothing(fresh: Stack) -> None:
    shown = fresh.compose("graph", "--recipe", str(fresh.recipe), *TARGET).ok().out
    assert "not at hand, and so not read (see compose fetch): app, core-lib, hook, native-ext" in shown
    assert not [path for path in (fresh.store / "artifacts").rglob("*") if path.is_file()]


# --- what a recipe asks of hosts --------------------------------------------------------------------------------------

FLOOR = """
[[floor]]
name = "L4T"
version = "99"
sm = [90]
reason = "the recipe: only the newest"
"""


@pytest.mark.skipif(Path("/etc/nv_tegra_release").exists(), reason="this machine is a Jetson")
def test_a_bundle_for_jetsons_refuses_other_hosts(stack: Stack, tmp_path: Path) -> None:
    stack.edit('[[component]]\nname = "app"', f'{FLOOR}\n[[component]]\nname = "app"')
    assert "L4T 99 or newer" in stack.build().ok().out
    assert manifest(stack, NAME)["floors"]["L4T"] == {"version": "99", "because": "the recipe: only the newest"}
    words = ["unpack", str(stack.bundle), str(tmp_path / "tree")]
    stack.compose(*words).refused(10, "needs L4T 99; this host has none", "the recipe: only the newest", "--any-host")
    stack.compose(*words, "--any-host").ok()
    done = subprocess.run([tmp_path / "tree/bin/python", "-c", ""], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (16, "")
    verified = stack.compose("verify", str(tmp_path / "tree")).ok().out
    assert "import.skipped" in verified
    assert "no module was imported: the bundle needs L4T 99; this host has none" in verified


def test_it_is_asked_of_bundles_for_those_gpus_only(stack: Stack) -> None:
    stack.edit('[[component]]\nname = "app"', f'{FLOOR}\n[[component]]\nname = "app"')
    words = ["build", "--recipe", str(stack.recipe), "--sm", "90,100", "--isa", "avx512", "-o", str(stack.output),
             "--no-imports"]  # fmt: skip
    stack.run([*COMPOSE, *words]).ok()
    (made,) = stack.output.glob("*.tar.zst")
    assert "L4T" not in json.loads(stack.compose("inspect", str(made), "--json").ok().out)["floors"]
