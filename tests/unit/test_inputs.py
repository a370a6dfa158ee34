"""Files of a site's own: what a recipe may ask for, and what it is given."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tomllib
from pathlib import Path

import msgspec
import pytest

from composer.errors import RecipeError
from composer.model.input import variables
from composer.model.overlay import overlaid, parse_overlay
from composer.model.recipe import Recipe, parse_recipe
from composer.steps import inputs
from composer.steps.inputs import read_inputs
from composer.steps.load import load_recipe
from tests.recipes import head

RECIPE = (
    head()
    + """\
[[component]]
name = "alpha"
version = "1.0"
[[input]]
name = "tuning"
kind = "folder"
files = ["configs/*/E=*.json"]
format = "json"
variable = "TUNING_DIR"
reason = "measured on the host"
[[input]]
name = "graph"
format = "xml"
variable = "GRAPH_FILE"
reason = "rings"
[[input]]
name = "plain"
variable = "PLAIN"
reason = "anything"
"""
)
NAME = "E=8,N=256,device_name=NVIDIA_X.json"


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return parse_recipe(tomllib.loads(RECIPE), "small.toml")


@pytest.fixture
def tuning(tmp_path: Path) -> Path:
    folder = tmp_path / "tuning"
    (folder / "configs/triton_3_5_1").mkdir(parents=True)
    (folder / "configs/triton_3_5_1" / NAME).write_text('{"1": {"BLOCK_SIZE_M": 16}}')
    (folder / "configs/triton_3_4_0").mkdir()
    (folder / "configs/triton_3_4_0" / NAME).write_text("{}")
    return folder


def written(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# --- what is read -----------------------------------------------------------------------------------------------------


def test_a_folder_is_taken_whole(recipe: Recipe, tuning: Path) -> None:
    (given,) = read_inputs(recipe, [("tuning", tuning)])
    assert {path: len(data) for path, data in given.files.items()} == {
        f"share/inputs/tuning/configs/triton_3_4_0/{NAME}": 2, f"share/inputs/tuning/configs/triton_3_5_1/{NAME}": 27,
    }  # fmt: skip
    assert variables([given]) == {"TUNING_DIR": "{prefix}/share/inputs/tuning"}
    assert (given.facts.files, given.facts.size, given.facts.path) == (2, 29, "share/inputs/tuning")


def test_the_digest_of_a_folder_is_that_of_sha256sum(recipe: Recipe, tuning: Path) -> None:
    (given,) = read_inputs(recipe, [("tuning", tuning)])
    told = subprocess.run("find * -type f | LC_ALL=C sort | xargs sha256sum", shell=True, cwd=tuning, check=True,
                          capture_output=True).stdout  # fmt: skip
    assert given.facts.sha256 == hashlib.sha256(told).hexdigest()


def test_a_file_is_known_by_its_own_digest(recipe: Recipe, tmp_path: Path) -> None:
    data = b'<graphs version="1"></graphs>\n'
    (given,) = read_inputs(recipe, [("graph", written(tmp_path, "any name.txt", data))])
    assert given.files == {"share/inputs/graph": data}
    assert given.facts.sha256 == hashlib.sha256(data).hexdigest()


def test_a_link_to_a_file_is_what_it_leads_to(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(written(tmp_path, "a", b"x"))
    assert read_inputs(recipe, [("plain", tmp_path / "link")])[0].content == {"": b"x"}


def test_the_order_on_the_command_line_does_not_matter(recipe: Recipe, tuning: Path, tmp_path: Path) -> None:
    words = [("tuning", tuning), ("plain", written(tmp_path, "a", b""))]
    found = read_inputs(recipe, words)
    assert found == read_inputs(recipe, words[::-1])
    assert [one.declared.name for one in found] == ["plain", "tuning"]


def test_nothing_given_is_nothing_set(recipe: Recipe) -> None:
    assert read_inputs(recipe, []) == ()
    assert variables([]) == {}


# --- what is refused --------------------------------------------------------------------------------------------------


def refusal(recipe: Recipe, *given: tuple[str, Path]) -> str:
    with pytest.raises(RecipeError) as caught:
        read_inputs(recipe, given)
    return str(caught.value)


def test_a_name_that_is_not_known(recipe: Recipe, tmp_path: Path) -> None:
    assert "Did you mean 'tuning'?" in refusal(recipe, ("tunning", tmp_path))
    assert "It takes: tuning, graph, plain." in refusal(recipe, ("zzz", tmp_path))
    assert "small 1.0 takes no such input" in refusal(msgspec.structs.replace(recipe, input=()), ("graph", tmp_path))


def test_a_name_that_is_given_twice(recipe: Recipe, tmp_path: Path) -> None:
    assert "is given twice" in refusal(recipe, ("plain", tmp_path), ("plain", tmp_path))


def test_faults_of_all_inputs_are_told_together(recipe: Recipe, tmp_path: Path) -> None:
    told = refusal(recipe, ("graph", tmp_path / "gone"), ("plain", tmp_path), ("tuning", written(tmp_path, "a", b"")))
    assert f"--input graph: {tmp_path}/gone: is not there" in told
    assert f"--input plain: {tmp_path}: is a folder" in told
    assert f"--input tuning: {tmp_path}/a: is a file" in told


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        (f"configs/t/{NAME}", "{", "is no JSON: Expecting"),
        (f"configs/t/{NAME}", "[" * 100_000, "is no JSON: maximum recursion"),
        (f"configs/t/{NAME}", b"\xff\xfe", "is no JSON: "),
        (NAME, "{}", "has a name that nothing would look for"),
        ("configs/t/README.md", "{}", "has a name that nothing would look for"),
        (f"configs/t/a\n{NAME}", "{}", "has a name that cannot be printed"),
    ],
)
def test_a_file_that_nothing_could_use(recipe: Recipe, tuning: Path, name: str, text: str | bytes, what: str) -> None:
    (tuning / name).parent.mkdir(exist_ok=True)
    written(tuning, name, text)
    told = refusal(recipe, ("tuning", tuning))
    assert what in told
    assert "Give a folder with files such as configs/*/E=*.json, in JSON: measured on the host." in told


@pytest.mark.parametrize("text", ["", "<graphs>", "<a/><b/>", "no XML", '<?xml version="1.0" encoding="foo"?><a/>'])
def test_a_file_that_is_no_xml(recipe: Recipe, tmp_path: Path, text: str) -> None:
    assert "is no XML: " in refusal(recipe, ("graph", written(tmp_path, "a.xml", text)))


def test_a_folder_without_end(recipe: Recipe, tuning: Path) -> None:
    (tuning / "/".join("d" * 40)).mkdir(parents=True)
    assert "lies more than 32 folders deep" in refusal(recipe, ("tuning", tuning))


def test_links_and_pipes_in_a_folder(recipe: Recipe, tuning: Path) -> None:
    (tuning / "configs/link").symlink_to("/etc")
    os.mkfifo(tuning / "configs/pipe")
    told = refusal(recipe, ("tuning", tuning))
    assert "configs/link: is a link" in told
    assert "configs/pipe: is no file" in told


def test_a_pipe_is_not_waited_for(recipe: Recipe, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "is no file" in refusal(recipe, ("plain", tmp_path / "pipe"))


def test_an_empty_folder(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    assert "holds no file" in refusal(recipe, ("tuning", tmp_path))


def test_too_much(recipe: Recipe, tuning: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_MOST_BYTES", 28)
    assert "has more than" in refusal(recipe, ("tuning", tuning))
    assert read_inputs(recipe, [("plain", written(tmp_path, "a", b"x" * 28))])
    assert "has more than" in refusal(recipe, ("plain", written(tmp_path, "a", b"x" * 29)))


def test_too_many(recipe: Recipe, tuning: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_MOST_FILES", 1)
    assert "has more than 1 files" in refusal(recipe, ("tuning", tuning))


def test_a_wrong_folder_does_not_fill_the_screen(recipe: Recipe, tmp_path: Path) -> None:
    for number in range(30):
        written(tmp_path, f"{number}.txt", b"")
    told = refusal(recipe, ("tuning", tmp_path))
    assert told.count("nothing would look for") < 10
    assert "more of" in told


# --- what a recipe and an overlay may say -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ('name = "graph"', 'name = "tuning"', "input[1].name"),
        ('name = "graph"', 'name = "../graph"', "input[1].name"),
        ('"GRAPH_FILE"', '"TUNING_DIR"', "input[1].variable"),
        ('"GRAPH_FILE"', '"LD_PRELOAD"', "input[1].variable"),
        ('"GRAPH_FILE"', '"A B"', "input[1].variable"),
        ('format = "xml"', 'files = ["a"]', "input[1].files"),
        ('["configs/*/E=*.json"]', '["a[z-a]"]', "input[0].files[0]"),
        ('format = "xml"', 'format = "yaml"', "input[1].format"),
        ('format = "xml"', "fromat = 1", "unknown key 'input[1].fromat'"),
    ],
)
def test_a_recipe_that_cannot_be_meant(old: str, new: str, where: str) -> None:
    with pytest.raises(RecipeError, match=r"small\.toml") as caught:
        parse_recipe(tomllib.loads(RECIPE.replace(old, new)), "small.toml")
    assert where in str(caught.value)


OVERLAY = """schema = 1
summary = "More"
[[input]]
name = "extra"
variable = "EXTRA"
reason = "for a test"
"""


def test_overlays_add_inputs(recipe: Recipe) -> None:
    overlay = parse_overlay(tomllib.loads(OVERLAY), recipe, "more.toml")
    both = overlaid(recipe, {"more": overlay, "same": overlay})
    assert [one.name for one in both.input] == ["tuning", "graph", "plain", "extra"]
    assert not overlay.relocks
    other = parse_overlay(tomllib.loads(OVERLAY.replace("EXTRA", "OTHER")), recipe, "other.toml")
    with pytest.raises(RecipeError, match="contradict each other"):
        overlaid(recipe, {"more": overlay, "other": other})


def test_an_overlay_may_not_take_the_recipes_input(recipe: Recipe) -> None:
    overlay = parse_overlay(tomllib.loads(OVERLAY.replace('"extra"', '"graph"')), recipe, "more.toml")
    with pytest.raises(RecipeError, match="listed twice"):
        overlaid(recipe, {"more": overlay})


def test_sm120_takes_what_sglang_and_nccl_read(tmp_path: Path) -> None:
    """SGLang 0.5.9 joins SGLANG_MOE_CONFIG_DIR, `configs`, `triton_3_5_1` and the name of the file."""
    recipe = load_recipe("sglang", ["sm120"]).recipe
    (tmp_path / "moe/configs/triton_3_5_1").mkdir(parents=True)
    name = "E=257,N=256,device_name=NVIDIA_RTX_PRO_6000_Blackwell_Server_Edition.json"
    written(tmp_path, f"moe/configs/triton_3_5_1/{name}", "{}")
    found = read_inputs(
        recipe, [("moe-configs", tmp_path / "moe"), ("nccl-graph", written(tmp_path, "g", "<graphs/>"))]
    )
    assert variables(found) == {
        "SGLANG_MOE_CONFIG_DIR": "{prefix}/share/inputs/moe-configs",
        "NCCL_GRAPH_FILE": "{prefix}/share/inputs/nccl-graph",
    }
    assert f"share/inputs/moe-configs/configs/triton_3_5_1/{name}" in found[0].files
