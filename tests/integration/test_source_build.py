"""`compose build` with components from source: when they are built, what the bundle says of it, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from tests.servers import File, Index
from tests.sources import BACKEND, FILES, NAME, offer, sdist, write_recipe
from tests.stack import PTH, TARGET, Stack
from tests.wheels import build_wheel, wheel_filename

pytestmark = pytest.mark.skipif(shutil.which("ninja") is None, reason="the small source is built by ninja")
PREBUILT = b"a prebuilt library\n"


@pytest.fixture
def index() -> Iterator[Index]:
    with Index() as server:
        offer(server)
        wheel = build_wheel(NAME, "1.0", {"small_ext.txt": PREBUILT}, tag="py3-none-any")
        server.add(NAME, File(filename=wheel_filename(NAME, "1.0", "py3-none-any"), data=wheel))
        server.add("hook", File(filename=wheel_filename("hook", "1.0", "py3-none-any"),
                                data=build_wheel("hook", "1.0", {"hook.py": PTH})))  # fmt: skip
        yield server


@pytest.fixture
def small(index: Index, tmp_path: Path) -> Stack:
    return write_recipe(tmp_path, index.url)


def members(stack: Stack) -> set[str]:
    """Names of all members below site-packages."""
    listed = subprocess.run(["tar", "--zstd", "-tf", stack.bundle], capture_output=True, text=True, check=True).stdout
    return {line.partition("/site-packages/")[2] for line in listed.splitlines()}


def manifest(stack: Stack) -> dict[str, object]:
    found: dict[str, object] = json.loads(stack.compose("inspect", str(stack.bundle), "--json").ok().out)
    return found


def test_a_component_with_a_source_is_built(small: Stack) -> None:
    done = small.build().ok()
    assert {"small_ext.so", "small_ext-1.0+avx512.dist-info/compose-source.json"} <= members(small)
    assert "source:   small-ext 1.0+avx512 from sha256:" in done.out
    (built,) = cast("list[dict[str, str]]", manifest(small)["built"])
    assert (built["name"], built["version"]) == ("small-ext", "1.0+avx512")
    assert small.compose("verify", str(small.bundle)).ok()


def test_an_interrupted_stack_goes_on_and_the_second_run_builds_nothing(small: Stack, index: Index) -> None:
    small.build().ok()
    index.down = True
    again = small.build("--offline").ok()
    assert "output is up to date" in again.out
    assert len((small.home / "trace").read_text().split()) == 2


def test_asked_for_by_name_only(small: Stack) -> None:
    small.edit("sdist = true", 'sdist = true\nwhen = "asked"')
    small.build().ok()
    assert "small_ext.txt" in members(small)
    assert manifest(small)["built"] == []
    small.build("--no-binary", NAME).ok()
    assert "small_ext.so" in members(small)


def test_a_plan_compiles_nothing(small: Stack) -> None:
    done = small.build("--dry-run").ok()
    assert "source:   small-ext 1.0+avx512" in done.out
    assert not (small.home / "trace").exists()
    assert [one["name"] for one in small.plan()["built"]] == [NAME]


def test_the_graph_reads_what_was_built(small: Stack) -> None:
    words = ["graph", "--recipe", str(small.recipe), *TARGET]
    assert f"not read (see compose fetch): {NAME}" in small.compose(*words).ok().out
    assert not (small.home / "trace").exists()
    small.build().ok()
    (node,) = json.loads(small.compose(*words, "--json").ok().out)["nodes"]
    assert (node["name"], node["version"], node["requires"]) == (NAME, "1.0+avx512", [])


def test_what_no_index_has_as_a_wheel(small: Stack, index: Index) -> None:
    index.projects[NAME] = [File(filename="small_ext-1.0.tar.gz", data=sdist(FILES))]
    small.edit("sdist = true", "sdist = true\nprebuilt = false")
    small.build().ok()
    assert "small_ext.so" in members(small)


def test_what_no_index_has_and_cannot_be_built_is_gone_without(small: Stack, index: Index) -> None:
    index.projects[NAME] = [File(filename="small_ext-1.0.tar.gz", data=sdist(FILES))]
    small.edit("sdist = true", 'sdist = true\nprebuilt = false\nwhen = "auto"')
    small.recipe.write_text(small.recipe.read_text() + '\n[[component]]\nname = "hook"\nversion = "1.0"\n')
    done = small.build().ok()
    assert "small-ext is not built from source: no record says how long it takes" in done.out
    assert not any(name.startswith("small_ext") for name in members(small))
    assert "hook.py" in members(small)
    small.build("--no-binary", NAME).ok()
    assert "small_ext.so" in members(small)


def test_a_requirement_that_the_stack_does_not_meet_is_named(small: Stack, index: Index) -> None:
    wanted = r"Version: 1.0\nRequires-Dist: hook>=1\nRequires-Dist: other; python_version < '3'\n"
    backend = BACKEND.replace(r"Version: 1.0\n", wanted, 1)
    assert backend != BACKEND
    index.projects["tiny-build"] = [
        File(filename="tiny_build-1.0-py3-none-any.whl",
             data=build_wheel("tiny-build", "1.0", {"tiny_build.py": backend.encode()}))
    ]  # fmt: skip
    small.build().refused(2, "requires hook>=1", "small-ext 1.0+avx512", "no such distribution")
    small.recipe.write_text(small.recipe.read_text() + '\n[[component]]\nname = "hook"\nversion = "1.0"\n')
    small.build().ok()


def test_what_the_built_wheel_does_not_need_is_left_out(small: Stack) -> None:
    rule = '[[component.build.without]]\nnames = ["hook"]\nreason = "built without hooks"\n'
    small.recipe.write_text(
        small.recipe.read_text() + f'{rule}\n[[component]]\nname = "hook"\nversion = "1.0"\nimports = ["hook"]\n'
    )
    done = small.build().ok()
    assert "left out: hook 1.0: built without hooks" in done.out
    assert "hook.py" not in members(small)


def test_a_name_that_is_not_built(small: Stack) -> None:
    small.build("--no-binary", "hook").refused(2, "does not say how 'hook' is built", NAME)
    small.build("--torch", "source").refused(2, "does not say how PyTorch is built")
    small.build("--torch", "sourced").refused(2, "'sourced' is not a way to have PyTorch")
    assert not (small.home / "trace").exists()


def test_a_budget_that_is_none(small: Stack) -> None:
    small.build("--torch-budget", "soon").refused(2, "'soon' is not a length of time")


def test_everything_for_a_site_without_a_network(small: Stack, index: Index, tmp_path: Path) -> None:
    house = tmp_path / "house"
    words = small.words("-o", str(house), command="fetch", output=False)
    small.run(words).ok()
    assert {one.name for one in house.iterdir()} >= {"small_ext-1.0.tar.gz", "tiny_build-1.0-py3-none-any.whl"}
    index.down = True
    other = small.fresh(tmp_path / "other")
    other.build("--offline", "--wheelhouse", str(house)).ok()
    assert "small_ext.so" in members(other)


def test_a_build_that_fails_leaves_no_bundle(small: Stack, index: Index) -> None:
    index.projects[NAME][0] = File(filename="small_ext-1.0.tar.gz", data=sdist({**FILES, "src/b_second.c": "x"}))
    small.build().refused(5, "the build failed", "b_second.c")
    assert small.leftovers() == []
    assert not small.bundle.exists()
