"""The pure loader gives glibc's own answers on random small trees of real shared objects."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from composer.formats.elf import read_elf
from composer.formats.loader import Loader, Tree
from tests.shared_objects import library, retag

_NAMES = ("la.so", "lb.so", "lc.so", "ld.so")
_FOLDERS = ("a", "b", "c/d")
_ENTRIES = (
    "$ORIGIN", "${ORIGIN}/../a", "$ORIGIN/../b", "$ORIGIN/../c/d", "$ORIGIN/../link", "$ORIGIN/../../a",
    "$ORIGIN/../link/../d", "$ORIGIN/../none/../b", "$ORIGIN/../../../../outside", "/nowhere",
)  # fmt: skip

_OBJECT = st.fixed_dictionaries(
    {
        "soname": st.sampled_from([None, None, *_NAMES]),
        "needed": st.lists(st.sampled_from(_NAMES), unique=True, max_size=3),
        "tag": st.sampled_from(["", "rpath", "rpath", "runpath"]),
        "entries": st.lists(st.sampled_from(_ENTRIES), min_size=1, max_size=4).map(":".join),
    }
)
_PLACES = [f"{folder}/{name}" for folder in _FOLDERS for name in _NAMES]
_TREES = st.fixed_dictionaries(
    {
        "objects": st.dictionaries(st.sampled_from(_PLACES), _OBJECT, min_size=2, max_size=5),
        # No loops: glibc ends its search at a link that cannot be followed (ELOOP), which is not modelled.
        "links": st.dictionaries(st.sampled_from(_PLACES), st.sampled_from(_PLACES), max_size=2).filter(
            lambda links: not set(links) & set(links.values())
        ),
    }
)


def _spec(*needed: str, tag: str = "", entries: str = "", soname: str | None = None) -> dict[str, Any]:
    return {"soname": soname, "needed": list(needed), "tag": tag, "entries": entries}


_CHAIN = {
    "a/la.so": _spec("lb.so", tag="rpath", entries="$ORIGIN/../b:$ORIGIN/../c/d"),
    "b/lb.so": _spec("lc.so"),
    "c/d/lc.so": _spec(),
}
_BLOCKED = _CHAIN | {"b/lb.so": _spec("lc.so", tag="runpath", entries="$ORIGIN")}
_BY_SONAME = {
    "a/la.so": _spec("lb.so", "lc.so", tag="rpath", entries="$ORIGIN"),
    "a/lb.so": _spec(soname="ld.so"),
    "a/lc.so": _spec("ld.so", tag="runpath", entries="/nowhere"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return library(tmp_path_factory.mktemp("base") / "base.so")


@pytest.fixture(scope="module")
def driver(base: Path) -> Path:
    """A program that needs one empty library, by its path; ld.so lists nothing for one that needs none."""
    return retag(base, base.with_name("driver"), needed=[str(base)])


@pytest.fixture(scope="module")
def program() -> str:
    """The dynamic loader itself, which the running interpreter names."""
    found = read_elf(Path(sys.executable).resolve().read_bytes(), "python").interpreter
    assert found, "the interpreter that runs the tests is not dynamically linked"
    return found


@settings(max_examples=150, deadline=timedelta(seconds=5))
@given(layout=_TREES)
@example(layout={"objects": _CHAIN, "links": {}})
@example(layout={"objects": _BLOCKED, "links": {}})
@example(layout={"objects": _BY_SONAME, "links": {"b/lc.so": "a/lb.so"}})
def test_the_answers_of_glibc(
    base: Path, driver: Path, program: str, tmp_path_factory: pytest.TempPathFactory, layout: dict[str, Any]
) -> None:
    prefix = tmp_path_factory.mktemp("prefix").resolve()
    try:
        tree = _make(base, prefix, layout)
        for root in sorted(tree.objects):
            assert _answers(tree, root) == _glibc(program, driver, prefix, root), root
    finally:
        shutil.rmtree(prefix)


def _make(base: Path, prefix: Path, layout: dict[str, Any]) -> Tree:
    objects = {path: retag(base, prefix / path, **spec) for path, spec in layout["objects"].items()}
    (prefix / "c/d").mkdir(parents=True, exist_ok=True)
    symlinks = {"link": "c/d"}
    for path, target in layout["links"].items():
        if path not in objects:
            symlinks[path] = os.path.relpath(target, Path(path).parent)
    for path, target in symlinks.items():
        (prefix / path).parent.mkdir(parents=True, exist_ok=True)
        (prefix / path).symlink_to(target)
    (prefix / "c/d/data").write_text("so that the folder is there")
    elfs = {path: read_elf(file.read_bytes(), path) for path, file in objects.items()}
    return Tree(objects=elfs, symlinks=symlinks, files={"c/d/data"})


def _answers(tree: Tree, root: str) -> set[tuple[str, str | None]]:
    """Each library once, by the name under which it was first asked for: what ld.so prints."""
    seen, found = {root}, set()
    for lookup in Loader(tree).load(root):
        if lookup.provider is None:
            found.add((lookup.needed, None))
        elif lookup.provider not in seen:
            seen.add(lookup.provider)
            found.add((lookup.needed, lookup.found))
    return found


def _glibc(program: str, driver: Path, prefix: Path, root: str) -> set[tuple[str, str | None]]:
    """Preloaded into a program, an object is loaded as by dlopen: by its path, and only once."""
    env = {"LD_TRACE_LOADED_OBJECTS": "1", "LD_PRELOAD": str(prefix / root)}
    text = subprocess.run([program, driver], env=env, capture_output=True, text=True, check=False).stdout
    found: set[tuple[str, str | None]] = set()
    for line in text.splitlines():
        name, arrow, path = line.strip().partition(" => ")
        if arrow:
            place = Path(path.rsplit(" (", 1)[0])
            real = None if path == "not found" else str((place.parent.resolve() / place.name).relative_to(prefix))
            found.add((name, real))
    return found
