"""What a bundle asks of its host: in the manifest, at the start of its interpreter, and when it is unpacked."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.conftest import First
from tests.stack import PYTHON, Stack

FLOORS = "share/compose/floors"


@pytest.fixture
def started(tree: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Start a copy of a bundle, in the floors of which a text was replaced."""
    prefix = tmp_path / "pre fix"
    shutil.copytree(tree, prefix, symlinks=True)

    def run(old: str = "", new: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
        text = (prefix / FLOORS).read_text()
        assert old in text
        (prefix / FLOORS).write_text(text.replace(old, new, 1))
        return subprocess.run(
            [prefix / "bin/python", "-c", "print('runs')"], capture_output=True, text=True, env=environ
        )

    return run


def test_the_text_is_the_manifests(tree: Path) -> None:
    manifest = json.loads((tree / "share/compose/manifest.json").read_text())
    name, *rows = (tree / FLOORS).read_text().splitlines()
    assert name == manifest["name"]
    assert {row.split("\t")[0]: tuple(row.split("\t")[1:]) for row in rows} == {
        floor: (one["version"], one["because"]) for floor, one in manifest["floors"].items()
    }
    assert manifest["floors"]["kernel"]["because"] == f"bin/python{PYTHON}"


def test_a_host_that_will_do(started: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = started()
    assert (done.returncode, done.stdout, done.stderr) == (0, "runs\n", "")


def test_a_host_that_is_too_old_is_told_so_at_the_start(
    started: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = started("glibc\t2.", "glibc\t99.")
    assert (done.returncode, done.stdout) == (11, "")
    assert "needs glibc 99." in done.stderr
    assert "Traceback" not in done.stderr
    assert started(WHEEL_COMPOSER_HOST_CHECK="off").stdout == "runs\n"


def test_unpack_writes_the_same_tree(first: First, tree: Path, tmp_path: Path) -> None:
    first.stack.compose("unpack", str(first.stack.bundle), str(tmp_path / "prefix")).ok()
    assert (tmp_path / "prefix" / FLOORS).read_bytes() == (tree / FLOORS).read_bytes()


def test_a_library_without_code_for_the_target_fails_the_build(stack: Stack) -> None:
    rule = (
        '\n[[component]]\nname = "native-ext"\n[[component.coverage]]\nfiles = ["native_ext/*.so"]\nrequires = "some"\n'
    )
    stack.edit('\n[[requires]]\nname = "heavy"', f'{rule}reason = "a test"\n\n[[requires]]\nname = "heavy"')
    stack.build().refused(9, "native_ext/libext.so: coverage.nothing: nothing for SM 90", "it has no GPU code (a test)")
    assert not stack.output.exists() or not list(stack.output.iterdir())
