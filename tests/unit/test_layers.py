"""The house's plan: who may import whom, and what the pure rooms may not touch."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "composer"
#: Rooms from the top down: a module imports from its own room or from those after it.
ROOMS = (
    "cli", "deploy", "host", "steps", "farm", "interpreter", "proofs", "launchers", "_pip", "store", "remote",
    "_proc", "_direct", "_fs", "formats", "model", "events", "_json", "errors", "__init__",
)  # fmt: skip
PURE = ("model", "formats")
WORLDLY = {"os", "subprocess", "socket", "time", "shutil", "tempfile", "pathlib", "requests", "pip", "random"}
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if "runtime" not in path.parts)


def imports(path: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def room(path: str) -> str:
    return path.split("/", maxsplit=1)[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES)
def test_imports_point_downwards(path):
    inside = {name.split(".")[1] for name in imports(path) if name.startswith("composer.")}
    above = {name for name in inside if name in ROOMS and ROOMS.index(name) < ROOMS.index(room(path))}
    # Layers hold frames: the one value that a format and the model share.
    assert not above - ({"formats"} if room(path) == "model" else set())


@pytest.mark.parametrize("path", [path for path in MODULES if room(path) in PURE])
def test_pure_rooms_do_not_touch_the_world(path):
    assert not {name.split(".")[0] for name in imports(path)} & WORLDLY


@pytest.mark.parametrize("path", [path for path in MODULES if path.startswith(("proofs/slimmed", "proofs/_slim_"))])
def test_the_proof_of_slimming_shares_nothing_with_what_slims(path):
    """It reads ELF and fat binaries, and chooses images, by its own code."""
    rooms = {name.split(".")[1] for name in imports(path) if name.startswith("composer.")}
    assert rooms <= {"errors", "proofs"}


def test_every_room_is_known():
    assert {room(path) for path in MODULES} <= set(ROOMS)


def test_no_import_cycle():
    graph = {}
    for path in MODULES:
        name = "composer." + path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        graph[name] = {one for one in imports(path) if one.startswith("composer")}
    done: set[str] = set()

    def visit(name, chain):
        assert name not in chain, " -> ".join([*chain, name])
        if name in graph and name not in done:
            for one in graph[name]:
                visit(one, [*chain, name])
            done.add(name)

    for name in graph:
        visit(name, [])


#: What travels: its folders from the top down, and "" for what lies beside them.
TRAVELS = sorted(path for path in (PACKAGE / "runtime").rglob("*.py") if path.parent.name != "launch")
FOLDERS = ("doctor", "serve", "service", "model", "host", "")


def relative_imports(path: Path) -> set[str]:
    """The folders that a module of the runtime imports from when it is imported itself."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parent if node.level == 1 else path.parent.parent
            modules = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {(base / name.replace(".", "/")).relative_to(PACKAGE / "runtime").parent.name for name in modules}
    return found


@pytest.mark.parametrize("path", TRAVELS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_travels_in_a_bundle_needs_nothing_but_the_standard_library(path):
    names = {name.split(".")[0] for name in imports(str(path.relative_to(PACKAGE)))}
    assert names <= sys.stdlib_module_names
    ast.parse(path.read_text(), feature_version=(3, 10))


@pytest.mark.parametrize("path", TRAVELS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_of_what_travels_point_downwards(path):
    """So what runs at every start, which lies beside the folders, takes nothing from them then."""
    own = FOLDERS.index(path.relative_to(PACKAGE / "runtime").parent.as_posix().removeprefix("."))
    assert {name for name in relative_imports(path) if FOLDERS.index(name) < own} == set()
