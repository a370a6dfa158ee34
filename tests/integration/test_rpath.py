"""RPATH edits by the real patchelf, judged by the real loader."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from composer.errors import ElfError, HostError
from composer.formats.loader import Tree
from composer.proofs.closure import check_closure
from composer.steps.rpath import RpathEdit, apply_rpath, patchelf_version, plan_rpaths, read_object
from tests.shared_objects import library, retag

SP = "lib/python3.12/site-packages"
TOP = f"{SP}/kernel/top.so"


def scan(prefix: Path) -> Tree:
    paths = {str(path.relative_to(prefix)): path for path in prefix.rglob("*.so*")}
    return Tree(objects={name: read_object(path, name) for name, path in paths.items()})


def call(path: Path, decoy: Path) -> str:
    """What `top()` returns in a child whose LD_LIBRARY_PATH names the decoy, or the loader's complaint."""
    code = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).top())"
    env = {"LD_LIBRARY_PATH": str(decoy)}
    done = subprocess.run([sys.executable, "-c", code, path], env=env, capture_output=True, text=True, check=False)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def edit(*rpath: str) -> RpathEdit:
    return RpathEdit(path="x.so", rpath=rpath, added=rpath, dropped=(), why=())


@pytest.fixture
def decoy(tmp_path: Path) -> Path:
    for name in ("libmid.so", "liblow.so"):
        library(tmp_path / "decoy" / name, "int mid(void) { return -1; } int low(void) { return -1; }")
    return tmp_path / "decoy"


@pytest.fixture
def prefix(tmp_path: Path, decoy: Path) -> Path:
    """top needs mid, an NVIDIA library; mid needs low, another; nothing has an RPATH."""
    nvidia = tmp_path / "prefix" / SP / "nvidia"
    low = library(nvidia / "low/lib/liblow.so", "int low(void) { return 40; }", "-Wl,-soname,liblow.so")
    mid = library(
        nvidia / "mid/lib/libmid.so", "int low(void); int mid(void) { return low() + 1; }", low, "-Wl,-soname,libmid.so"
    )
    link = f"-Wl,-rpath-link,{low.parent}"
    library(tmp_path / "prefix" / TOP, "int mid(void); int top(void) { return mid() + 1; }", mid, link)
    return tmp_path / "prefix"


def _apply(prefix: Path) -> None:
    for each in plan_rpaths(scan(prefix)):
        apply_rpath(prefix / each.path, each)


def test_the_whole_chain_resolves_whatever_the_host_says(prefix: Path, decoy: Path, tmp_path: Path) -> None:
    assert (
        call(prefix / TOP, tmp_path) == "OSError: libmid.so: cannot open shared object file: No such file or directory"
    )
    assert call(prefix / TOP, decoy) == "0"
    vendor = {path: path.read_bytes() for path in prefix.rglob("nvidia/**/*.so")}
    _apply(prefix)
    assert call(prefix / TOP, decoy) == "42"
    assert vendor == {path: path.read_bytes() for path in vendor}
    moved = prefix.rename(tmp_path / "moved to another place")
    assert call(moved / TOP, decoy) == "42"
    assert [each for each in check_closure(scan(moved)) if each.severity == "error"] == []
    assert plan_rpaths(scan(moved)) == ()


def test_a_runpath_in_the_chain_is_found_and_true(prefix: Path, tmp_path: Path) -> None:
    mid = prefix / SP / "nvidia/mid/lib/libmid.so"
    retag(mid, tmp_path / "mid.so", tag="runpath", entries="$ORIGIN")
    shutil.move(tmp_path / "mid.so", mid)
    _apply(prefix)
    assert "liblow.so: cannot open shared object file" in call(prefix / TOP, tmp_path)
    errors = [each for each in check_closure(scan(prefix)) if each.severity == "error"]
    assert [(each.id, each.subject) for each in errors] == [("closure.missing", f"{SP}/nvidia/mid/lib/libmid.so")]


def test_the_loader_would_prefer_the_decoy_to_a_runpath(prefix: Path, decoy: Path, tmp_path: Path) -> None:
    """Why it has to be DT_RPATH."""
    entries = "$ORIGIN/../nvidia/mid/lib:$ORIGIN/../nvidia/low/lib"
    retag(prefix / TOP, tmp_path / "top.so", tag="runpath", entries=entries)
    shutil.move(tmp_path / "top.so", prefix / TOP)
    assert call(prefix / TOP, decoy) == "0"
    _apply(prefix)
    assert call(prefix / TOP, decoy) == "42"


def test_an_edit_is_exact_keeps_the_mode_and_repeats_to_the_same_bytes(prefix: Path) -> None:
    path = prefix / TOP
    path.chmod(0o755)
    apply_rpath(path, edit("$ORIGIN/a", "$ORIGIN/" + "b" * 300))
    first = path.read_bytes()
    assert read_object(path).rpath == ("$ORIGIN/a", "$ORIGIN/" + "b" * 300)
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    apply_rpath(path, edit("$ORIGIN/a", "$ORIGIN/" + "b" * 300))
    assert path.read_bytes() == first
    apply_rpath(path, edit())
    assert read_object(path).rpath == read_object(path).runpath == ()
    assert sorted(each.name for each in path.parent.iterdir()) == ["top.so"]


def test_another_name_of_the_same_file_keeps_its_bytes(prefix: Path) -> None:
    """A file of the store may be linked into the tree; an edit must not reach it."""
    other = prefix / "other"
    os.link(prefix / TOP, other)
    before = other.read_bytes()
    apply_rpath(prefix / TOP, edit("$ORIGIN"))
    assert other.read_bytes() == before


@pytest.mark.parametrize(
    ("program", "fault"),
    [
        ("exit 0", "empty file"),
        ('cp "${@: -1}" "${@: -2:1}"', "did not give the planned object"),
        ("echo oops >&2; exit 1", "oops"),
        ("kill -ABRT $$", "SIGABRT"),
        ('head -c 300 "${@: -1}" > "${@: -2:1}"', "truncated"),
        ('rm "${@: -2:1}"', "No such file"),
    ],
)
def test_a_failing_patchelf_leaves_the_original(
    prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, fault: str
) -> None:
    _install(tmp_path / "bin", monkeypatch, f'[ "$1" = --version ] && echo patchelf 0.19.3 && exit\n{program}')
    before = (prefix / TOP).read_bytes()
    with pytest.raises((ElfError, HostError), match=fault):
        apply_rpath(prefix / TOP, edit("$ORIGIN"))
    assert (prefix / TOP).read_bytes() == before
    assert sorted(each.name for each in (prefix / TOP).parent.iterdir()) == ["top.so"]


@pytest.mark.parametrize(
    ("program", "fault"),
    [
        ("echo patchelf 0.18.0", "too old"),
        ("echo hello", "too old"),
        ("exit 3", "exit status 3"),
        (None, "not installed"),
    ],
)
def test_a_wrong_patchelf_is_refused(
    prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str | None, fault: str
) -> None:
    _install(tmp_path / "bin", monkeypatch, program)
    with pytest.raises(ElfError, match=fault):
        apply_rpath(prefix / TOP, edit("$ORIGIN"))


def _install(folder: Path, monkeypatch: pytest.MonkeyPatch, program: str | None) -> None:
    """A folder with an interpreter and, unless None, this patchelf beside it, as the one composer runs from."""
    folder.mkdir()
    if program is not None:
        (folder / "patchelf").write_text(f"#!/bin/bash\n{program}\n")
        (folder / "patchelf").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folder))


def test_the_installed_patchelf() -> None:
    assert tuple(map(int, patchelf_version().split("."))) >= (0, 19, 3)


def test_too_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "huge.so"
    with path.open("wb") as stream:
        stream.truncate(8 << 40)
    with pytest.raises(HostError, match="too little memory"):
        apply_rpath(path, edit("$ORIGIN"))


@pytest.mark.parametrize("data", [b"", b"INPUT(libfoo.so)"])
def test_what_is_no_object(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "text.so"
    path.write_bytes(data)
    with pytest.raises(ElfError):
        apply_rpath(path, edit("$ORIGIN"))
    assert path.read_bytes() == data


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="No such file"):
        apply_rpath(tmp_path / "none.so", edit("$ORIGIN"))
    with pytest.raises(HostError, match="No such file"):
        read_object(tmp_path / "none.so")
