"""`verify` of a bundle whose manifest and content disagree, in each of its ways of looking."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from composer.events import silent
from composer.model.manifest import Floor
from composer.steps.bundle import open_bundle
from composer.steps.unpack import unpack
from composer.steps.verify import verify
from composer.store import Store
from tests.bundles import make_bundle
from tests.shared_objects import gcc, library, retag


@pytest.mark.parametrize("imports", [False, True], ids=["as it is packed", "unpacked for imports"])
def test_the_digest_of_every_file_is_compared(tmp_path: Path, imports: bool) -> None:
    bundle = tmp_path / "small.tar.zst"
    files = {"bin/a": b"#!/bin/sh\n", "lib/f.txt": b"content"}
    make_bundle(bundle, {"one": files}, store=tmp_path / "store", lie=lambda entry: msgspec.structs.replace(
        entry, sha256="0" * 64) if entry.path == "lib/f.txt" else entry)  # fmt: skip
    _, found = verify(bundle, Store(tmp_path / "store"), imports=imports, jobs=1, listener=silent)
    assert [(one.subject, one.severity) for one in found if one.id == "content"] == [("lib/f.txt", "error")]


# --- A folder in which something is not as it was packed --------------------------------------------------------------

USER, USED = "lib/libuser.so", "lib/libused.so"


@pytest.fixture(name="tree")
def _tree(tmp_path: Path) -> Path:
    """An unpacked bundle: a program, and a library that needs another one."""
    used = retag(library(tmp_path / "used"), tmp_path / "named", soname="libused.so").read_bytes()
    user = retag(library(tmp_path / "user", "int two(void) { return 2; }"), tmp_path / "needs", needed=["libused.so"],
                 tag="rpath", entries="$ORIGIN").read_bytes()  # fmt: skip
    bundle, prefix = tmp_path / "small.tar.zst", tmp_path / "tree"
    files: dict[str, bytes | str] = {"bin/run": b"#!/bin/sh\n", "bin/also": "run", USED: used, USER: user}
    make_bundle(bundle, {"one": files}, store=tmp_path / "store")
    unpack(open_bundle(bundle), prefix, jobs=1, listener=silent, any_host=True)
    return prefix


def faults(path: Path) -> set[tuple[str, str, str]]:
    _, found = verify(path, Store(path.parent / "store"), imports=False, jobs=1, listener=silent)
    return {(one.id, one.subject, one.evidence) for one in found if one.severity == "error"}


def test_a_sound_folder_has_none(tree: Path) -> None:
    assert faults(tree) == set()


def test_models_that_were_added_are_not_extra(tree: Path) -> None:
    for path in ("share/models/hub/models--a--b/refs/main", "share/other"):
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(b"")
    assert faults(tree) == {("extra", "share/other", "in the tree, not listed in the manifest")}


def test_a_library_that_is_gone_is_missed_and_not_called_unusable(tree: Path) -> None:
    (tree / USED).unlink()
    assert faults(tree) == {
        ("missing", USED, "listed in the manifest, not in the tree"),
        ("closure.missing", USER, "libused.so is not found"),
    }


def test_a_library_with_another_byte_is_changed_and_still_a_library(tree: Path) -> None:
    content = bytearray((tree / USED).read_bytes())
    content[-1] ^= 1
    (tree / USED).write_bytes(content)
    assert {(name, path) for name, path, _ in faults(tree)} == {("content", USED)}


@pytest.mark.parametrize(
    ("path", "listed"), [("bin/run", "a file"), ("bin/also", "a link to 'run'")],
)  # fmt: skip
def test_a_pipe_is_not_waited_for(tree: Path, path: str, listed: str) -> None:
    (tree / path).unlink()
    os.mkfifo(tree / path)
    assert ("content", path, f"is a pipe, socket or device instead of {listed}") in faults(tree)


def test_a_file_and_a_link_in_each_others_place(tree: Path) -> None:
    (tree / "bin/also").unlink()
    (tree / "bin/also").write_bytes(b"")
    (tree / "bin/run").unlink()
    (tree / "bin/run").symlink_to("also")
    assert faults(tree) == {
        ("content", "bin/also", "is a file instead of a link to 'run'"),
        ("content", "bin/run", "is a link to 'also' instead of a file"),
    }


@pytest.mark.parametrize(
    ("mode", "evidence"),
    [
        (0o757, "mode 0757: anyone may change it"), (0o4755, "mode 4755: runs with the rights of its owner or group"),
        (0o644, "mode 0644: it cannot be run"),
    ],
)  # fmt: skip
def test_modes_are_those_of_the_files(tree: Path, mode: int, evidence: str) -> None:
    (tree / "bin/run").chmod(mode)
    assert faults(tree) == {("files.mode", "bin/run", evidence)}


def test_a_strict_umask_is_no_fault(tree: Path) -> None:
    (tree / "bin/run").chmod(0o700)
    (tree / USED).chmod(0o400)
    assert faults(tree) == set()


@pytest.mark.parametrize(
    ("floors", "says"),
    [({}, "-"), ({"glibc": "2.1.9"}, "2.1.9"), ({"glibc": "2.35"}, "")],
)  # fmt: skip
def test_a_floor_is_not_below_what_the_files_need(tmp_path: Path, floors: dict[str, str], says: str) -> None:
    gcc("-shared", "-fPIC", "-o", tmp_path / "lib.so", source="int puts(const char *); int f(void) { return puts(0); }")
    bundle = tmp_path / "small.tar.zst"
    files = {"lib/f.so": (tmp_path / "lib.so").read_bytes()}
    listed = {name: Floor(version=version, because="x") for name, version in floors.items()}
    make_bundle(bundle, {"one": files}, store=tmp_path / "store", floors=listed)
    found = {(path, text) for name, path, text in faults(bundle) if name == "floors.manifest"}
    assert found == ({("lib/f.so", f"needs glibc 2.2.5, the manifest says {says}")} if says else set())
