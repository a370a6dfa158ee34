"""The proofs of a bundle's texts on a real one: nothing to say of it as built, and one finding for each harm."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from composer.model.layer import Changes, FileChange
from composer.proofs.content import is_told, read_content
from tests.bundle_facts import as_composed, as_found, replace_file, rewrite, without
from tests.stack import SITE as FOLDER

SITE = f"{FOLDER}/"
HOOK = "hook.pth"
LEDGER = ("ledger.dropped", "ledger.violated")


@pytest.fixture
def prefix(tree: Path, tmp_path: Path) -> Path:
    """A copy of the unpacked bundle, to be harmed; its files are hard links."""
    subprocess.run(["cp", "-al", tree, tmp_path / "prefix"], check=True)
    return tmp_path / "prefix"


def findings(prefix: Path) -> list[tuple[str, str, str, str]]:
    """What is found beside the two notes of the recipe's own changes."""
    found = as_found(prefix, HOOK).check()
    return [(one.id, one.severity, one.subject, one.evidence) for one in found if one.id not in LEDGER]


@pytest.mark.parametrize("gather", [as_composed, as_found])
def test_a_bundle_as_built(tree, gather):
    made = gather(tree, HOOK)
    assert [(one.id, one.severity, one.evidence) for one in made.check()] == [
        ("ledger.dropped", "note", "app requires heavy>=3; left out: only training needs it"),
        ("ledger.violated", "note",
         "native-ext requires core-lib==0.9; the bundle has 1.0: the pin of native-ext is too old"),
    ]  # fmt: skip
    records = [record.path for content in made.contents.values() for record in content.recorded]
    assert sorted(records) == sorted(path for path in made.entries if path.endswith(".dist-info/RECORD"))


def test_the_imports_of_a_layer_are_facts_that_can_be_kept(tree):
    made = as_composed(tree, HOOK)
    layer = next(layer for layer in made.layers if layer.name == "app")
    paths = [entry.path for entry in layer.entries if is_told(entry.path)]
    content = read_content((path, (tree / path).read_bytes()) for path in [*paths, "bin/app-hello"])
    assert sorted(content.imports) == [f"{SITE}app/__init__.py", f"{SITE}app/core.py"]
    assert [one.module for one in content.imports[f"{SITE}app/core.py"].imports] == ["ctypes", "importlib.resources"]
    assert (len(content.declared), len(content.recorded), content.pth) == (1, 1, {})


def test_a_requirement_that_is_not_met(prefix):
    metadata = f"{SITE}app-1.0.dist-info/METADATA"
    rewrite(prefix, metadata, lambda data: data.replace(b"native-ext==1.0", b"native-ext==2.0"))
    evidence = "app 1.0 requires native-ext==2.0; the bundle has 1.0"
    assert findings(prefix) == [("ledger.unmet", "error", metadata, evidence)]


def test_a_distribution_that_is_gone(tree):
    found = [one for one in without(as_composed(tree, HOOK), "core-lib").check() if one.severity == "error"]
    evidence = "native-ext 1.0 requires core-lib==1.0; the bundle does not have it"
    assert [(one.id, one.evidence) for one in found] == [("ledger.unmet", evidence)]


def test_an_import_of_what_was_dropped(prefix):
    rewrite(prefix, f"{SITE}app/core.py", lambda data: data + b"\nimport heavy.parts\n")
    ((name, severity, subject, evidence),) = findings(prefix)
    assert (name, severity, subject) == ("imports.missing", "error", f"{SITE}app/core.py")
    assert evidence.startswith("heavy is not in the bundle: app.core > heavy (line ")
    assert evidence.endswith("heavy was left out: only training needs it")


def test_an_import_of_what_was_pruned(prefix):
    rewrite(prefix, f"{SITE}app/core.py", lambda data: data + b"\nfrom app.tests import data\n")
    ((name, _, _, evidence),) = findings(prefix)
    assert name == "imports.missing"
    assert evidence.endswith("; pruned by app/tests/**: tests are not served")


def test_a_module_that_the_recipe_names_is_gone(prefix):
    shutil.rmtree(prefix / SITE / "app")
    ids = {(one[0], one[2]) for one in findings(prefix)}
    assert ids == {("imports.missing", "app"), ("files.record", f"{SITE}app-1.0.dist-info/RECORD")}


def test_a_file_that_anyone_may_change(prefix):
    path = prefix / SITE / "app/core.py"
    replace_file(path, path.read_bytes())
    path.chmod(0o646)
    assert findings(prefix) == [("files.mode", "error", f"{SITE}app/core.py", "mode 0646: anyone may change it")]


def test_a_link_that_leaves(prefix):
    (prefix / SITE / "way_out").symlink_to("../../../../outside")
    ((name, severity, subject, evidence),) = findings(prefix)
    assert (name, severity, subject) == ("files.link", "error", f"{SITE}way_out")
    assert "outside the bundle" in evidence


def test_a_hook_that_nobody_allowed(prefix):
    made = as_composed(prefix)
    layers = [msgspec.structs.replace(layer, changes=Changes()) for layer in made.layers]
    (found,) = [one for one in replace(made, layers=layers).check() if one.severity == "error"]
    assert (found.id, found.subject) == ("files.at-start", f"{SITE}{HOOK}")
    assert "'import hook'" in found.evidence


def test_a_hook_that_the_manifest_lists(prefix):
    made = as_composed(prefix)
    change = FileChange(kind="pth", path=f"{SITE}{HOOK}", detail="sha256", reason="wanted")
    layers = [
        msgspec.structs.replace(layer, changes=Changes(files=[change])) if layer.name == "hook" else layer
        for layer in made.layers
    ]  # fmt: skip
    assert [one.id for one in replace(made, layers=layers).check() if one.severity == "error"] == []


def test_a_file_that_is_not_what_record_says(prefix):
    path = prefix / SITE / "app/core.py"
    replace_file(path, path.read_bytes().upper())
    record = f"{SITE}app-1.0.dist-info/RECORD"
    assert findings(prefix) == [("files.record", "error", record, f"the digest of {SITE}app/core.py is not the file's")]


def test_the_letter_case_of_two_names(prefix):
    (prefix / SITE / "Hook.py").write_text("")
    ((name, severity, subject, _),) = findings(prefix)
    assert (name, severity, subject) == ("files.look-alike", "warning", f"{SITE}hook.py")
