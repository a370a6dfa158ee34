"""`compose build` imports the modules of the finished bundle before it gives it its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.stack import SITE, Stack


def _break(stack: Stack) -> None:
    """No proof of texts sees this: the module is there, and ends in an error when it runs."""
    patch = stack.recipe.parent / "patches/app/greeting.patch"
    patch.write_text(patch.read_text().replace('+    return "patched"', '+    return "patched"\n+\n+\n+1 / 0'))
    text = patch.read_text()
    head = next(line for line in text.splitlines() if line.startswith("@@"))
    first, rest = head.split(" +")
    start, count = rest.split(" ")[0].split(",")
    patch.write_text(text.replace(head, f"{first} +{start},{int(count) + 3} @@"))


def test_a_module_that_does_not_import_stops_the_build(stack: Stack) -> None:
    _break(stack)
    done = stack.build("--imports").refused(9, "app.core: import: ", "division by zero")
    assert "importing modules" in done.err
    assert not stack.bundle.exists()
    assert stack.leftovers() == []


def test_it_is_asked_again_after_a_refusal(stack: Stack) -> None:
    _break(stack)
    for _ in range(2):
        stack.build("--imports").refused(9, "division by zero")
    stack.build().ok()
    stack.build("--imports").refused(9, "division by zero")
    stack.compose("verify", str(stack.bundle)).refused(9)


def test_the_same_content_is_asked_once(stack: Stack, tmp_path: Path) -> None:
    assert "importing modules" not in stack.build("--imports").ok().err
    for path in (stack.store / "objects/imports").rglob("*.json"):
        path.unlink()
    assert "importing modules" in stack.build("--imports").ok().err
    assert list((stack.store / "objects/imports").rglob("*.json"))


def _huge(path: Path, record: dict[str, Any], sizes: list[dict[str, Any]]) -> None:
    """A record of the store in which a file is larger than any disk."""
    max(sizes, key=lambda one: one.get("size", 0))["size"] = 1 << 60
    path.unlink()
    path.write_text(json.dumps(record))


@pytest.mark.parametrize("known", [True, False])
def test_room_for_the_imports_is_asked_for_before_anything_is_made(stack: Stack, known: bool) -> None:
    """Of layers that the store has, and of wheels whose layers are still to be made."""
    stack.build().ok()
    stack.bundle.unlink()
    for path in (stack.store / "objects/imports").rglob("*.json"):
        path.unlink()
    if known:
        path, record = _record(stack, "layer", '"name":"core-lib"')
        _huge(path, record, record["entries"])
    else:
        path, record = _record(stack, "layer", '"name":"core-lib"')
        path.unlink()
        path, record = _record(stack, "survey", '"core_lib/weights.bin"')
        _huge(path, record, [file["member"] for file in record["files"]])
    done = stack.build("--imports").refused(10, "MiB are needed to unpack the bundle", str(stack.store), "--no-imports")
    assert "composing" not in done.err
    assert not stack.bundle.exists()
    assert stack.leftovers() == []


def _record(stack: Stack, kind: str, text: str) -> tuple[Path, dict[str, Any]]:
    """The one record of a kind that says this."""
    (path,) = (path for path in (stack.store / "objects" / kind).rglob("*.json") if text in path.read_text())
    return path, json.loads(path.read_text())


def test_all_findings_are_told(stack: Stack) -> None:
    result = json.loads(stack.build("--json").ok().out.splitlines()[-1])
    found = {(one["id"], one["severity"]) for one in result["findings"]}
    assert ("ledger.dropped", "note") in found
    assert "error" not in {severity for _, severity in found}
    shown = stack.build().ok().out
    assert f"0 errors, 0 warnings, {len(result['findings'])} notes" in shown


def test_a_bundle_for_another_machine_is_not_asked(stack: Stack, first_tree: Path) -> None:
    """A host that is too old for it stands for one, which is not at hand."""
    manifest = json.loads((first_tree / "share/compose/manifest.json").read_text())
    manifest["floors"]["glibc"] = {"version": "9.9", "because": "lib/x.so"}
    path = first_tree / "share/compose/manifest.json"
    path.unlink()
    path.write_text(json.dumps(manifest))
    done = stack.compose("verify", str(first_tree))
    assert "import.skipped" in done.out
    assert "needs glibc 9.9" in done.out
    assert "import.interpreter" not in done.out


@pytest.fixture
def first_tree(stack: Stack, tmp_path: Path) -> Path:
    stack.build().ok()
    stack.compose("unpack", str(stack.bundle), str(tmp_path / "tree")).ok()
    assert (tmp_path / "tree" / SITE / "app/core.py").is_file()
    return tmp_path / "tree"
