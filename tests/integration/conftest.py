"""The small stack, built once for a whole run of tests."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from tests.servers import Index
from tests.stack import Done, Stack, serve, wheels, write_stack


@pytest.fixture(scope="session")
def shelf() -> Iterator[Index]:
    """An index with the wheels of the small stack. Tests do not change it."""
    with Index() as index:
        serve(index, wheels())
        yield index


@dataclass(frozen=True, kw_only=True)
class First:
    """The quiet run that all others are compared with."""

    stack: Stack
    done: Done
    digest: str


@pytest.fixture(scope="session")
def first(shelf: Index, tmp_path_factory: pytest.TempPathFactory) -> First:
    """The first build: nothing is in the store. Tests do not change it."""
    stack = write_stack(tmp_path_factory.mktemp("first"), shelf.url)
    done = stack.build("--imports").ok()
    return First(stack=stack, done=done, digest=stack.digest())


@pytest.fixture
def stack(first: First, tmp_path: Path) -> Stack:
    """A copy of the recipe, its lock and the filled store; nothing is in the output folder."""
    copy = cold(first.stack, tmp_path)
    shutil.copytree(first.stack.store, copy.store)
    return copy


@pytest.fixture
def warm(stack: Stack) -> Stack:
    """`stack` with a store that holds the interpreter, and no layer of a wheel."""
    forget(stack)
    return stack


@pytest.fixture
def fresh(first: First, tmp_path: Path) -> Stack:
    """A copy of the recipe and its lock; the store is empty."""
    return cold(first.stack, tmp_path)


def cold(stack: Stack, folder: Path) -> Stack:
    """The same recipe and lock in another folder, with nothing done yet."""
    home = folder / "recipe"
    shutil.copytree(stack.recipe.parent / "patches", home / "patches")
    for path in (stack.recipe, stack.lock):
        shutil.copy(path, home)
    return stack.fresh(folder, home=home)


def forget(stack: Stack) -> None:
    """Take the layers of wheels, blobs and surveys out of the store."""
    for kind in ("blob", "survey", "objects"):
        shutil.rmtree(stack.store / "objects" / kind, ignore_errors=True)
    for path in (stack.store / "objects/layer").rglob("*.json"):
        if msgspec.json.decode(path.read_bytes())["artifact"]:
            path.unlink()
            path.with_suffix(".zst").unlink()


@pytest.fixture(scope="session")
def tree(first: First, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first bundle, unpacked by GNU tar. Tests do not change it."""
    folder = tmp_path_factory.mktemp("tree")
    subprocess.run(["tar", "--zstd", "-xf", first.stack.bundle, "-C", folder], check=True)
    return folder
