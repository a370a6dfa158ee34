"""A bundle for aarch64 hosts, composed on this machine from wheels of a real index, and read again."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from composer.errors import HostError
from composer.formats.elf import is_elf, load_faults, read_elf
from composer.formats.stublib import render_stub
from composer.interpreter import find_pythons
from composer.model.lock import parse_lock
from composer.steps.load import load_recipe
from composer.steps.outline import Request, choose_interpreter
from composer.store import Store
from tests.servers import File, Index
from tests.stack import COMPOSE, CORE, EXTENSION, PYTHON, SITE, Stack
from tests.wheels import build_wheel, wheel_filename

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="aarch64 is not another machine here")

TARGET = ("--sm", "90", "--isa", "armv9")
BINARY = "py3-none-manylinux2014_{}"
RECIPE = f"""
schema = 1
name = "small"
version = "1.0"
summary = "A small stack for aarch64"
cuda = "12.8"
pythons = ["{PYTHON}"]
machines = ["x86_64", "aarch64"]
as-of = 2026-03-10T00:00:00Z
sm = [90]

[[component]]
name = "app"
version = "1.0"
imports = ["app"]

[[component]]
name = "hammer"
version = "1.0"
tool = true
"""


def arm(folder: Path, soname: str, source: str, *needed: Path) -> Path:
    """A library for aarch64 that needs others by their names, and no RPATH."""
    path = folder / soname
    path.with_suffix(".c").write_text(source)
    compiler = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-gnu"]
    words = ["-shared", "-nostdlib", f"-Wl,-soname,{soname}", "-o", path, path.with_suffix(".c"), *needed]
    subprocess.run([*compiler, *words], check=True, capture_output=True)
    return path


def put(index: Index, name: str, files: dict[str, bytes], tag: str, version: str = "1.0", **more: object) -> None:
    data = build_wheel(name, version, files, tag=tag, **more)
    index.add(name, File(filename=wheel_filename(name, version, tag), data=data))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Index]:
    """`app` needs `core-lib` on aarch64 only; the tool `hammer` has wheels for both machines."""
    scratch = tmp_path_factory.mktemp("objects")
    core = arm(scratch, "libcore.so", CORE)
    files = {"app/__init__.py": b"x = 1\n", "app/libext.so": arm(scratch, "libext.so", EXTENSION, core).read_bytes()}
    requires = ["core-lib; platform_machine == 'aarch64'", "intel-lib; platform_machine == 'x86_64'"]
    with Index() as server:
        put(server, "app", files, BINARY.format("aarch64"), requires=requires)
        put(server, "core-lib", {"core_lib/lib/libcore.so": core.read_bytes()}, BINARY.format("aarch64"))
        for machine in ("aarch64", "x86_64"):
            put(server, "hammer", {"hammer/run": machine.encode()}, BINARY.format(machine))
        put(server, "hammer", {"hammer/run": b""}, BINARY.format("x86_64"), version="2.0")
        put(server, "hammer", {"hammer/run": b""}, "py3-none-win_amd64")
        yield server


@pytest.fixture(scope="module")
def stack(index: Index, tmp_path_factory: pytest.TempPathFactory) -> Stack:
    """Built, for a host's Python, into the folder `out`."""
    home = tmp_path_factory.mktemp("cross")
    made = Stack(home=home, index_url=index.url, store=home / "store", output=home / "out")
    made.recipe.write_text(RECIPE)
    made.run(words(made)).ok()
    return made


def words(stack: Stack, *more: str, python: str = "host", recipe: Path | None = None) -> list[str]:
    return [*COMPOSE, "build", "--recipe", str(recipe or stack.recipe), *TARGET, "--python", python,
            "-o", str(stack.output), "--compress", "fast", "--no-unzstd", *more]  # fmt: skip


def bundle(stack: Stack) -> Path:
    (path,) = stack.output.glob("*.tar.zst")
    return path


def lock_of(stack: Stack) -> Path:
    return stack.home / f"pylock.small-py{PYTHON.replace('.', '')}-aarch64.toml"


@pytest.fixture(scope="module")
def tree(stack: Stack) -> Path:
    prefix = stack.home / "tree"
    prefix.mkdir()
    subprocess.run(["tar", "--zstd", "-xf", bundle(stack), "-C", prefix], check=True)
    return prefix


def test_the_lock_is_for_the_target_and_its_tools_for_whoever_composes(stack: Stack) -> None:
    lock = parse_lock(lock_of(stack).read_text(), "lock")
    assert lock.pins == {"app": "1.0", "core-lib": "1.0", "hammer": "1.0"}, "markers are the target's"
    files = {package.name: [one.filename for one in package.artifacts] for package in lock.packages}
    assert files == {
        "app": ["app-1.0-py3-none-manylinux2014_aarch64.whl"],
        "core-lib": ["core_lib-1.0-py3-none-manylinux2014_aarch64.whl"],
        "hammer": [f"hammer-1.0-py3-none-manylinux2014_{machine}.whl" for machine in ("aarch64", "x86_64")],
    }


def test_the_tool_of_this_machine_is_the_one_that_is_fetched(stack: Stack) -> None:
    artifacts = {path.name for path in (stack.store / "artifacts").rglob("*.whl")}
    assert "hammer-1.0-py3-none-manylinux2014_x86_64.whl" in artifacts
    assert "hammer-1.0-py3-none-manylinux2014_aarch64.whl" not in artifacts


def test_a_lock_without_the_tool_of_this_machine_says_so(stack: Stack, tmp_path: Path) -> None:
    copy = Stack(home=tmp_path, index_url=stack.index_url, store=tmp_path / "store", output=tmp_path / "out")
    copy.recipe.write_text(RECIPE)
    rows = [
        row for row in lock_of(stack).read_text().splitlines() if "hammer-1.0-py3-none-manylinux2014_x86_64" not in row
    ]
    (tmp_path / lock_of(stack).name).write_text("\n".join(rows))
    copy.run(words(copy)).refused(3, "hammer: locked with no wheel for x86_64", "compose lock")


def test_every_object_of_the_tree_is_for_the_target(tree: Path) -> None:
    found = {path.relative_to(tree).as_posix(): path.read_bytes() for path in tree.rglob("*") if path.is_file()}
    elves = {path: read_elf(data, path) for path, data in found.items() if is_elf(data[:64])}
    assert {path.rpartition("/")[2] for path in elves} == {"libext.so", "libcore.so"}, "nothing of this machine's"
    assert {elf.machine for elf in elves.values()} == {"aarch64"}
    extension = elves[f"{SITE}/app/libext.so"]
    assert extension.rpath == ("$ORIGIN/../core_lib/lib",)
    assert load_faults(extension) == ()
    assert {load.align for load in extension.loads} == {0x10000}, "aarch64 kernels may have pages of 64 KiB"


def test_modules_are_compiled_by_this_machine(tree: Path) -> None:
    tag = f"cpython-{PYTHON.replace('.', '')}"
    cached = tree / SITE / f"app/__pycache__/__init__.{tag}.pyc"
    (python,) = [one.path for one in find_pythons((PYTHON,))[:1]]
    code = "import marshal, sys; exec(marshal.loads(open(sys.argv[1], 'rb').read()[16:])); print(x)"
    assert subprocess.run([python, "-c", code, cached], capture_output=True, text=True, check=True).stdout == "1\n"


def test_the_manifest_names_the_machine_and_what_the_host_must_have(tree: Path) -> None:
    manifest = json.loads((tree / "share/compose/manifest.json").read_text())
    assert (manifest["target"]["machine"], manifest["target"]["isa"]) == ("aarch64", "armv9")
    assert json.loads((tree / "share/compose/target.json").read_text())["machine"] == "aarch64"
    assert any("the bundle needs the host's" in warning for warning in manifest["warnings"])


def test_verify_proves_the_files_and_says_that_nothing_was_imported(stack: Stack, tree: Path) -> None:
    for place in (bundle(stack), tree):
        out = stack.compose("verify", str(place)).ok().out
        assert "import.skipped" in out
        assert "the bundle is for aarch64, this machine is x86_64" in out


def test_a_helper_for_another_machine_is_refused(stack: Stack, index: Index, tmp_path: Path) -> None:
    helper = render_stub("libhelper.so", ["help"], 0, "x86_64")
    put(index, "helped", {"helped/bin/libhelper.so": helper}, BINARY.format("aarch64"))
    copy = Stack(home=tmp_path, index_url=stack.index_url, store=stack.store, output=tmp_path / "out")
    added = '\n[[component]]\nname = "helped"\nversion = "1.0"\n'
    copy.recipe.write_text(RECIPE + added)
    where = f"{SITE}/helped/bin/libhelper.so"
    copy.run(words(copy)).refused(9, f"{where}: files.machine: is for x86_64, the bundle for aarch64", "Prune it")
    prune = 'prune = [{ paths = ["helped/bin/**"], reason = "x86_64 helpers" }]\n'
    copy.recipe.write_text(RECIPE + added + prune)
    copy.run(words(copy)).ok()


def test_an_interpreter_of_this_machine_is_refused(stack: Stack) -> None:
    python = str(find_pythons((PYTHON,))[0].path)
    stack.run(words(stack, python=python)).refused(10, "does not run on aarch64", "--python host")


def test_without_an_archive_there_is_no_interpreter(stack: Stack, tmp_path: Path) -> None:
    request = Request(recipe=str(stack.recipe), sm="90", isa="armv9")
    with pytest.raises(HostError) as caught:
        choose_interpreter(request, load_recipe(str(stack.recipe)).recipe, "aarch64", Store(tmp_path))
    assert str(caught.value.what) == f"no CPython {PYTHON} for aarch64"
    assert "--python host" in (caught.value.fix or "")
    assert "--python PATH" not in (caught.value.fix or ""), "this machine has none that would do"
