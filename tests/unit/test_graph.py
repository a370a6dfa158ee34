"""Which distribution requires which: markers, extras, edits, circles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from composer.model.graph import DependencyGraph, Edge, dependency_graph
from composer.model.recipe import RequiresEdit
from composer.steps.resolve import marker_environment


def graph(requires: Mapping[str, Sequence[str]], *edits: RequiresEdit, roots: Sequence[str] = (),
          unread: Sequence[str] = ()) -> DependencyGraph:  # fmt: skip
    return dependency_graph(
        dict.fromkeys([*requires, *unread], "1.0"), requires, edits=edits, roots=roots,
        environment=marker_environment("3.12", "x86_64"),
    )  # fmt: skip


def edges(found: DependencyGraph, name: str) -> list[str]:
    (node,) = [one for one in found.nodes if one.name == name]
    assert node.requires is not None
    return [one.name for one in node.requires]


def test_names_are_normalised_and_markers_are_those_of_the_target() -> None:
    found = graph({"app": ["Core_Lib>=1", "winonly; sys_platform == 'win32'", "old; python_version < '3.12'",
                           "arm; platform_machine == 'aarch64'", "new; python_version >= '3.12'"],
                   "core-lib": []})  # fmt: skip
    assert edges(found, "app") == ["core-lib", "new"]


@pytest.mark.parametrize(("asked", "names"), [("lib", []), ("lib[fast]", ["c"]), ("lib[all]", ["c", "lib", "d"])])
def test_extras_count_where_somebody_asks_for_them(asked: str, names: list[str]) -> None:
    lines = ["c; extra == 'fast'", "lib[fast, slow]; extra == 'all'", "d; extra == 'slow'"]
    assert edges(graph({"app": [asked], "lib": lines}), "lib") == names


def test_an_edit_drops_or_replaces_and_says_why() -> None:
    edits = (
        RequiresEdit(name="heavy", reason="training only"),
        RequiresEdit(name="core", to="core==2", reason="too old"),
        RequiresEdit(name="core", of="other", reason="not here"),
    )
    found = graph({"app": ["heavy>3", "core==1"], "other": ["core"], "core": []}, *edits)
    (app,) = [one for one in found.nodes if one.name == "app"]
    assert app.requires == [
        Edge(name="heavy", requirement="heavy>3", dropped=True, reason="training only"),
        Edge(name="core", requirement="core==1", replaced="core==2", reason="too old"),
    ]
    assert [one.name for one in app.kept] == ["core"]
    (other,) = [one for one in found.nodes if one.name == "other"]
    assert not other.kept


@pytest.mark.parametrize(("asked", "to", "names"), [
    ("lib[fast]", None, []), ("lib[fast]", "lib==2", []), ("lib", "lib[fast]==2", ["c"]),
])  # fmt: skip
def test_extras_are_those_after_the_edits(asked: str, to: str | None, names: list[str]) -> None:
    edit = RequiresEdit(name="lib", to=to, reason="a test")
    assert edges(graph({"app": [asked], "lib": ["c; extra == 'fast'"]}, edit), "lib") == names


def test_everything_is_reached_from_the_tops_and_no_top_from_another() -> None:
    found = graph({"a": ["b"], "b": ["c"], "c": ["b"], "x": ["y"], "y": ["x"], "z": ["gone"], "gone": []},
                  RequiresEdit(name="gone", reason="left out"))  # fmt: skip
    assert found.tops == ["a", "gone", "z", "x"]


def test_what_is_not_at_hand_is_not_read() -> None:
    found = graph({"app": ["lib"]}, roots=["app"], unread=["lib"])
    assert [(one.name, one.root, one.requires is None) for one in found.nodes] == [
        ("app", True, False), ("lib", False, True),
    ]  # fmt: skip
