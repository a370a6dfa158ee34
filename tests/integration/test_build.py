"""The command line on a small real stack: from a recipe to a bundle that runs where it is put."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, cast

import pytest
import zstandard

from composer.interpreter import find_pythons
from tests.integration.conftest import First, cold, forget
from tests.servers import Index
from tests.shared_objects import library
from tests.stack import COMPOSE, DECOY, NAME, PATCHED, PYTHON, SITE, TARGET, Stack, serve, shared_object, wheels

ROOT = os.geteuid() == 0
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
as_root = pytest.mark.skipif(not ROOT, reason="only root may become somebody else")


def run(*words: str | Path, **how: object) -> str:
    """Standard output of a program that a host runs: nothing of this process's environment reaches it."""
    settings = {"check": True, "capture_output": True, "text": True, "env": {"PATH": os.defpath}, "cwd": "/", **how}
    return subprocess.run([os.fspath(word) for word in words], **settings).stdout


def contents(prefix: Path) -> dict[str, tuple[int, str]]:
    """(mode, sha256 or link target) of everything below a folder."""
    found = {}
    for parent, folders, names in os.walk(prefix):
        for name in (*folders, *names):
            path = Path(parent, name)
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                found[str(path.relative_to(prefix))] = (0, str(path.readlink()))
            elif stat.S_ISREG(mode):
                found[str(path.relative_to(prefix))] = (mode, hashlib.sha256(path.read_bytes()).hexdigest())
    return found


def layers(store: Path) -> set[str]:
    return {path.stem for path in (store / "objects/layer").rglob("*.zst")}


# --- what a build says and leaves -------------------------------------------------------------------------------------


def test_a_build_shows_its_plan_and_ends_with_path_size_and_digest(first: First) -> None:
    out = first.done.out
    assert first.digest in out
    assert f"bundle:  {first.stack.bundle}" in out
    assert f"{first.stack.bundle.stat().st_size / 1e6:.1f} MB" in out
    assert "tar --zstd -xf" in out
    assert "4 of 4 layers to compose" in out
    for edit in ("1 requirement, 1 patch, 1 prune rule", "1 requirement, 1 RPATH"):
        assert edit in out
    assert sorted(path.name for path in first.stack.output.iterdir()) == [f"{NAME}.tar.zst", f"{NAME}.tar.zst.sha256"]


def test_a_second_run_is_up_to_date_and_writes_nothing(first: First) -> None:
    before = first.stack.bundle.stat()
    done = first.stack.build().ok()
    assert "up to date" in done.out
    assert first.digest in done.out
    after = first.stack.bundle.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_json_is_a_plan_and_then_a_result(stack: Stack, first: First) -> None:
    plan, result = map(json.loads, stack.build("--json").ok().out.splitlines())
    assert plan["up_to_date"] is False
    assert [layer["cached"] for layer in plan["layers"]] == [True] * 4
    assert plan["output"] == result["path"] == str(stack.bundle)
    assert result["sha256"] == first.digest
    assert result["size"] == stack.bundle.stat().st_size


@pytest.mark.parametrize("words", [("--dry-run",), ("--dry-run", "--json")], ids=["text", "json"])
def test_a_dry_run_writes_no_output(stack: Stack, words: tuple[str, ...]) -> None:
    assert NAME in stack.build(*words).ok().out
    assert not stack.output.exists()


def test_a_plan_downloads_nothing(fresh: Stack, shelf: Index) -> None:
    before = len(shelf.requests)
    plan = json.loads(fresh.run(fresh.words("--json", command="plan")).ok().out)
    assert {wheel["name"]: wheel["fetched"] for wheel in plan["wheels"]} == dict.fromkeys(
        ("app", "core-lib", "hook", "native-ext"), False
    )
    assert shelf.requests[before:] == []
    assert not fresh.output.exists()


# --- unpacking --------------------------------------------------------------------------------------------------------


def _python_extract(bundle: Path, prefix: Path) -> None:
    with bundle.open("rb") as packed:
        plain = zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True)
        with tarfile.open(fileobj=cast("IO[bytes]", plain), mode="r|") as archive:
            archive.extractall(prefix, filter="tar")


def _busybox_extract(bundle: Path, prefix: Path) -> None:
    with subprocess.Popen(["zstd", "-dc", bundle], stdout=subprocess.PIPE) as plain:
        subprocess.run(["busybox", "tar", "-xf", "-", "-C", prefix], stdin=plain.stdout, check=True)


UNPACKERS: Mapping[str, Callable[[Path, Path], None]] = {
    "bsdtar": lambda bundle, prefix: print(run("bsdtar", "-xf", bundle, "-C", prefix)),
    "busybox": _busybox_extract,
    "python": _python_extract,
    "compose": lambda bundle, prefix: print(run(*COMPOSE, "unpack", bundle, prefix, env=_compose_environ(prefix))),
}


def _compose_environ(prefix: Path) -> dict[str, str]:
    repository = str(Path(__file__).resolve().parents[2])
    return {"PATH": os.defpath, "WHEEL_COMPOSER_STORE": str(prefix.parent / "store"), "PYTHONPATH": repository}


@pytest.mark.parametrize("name", UNPACKERS)
def test_every_unpacker_makes_the_tree_that_gnu_tar_makes(name: str, first: First, tree: Path, tmp_path: Path) -> None:
    if name in ("bsdtar", "busybox") and not shutil.which(name):
        pytest.skip(f"{name} is not installed")
    prefix = tmp_path / "prefix"
    prefix.mkdir()
    UNPACKERS[name](first.stack.bundle, prefix)
    assert contents(prefix) == contents(tree)


def test_unpack_refuses_a_folder_in_use(first: First, tmp_path: Path) -> None:
    kept = tmp_path / "prefix/precious"
    kept.parent.mkdir()
    kept.write_text("mine")
    first.stack.compose("unpack", str(first.stack.bundle), str(kept.parent)).refused(10, "not empty", str(kept.parent))
    assert [path.name for path in tmp_path.rglob("*")] == ["prefix", "precious"]


# --- running ----------------------------------------------------------------------------------------------------------


def test_the_bundle_runs_its_edited_modules(tree: Path) -> None:
    assert (tree / SITE / "app/core.py").read_bytes() == PATCHED
    assert run(tree / "bin/app-hello") == "patched 42\n"
    assert (
        run(tree / "bin/python", "-c", "import sys, hook; print(sys.prefix, 'hook' in sys.modules)") == f"{tree} True\n"
    )


def test_the_pth_file_runs_at_start(tree: Path) -> None:
    assert run(tree / "bin/python", "-c", "import sys; print('hook' in sys.modules)") == "True\n"


def test_pruned_files_are_gone(tree: Path) -> None:
    assert not (tree / SITE / "app/tests").exists()
    assert not list((tree / SITE).rglob("app*/**/tests/*"))


def test_compose_detect_runs_below_the_floors(tree: Path, tmp_path: Path) -> None:
    """What it says there is what `compose select --host` refuses that host by."""
    copy = tmp_path / "copy"
    shutil.copytree(tree, copy, symlinks=True)
    floors = copy / "share/compose/floors"
    floors.write_text(f"{floors.read_text().partition(chr(10))[0]}\nglibc\t99.0\tlibc.so.6\n")
    assert json.loads(run(copy / "bin/compose-detect", "--json"))["schema"] == 1
    refused = subprocess.run([copy / "bin/app-hello"], capture_output=True, text=True, check=False)
    assert (refused.returncode, "needs glibc 99.0" in refused.stderr) == (11, True)


PROGRAMS = ("compose-detect", "compose-doctor", "compose-model", "compose-service", "app-serve", "app-resolve")


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_bundles_own_programs_run_by_path(name: str, tree: Path) -> None:
    assert run(tree / "bin" / name, "--help").startswith("usage: ")


def test_a_moved_bundle_runs(tree: Path, tmp_path: Path) -> None:
    for name in ("with spaces and ünïcødé", "second " + "long" * 50):
        moved = tmp_path / name / "prefix"
        shutil.copytree(tree, moved, symlinks=True)
        assert run(moved / "bin/app-hello") == "patched 42\n"
        assert run(moved / "bin/python", "-c", "import sys; print(sys.prefix)") == f"{moved}\n"
        assert run(moved / "bin/compose-doctor", "--help").startswith("usage: compose-doctor")
        shutil.rmtree(moved)


def test_the_librarys_own_neighbour_wins_over_the_hosts(tree: Path, tmp_path: Path) -> None:
    library(tmp_path / "libcore.so", DECOY, "-Wl,-soname,libcore.so")
    environ = {"PATH": os.defpath, "LD_LIBRARY_PATH": str(tmp_path)}
    assert run(tree / "bin/app-hello", env=environ) == "patched 42\n"


def test_the_python_of_the_caller_does_not_leak_in(tree: Path, tmp_path: Path) -> None:
    environ = {"PATH": os.defpath, "HOME": str(tmp_path / "nowhere")}
    out = run(tree / "bin/python", "-c", "import sys; print('\\n'.join(sys.path))", env=environ)
    assert [line for line in out.split() if not line.startswith(str(tree))] == []


@as_root
def test_another_user_unpacks_and_runs_it(first: First) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder, "prefix")
        prefix.mkdir()
        Path(folder).chmod(0o755)
        os.chown(prefix, 65534, 65534)
        with first.stack.bundle.open("rb") as packed:
            run(*NOBODY, "tar", "--zstd", "-xf", "-", "-C", prefix, stdin=packed)
        assert {path.lstat().st_uid for path in prefix.rglob("*")} == {65534}
        assert run(*NOBODY, prefix / "bin/app-hello") == "patched 42\n"


@as_root
def test_a_prefix_that_its_user_cannot_write_runs_and_stays_as_it_is(first: First) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        run("tar", "--zstd", "-xf", first.stack.bundle, "-C", folder)
        before = contents(Path(folder))
        assert run(*NOBODY, Path(folder, "bin/app-hello"), env={}) == "patched 42\n"
        assert contents(Path(folder)) == before


# --- metadata ---------------------------------------------------------------------------------------------------------


def test_every_record_is_right(tree: Path) -> None:
    site = tree / SITE
    records = sorted(site.glob("*.dist-info/RECORD"))
    assert [path.parent.name.split("-")[0] for path in records] == ["app", "core_lib", "hook", "native_ext"]
    for record in records:
        rows = list(csv.reader(record.read_text().splitlines()))
        assert len({name for name, _, _ in rows}) == len(rows)
        for name, digest, size in rows:
            data = (site / name).read_bytes()
            if site / name == record:
                assert (digest, size) == ("", "")
                continue
            expected = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            assert (digest, int(size)) == (f"sha256={expected}", len(data)), name


def test_records_own_every_file_but_the_interpreters(tree: Path) -> None:
    site = tree / SITE
    owned = {
        (site / row[0]).resolve() for path in site.glob("*.dist-info/RECORD") for row in csv.reader(path.open())
    }  # fmt: skip
    for package in ("app", "native_ext", "core_lib"):
        assert {path for path in (site / package).rglob("*") if path.is_file()} - owned == set()
    assert tree / "bin/app-hello" in owned


def test_metadata_says_what_is_there(tree: Path) -> None:
    code = """
import importlib.metadata as m, json
print(json.dumps({d.name: [d.version, d.requires or [], d.read_text("INSTALLER")] for d in m.distributions()}))
"""
    found = json.loads(run(tree / "bin/python", "-c", code))
    assert found == {
        "app": ["1.0", ["native-ext==1.0"], "wheel-composer\n"],
        "core-lib": ["1.0", [], "wheel-composer\n"],
        "hook": ["1.0", [], "wheel-composer\n"],
        "native-ext": ["1.0", ["core-lib==1.0"], "wheel-composer\n"],
    }


# --- same bytes -------------------------------------------------------------------------------------------------------

VARIATIONS: Mapping[str, tuple[dict[str, str], int, tuple[str, ...]]] = {
    "one job": ({}, 0o022, ("-j1",)),
    "four jobs, hash seed": ({"PYTHONHASHSEED": "7"}, 0o022, ("-j4",)),
    "umask 077": ({}, 0o077, ()),
    "umask 000, turkish": ({"LANG": "tr_TR.UTF-8", "LC_ALL": "tr_TR.UTF-8"}, 0o000, ()),
    "no locale, far east": ({"LANG": "C", "LC_ALL": "C", "TZ": "UTC-14"}, 0o022, ()),
    "far west, no home": ({"TZ": "UTC+12", "HOME": "/dev/null/none"}, 0o022, ()),
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_layers_of_wheels_are_the_same_bytes_whatever_the_surroundings(
    name: str, warm: Stack, first: First, tmp_path: Path
) -> None:
    environ, umask, words = VARIATIONS[name]
    scratch = tmp_path / "scratch folder"
    scratch.mkdir()
    stack = warm.fresh(warm.store.parent, home=warm.home, extra={**environ, "TMPDIR": str(scratch)})
    assert len(layers(stack.store)) == 2
    stack.build(*words, umask=umask).ok()
    assert len(layers(stack.store)) == 6
    assert stack.digest() == first.digest


def test_everything_is_the_same_bytes_in_another_place(fresh: Stack, first: First, tmp_path: Path) -> None:
    """All variations at once, from an empty store, with the recipe in another folder."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environ = {"TZ": "UTC-14", "LC_ALL": "C", "TMPDIR": str(scratch), "HOME": str(tmp_path), "PYTHONHASHSEED": "3"}
    stack = fresh.fresh(tmp_path / "ünïcødé and spaces", extra=environ)
    stack.build("-j1", umask=0o077).ok()
    assert stack.digest() == first.digest
    assert stack.leftovers() == []
    assert list(scratch.iterdir()) == []


def test_a_wheelhouse_builds_the_same_bytes_without_a_network(first: First, fresh: Stack, tmp_path: Path) -> None:
    with Index() as index:
        serve(index, wheels())
        online = fresh.fresh(tmp_path / "online", index_url=index.url)
        house = tmp_path / "house"
        words = [*COMPOSE, "fetch", "--recipe", str(online.recipe), "--sm", "90", "--isa", "avx512", "-o", str(house)]
        assert "4 files in" in online.run(words).ok().out
    assert sorted(path.name for path in house.iterdir()) == sorted(wheels())
    offline = fresh.fresh(tmp_path / "offline", index_url=index.url)
    offline.build("--offline", "--wheelhouse", str(house)).ok()
    assert offline.digest() == first.digest


# --- a wheel on this machine ------------------------------------------------------------------------------------------


def _with_local_core(stack: Stack) -> Path:
    """Name core-lib by the path of its wheel instead of taking it from the index."""
    (filename,) = (name for name in wheels() if name.startswith("core_lib"))
    path = stack.home / "wheels" / filename
    path.parent.mkdir()
    path.write_bytes(wheels()[filename])
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    component = f'name = "core-lib"\nversion = "1.0"\npath = "wheels/{filename}"\nsha256 = "{sha256}"\n'
    stack.edit('[[component]]\nname = "hook"', f'[[component]]\n{component}\n[[component]]\nname = "hook"')
    return path


def test_a_local_wheel_is_locked_fetched_exported_and_built(fresh: Stack, tmp_path: Path) -> None:
    path = _with_local_core(fresh)
    fresh.build("--locked").refused(3, "does not fit the recipe")
    with Index() as index:
        serve(index, {name: data for name, data in wheels().items() if name != path.name})
        online = fresh.fresh(tmp_path / "online", index_url=index.url)
        plan = json.loads(online.run(online.words("--json", command="plan")).ok().out)
        assert {wheel["name"]: wheel["fetched"] for wheel in plan["wheels"]}["core-lib"] is True
        house = tmp_path / "house"
        target = ["--recipe", str(online.recipe), *TARGET]
        assert "4 files in" in online.compose("fetch", *target, "-o", str(house)).ok().out
        online.build("--locked").ok()
    text = online.lock.read_text()
    assert f'path = "wheelhouse/{path.name}"' in text
    assert str(fresh.home) not in text
    assert sorted(one.name for one in house.iterdir()) == sorted(wheels())
    path.rename(tmp_path / "gone.whl")
    offline = fresh.fresh(tmp_path / "offline", index_url=index.url)
    offline.build("--offline", "--wheelhouse", str(house)).ok()
    assert offline.digest() == online.digest()


def test_a_local_wheel_that_is_missing_or_changed_is_named(fresh: Stack) -> None:
    path = _with_local_core(fresh)
    where = "small.toml: component[1].path (core-lib)"
    fresh.compose("lock", str(fresh.recipe)).ok()
    path.rename(path.with_suffix(".old"))
    fresh.build().refused(4, where, f"{path}: no such file")
    path.write_bytes(path.with_suffix(".old").read_bytes() + b"x")
    fresh.build().refused(4, where, str(path), "sha256")
    fresh.compose("lock", str(fresh.recipe)).refused(4, where, str(path), "sha256")
    path.with_suffix(".old").rename(path)
    fresh.build("--locked").ok()


# --- what a change costs ----------------------------------------------------------------------------------------------


def test_a_changed_recipe_composes_only_what_it_touches(stack: Stack, first: First) -> None:
    before = layers(stack.store)
    stack.edit('paths = ["app/tests/**"]', 'paths = ["app/tests/data.bin"]')
    cached = {layer["name"]: layer["cached"] for layer in stack.plan()["layers"]}
    assert cached == {"app": False, "core-lib": True, "hook": True, "native-ext": True}
    stack.build().ok()
    assert len(layers(stack.store) - before) == 1
    assert stack.digest() != first.digest


def test_a_program_can_be_left_out(stack: Stack) -> None:
    stack.edit('paths = ["app/tests/**"]', 'paths = ["app/tests/**", "bin/app-hello"]')
    stack.build().ok()
    manifest = json.loads(stack.compose("inspect", "--json", str(stack.bundle)).ok().out)
    app = next(one for one in manifest["layers"] if one["name"] == "app")
    assert "bin/app-hello" not in {entry["path"] for entry in app["entries"]}
    assert {(one["pattern"], one["files"]) for one in app["changes"]["pruned"]} == {
        ("app/tests/**", 2), ("bin/app-hello", 1)}  # fmt: skip
    stack.edit('"bin/app-hello"', '"bin/app-hullo"')
    assert "'bin/app-hullo' matches no file" in stack.build().err


def test_a_program_that_can_only_end_in_an_error_is_told(stack: Stack) -> None:
    stack.edit('patches = ["app/greeting.patch"]\n', "")
    stack.edit('paths = ["app/tests/**"]', 'paths = ["app/tests/**", "app/core.py"]')
    stack.edit('imports = ["app", "app.core"]', 'imports = ["app"]')
    stack.build().ok()
    manifest = json.loads(stack.compose("inspect", "--json", str(stack.bundle)).ok().out)
    (told,) = [one for one in manifest["warnings"] if one.startswith("bin/app-hello: ")]
    assert "app.core is not in the bundle: app.core; pruned by app/core.py: tests are not served" in told


def test_a_changed_patch_composes_only_its_distribution(stack: Stack) -> None:
    before = layers(stack.store)
    patch = stack.recipe.parent / "patches/app/greeting.patch"
    patch.write_text(patch.read_text().replace('+    return "patched"', '+    return "changed"'))
    stack.build().ok()
    assert len(layers(stack.store) - before) == 1
    stack.compose("unpack", str(stack.bundle), str(stack.home / "tree")).ok()
    assert run(stack.home / "tree/bin/app-hello") == "changed 42\n"


def test_a_large_file_is_compressed_once_for_all_layers_that_hold_it(stack: Stack) -> None:
    blobs = list((stack.store / "objects/blob").rglob("*.zst"))
    assert len(blobs) == 1
    before = blobs[0].stat()
    stack.edit('[[component]]\nname = "hook"', _PRUNED_CORE + '[[component]]\nname = "hook"')
    stack.build().ok()
    assert list((stack.store / "objects/blob").rglob("*.zst")) == blobs
    assert blobs[0].stat().st_ino == before.st_ino


_PRUNED_CORE = """
[[component]]
name = "core-lib"
prune = [{ paths = ["core_lib/__init__.py"], reason = "a namespace is enough" }]

"""


def test_other_shapes_of_the_same_tree(stack: Stack, tree: Path) -> None:
    stack.build("--compress", "fast", "--no-bytecode").ok()
    stack.compose("unpack", str(stack.bundle), str(stack.home / "tree")).ok()
    found = contents(stack.home / "tree")
    compiled = {path.rpartition("/__pycache__/")[0] for path in found if path.endswith(".pyc")}
    assert compiled <= {f"lib/python{PYTHON}/encodings", f"lib/python{PYTHON}"}, "more than what no hook precedes"
    assert found.keys() - contents(tree).keys() == set()
    environ = {"PATH": os.defpath, "WHEEL_COMPOSER_CACHE": str(stack.home / "cache")}
    assert run(stack.home / "tree/bin/app-hello", env=environ) == "patched 42\n"
    assert contents(stack.home / "tree") == found, "a start wrote into the bundle"


# --- the host's Python ------------------------------------------------------------------------------------------------


HOSTED = f"{NAME}-hostpython.tar.zst"


@pytest.fixture(scope="module")
def hosted(first: First, tmp_path_factory: pytest.TempPathFactory) -> Stack:
    """The first stack without an interpreter, built and unpacked into its home's `tree`. Tests do not change it."""
    stack = cold(first.stack, tmp_path_factory.mktemp("hosted"))
    shutil.copytree(first.stack.store, stack.store)
    out = stack.build("--python", "host").ok().out
    assert "interpreter: host" in out
    assert f"warning:  no interpreter in the bundle: it needs a CPython {PYTHON} on the host" in out
    (stack.home / "tree").mkdir()
    run("tar", "--zstd", "-xf", stack.output / HOSTED, "-C", stack.home / "tree")
    return stack


def _host_path() -> str:
    """A PATH on which a Python that can run the small stack is."""
    return f"{find_pythons((PYTHON,))[0].path.parent}:{os.defpath}"


def test_a_bundle_without_a_python_runs_on_the_hosts(hosted: Stack, tmp_path: Path) -> None:
    tree = hosted.home / "tree"
    code = "import sys, hook; print(sys.prefix, sys.executable, hook.loaded)"
    for prefix in (tree, tmp_path / "moved to ünïcødé"):
        if prefix != tree:
            shutil.copytree(tree, prefix)
        environ = {"PATH": _host_path(), "PYTHONPATH": "/nonexistent"}
        assert run(prefix / "bin/app-hello", env=environ) == "patched 42\n"
        assert run(prefix / "bin/python", "-c", code, env=environ) == f"{prefix} {prefix}/bin/python{PYTHON} True\n"
        active = f". '{prefix}/bin/activate' && app-hello && python -m app.core && command -v python"
        assert run("sh", "-c", active, env=environ | {"COMPOSE_PREFIX": str(prefix)}).split("\n") == [
            "patched 42", f"{prefix}/bin/python", "",
        ]  # fmt: skip


def test_a_bundle_without_a_python_holds_none_and_is_sound(hosted: Stack) -> None:
    tree = hosted.home / "tree"
    assert json.loads((tree / "share/compose/manifest.json").read_text())["interpreter"] == "host"
    assert not (tree / f"lib/python{PYTHON}/os.py").exists()
    assert (tree / "bin/python").read_bytes().startswith(b"#!/bin/sh\n")
    assert (tree / SITE / f"app/__pycache__/core.cpython-{PYTHON.replace('.', '')}.pyc").exists()
    for path in (hosted.output / HOSTED, tree):
        assert ": sound;" in hosted.compose("verify", str(path)).ok().out
    before = contents(tree)
    run(tree / "bin/app-hello", env={"PATH": _host_path()})
    assert contents(tree) == before


def test_that_modules_import_on_this_machines_python_is_asked_each_time(hosted: Stack) -> None:
    """Of a bundle with a Python it is asked once: that one stays what it is."""
    for _ in range(2):
        assert "importing modules" in hosted.build("--python", "host", "--imports").ok().err


def test_a_bundle_without_a_python_leaves_one_with_it_alone(hosted: Stack) -> None:
    assert sorted(path.name for path in hosted.output.iterdir()) == [HOSTED, f"{HOSTED}.sha256"]
    assert json.loads((hosted.home / "tree/share/compose/manifest.json").read_text())["name"] + ".tar.zst" == HOSTED


def test_a_host_python_that_the_recipe_does_not_offer(first: First) -> None:
    first.stack.build("--python", "host:3.9").refused(2, "not offered for Python '3.9'", f"host:{PYTHON}")


# --- inspect and verify -----------------------------------------------------------------------------------------------


def test_inspect_tells_what_was_changed(first: First) -> None:
    out = first.stack.compose("inspect", str(first.stack.bundle)).ok().out
    for words in (
        "app: heavy>=3 -> dropped (only training needs it)",
        "app: app/tests/**: 2 files",
        "native-ext: core-lib==0.9 -> core-lib==1.0",
        "app: patch core.py: app/greeting.patch",
        "native-ext: rpath libext.so: $ORIGIN/../core_lib/lib",
        "fingerprint:",
    ):
        assert words in out


def test_inspect_json_is_the_manifest_in_the_tree(first: First, tree: Path) -> None:
    manifest = json.loads(first.stack.compose("inspect", "--json", str(first.stack.bundle)).ok().out)
    assert manifest == json.loads((tree / "share/compose/manifest.json").read_text())
    assert manifest["name"] == NAME
    assert {layer["name"] for layer in manifest["layers"]} >= {"app", "core-lib", "hook", "native-ext"}
    listed = {entry["path"] for layer in manifest["layers"] for entry in layer["entries"]}
    assert listed == set(contents(tree)) - {
        "share/compose/manifest.json",
        "share/compose/fingerprint",
        "share/compose/floors",
    }


@pytest.mark.parametrize("words", [(), ("--no-imports",)], ids=["imports", "no imports"])
def test_a_sound_bundle_verifies_packed_and_unpacked(first: First, tree: Path, words: tuple[str, ...]) -> None:
    for path in (first.stack.bundle, tree):
        assert ": sound;" in first.stack.compose("verify", *words, str(path)).ok().out


@pytest.fixture
def damaged(tree: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the tree that a test may damage (of links where it can be, so files are replaced and not written)."""
    copy = tmp_path / "damaged"
    shutil.copytree(tree, copy, symlinks=True, copy_function=os.link)
    yield copy
    shutil.rmtree(copy)


def _replace(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def _flip(prefix: Path) -> str:
    path = prefix / SITE / "core_lib/weights.bin"
    data = bytearray(path.read_bytes())
    data[4_000_000] ^= 1
    _replace(path, bytes(data))
    return "core_lib/weights.bin"


def _add(prefix: Path) -> str:
    (prefix / SITE / "sitecustomize.py").write_text("")
    return "sitecustomize.py"


def _remove(prefix: Path) -> str:
    (prefix / "bin/app-hello").unlink()
    return "bin/app-hello"


def _relink(prefix: Path) -> str:
    path = prefix / SITE / "app/core.py"
    path.unlink()
    path.symlink_to("/etc/hostname")
    return "app/core.py"


def _unresolve(prefix: Path) -> str:
    _replace(prefix / SITE / "core_lib/lib/libcore.so", shared_object(DECOY, "libother.so"))
    return "core_lib/lib/libcore.so"


def _cut(prefix: Path) -> str:
    path = prefix / SITE / "core_lib/lib/libcore.so"
    _replace(path, path.read_bytes()[:200])
    return "core_lib/lib/libcore.so"


def _lose_a_source(prefix: Path) -> str:
    (prefix / SITE / "app/core.py").unlink()
    return "app/core.py"


def _garble_metadata(prefix: Path) -> str:
    _replace(prefix / SITE / "app-1.0.dist-info/METADATA", b"\xff\xfe")
    return "app-1.0.dist-info/METADATA"


def _raise_a_floor(prefix: Path) -> str:
    _replace(prefix / "share/compose/floors", b"small\nglibc\t9.9\tnobody\n")
    return "share/compose/floors"


@pytest.mark.parametrize(
    "damage",
    [_flip, _add, _remove, _relink, _unresolve, _cut, _lose_a_source, _garble_metadata, _raise_a_floor],
)
def test_verify_names_what_is_wrong_with_a_tree(first: First, damaged: Path, damage: Callable[[Path], str]) -> None:
    path = damage(damaged)
    done = first.stack.compose("verify", "--no-imports", str(damaged)).refused(9)
    assert path in done.out
    assert "not sound" in done.out


def test_verify_goes_on_after_a_file_that_is_listed_and_malformed(first: First, damaged: Path) -> None:
    """Its digest is right, so it was packed like that: other findings must not be lost for it."""
    path, manifest = damaged / SITE / _cut(damaged), damaged / "share/compose/manifest.json"
    listed = json.loads(manifest.read_text())
    for layer in listed["layers"]:
        for entry in layer["entries"]:
            if entry["path"] == str(path.relative_to(damaged)):
                entry |= {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "size": path.stat().st_size}
    _replace(manifest, json.dumps(listed).encode())
    gone = _remove(damaged)
    done = first.stack.compose("verify", "--no-imports", str(damaged)).refused(9)
    assert f"content.malformed: {SITE}/core_lib/lib/libcore.so" in done.out
    assert f"missing: {gone}" in done.out


def test_a_checksum_of_another_bundle_is_none(first: First, tmp_path: Path) -> None:
    """A build that was killed between the bundle and its checksum leaves that of an older one, or half of one."""
    other = first.stack.fresh(tmp_path / "other")
    other.build().ok()
    beside, digest = other.bundle.with_name(f"{other.bundle.name}.sha256"), other.digest()
    for text in (f"{'0' * 64}  another.tar.zst\n", "", digest[:20]):
        beside.write_text(text)
        assert "up to date" not in other.build().ok().out
        assert other.digest() == digest


@pytest.mark.parametrize("lose", [Path.unlink, lambda path: path.write_text("{}x"), lambda path: path.write_text("[]")])
def test_a_layer_whose_facts_are_lost_is_made_again(
    first: First, tmp_path: Path, lose: Callable[[Path], object]
) -> None:
    """Without them its requirements and imports would go unproven."""
    other = cold(first.stack, tmp_path / "other")
    shutil.copytree(first.stack.store, other.store)
    facts = {path: path.read_bytes() for path in (other.store / "objects").glob("content*/*/*.json")}
    for path in facts:
        lose(path)
    assert "4 of 4 layers to compose" in other.build().ok().out
    assert {path: path.read_bytes() for path in (other.store / "objects").glob("content*/*/*.json")} == facts


def test_facts_of_an_older_form_are_none(first: First, tmp_path: Path) -> None:
    """They lie where that form had them."""
    other = cold(first.stack, tmp_path / "other")
    shutil.copytree(first.stack.store, other.store)
    (current,) = (other.store / "objects").glob("content*")
    current.rename(current.with_name("content"))
    assert "4 of 4 layers to compose" in other.build().ok().out


def test_another_manifest_of_the_same_layers_is_another_bundle(first: First, tmp_path: Path) -> None:
    other = first.stack.fresh(tmp_path / "other")
    other.build().ok()
    before, text = other.digest(), other.recipe.read_text()
    other.recipe.write_text(text.replace("{prefix}/bin/app-hello", "{prefix}/bin/python -m app.core"))
    try:
        assert "built in" in other.build("--frozen").ok().out
    finally:
        other.recipe.write_text(text)
    assert other.digest() != before


@pytest.mark.parametrize("where", [0.05, 0.5, 0.95, 0.9999])
def test_verify_finds_one_flipped_bit_of_a_bundle(first: First, tmp_path: Path, where: float) -> None:
    data = bytearray(first.stack.bundle.read_bytes())
    data[int(len(data) * where)] ^= 4
    copy = tmp_path / first.stack.bundle.name
    copy.write_bytes(data)
    first.stack.compose("verify", "--no-imports", str(copy)).refused(9, "Copy the bundle again")


@pytest.mark.parametrize("size", [0, 7, 4096, -1])
def test_a_cut_bundle_is_refused(first: First, tmp_path: Path, size: int) -> None:
    copy = tmp_path / first.stack.bundle.name
    copy.write_bytes(first.stack.bundle.read_bytes()[:size])
    for words in (["verify", str(copy)], ["inspect", str(copy)], ["unpack", str(copy), str(tmp_path / "out")]):
        first.stack.compose(*words).refused(9, copy.name)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_manifest_is_no_bundle(first: First, tmp_path: Path) -> None:
    first.stack.compose("verify", str(tmp_path)).refused(9, "is not an unpacked bundle")


def test_a_forgotten_store_is_filled_again(stack: Stack, first: First) -> None:
    stack.build().ok()
    forget(stack)
    assert "up to date" not in stack.build().ok().out
    assert stack.digest() == first.digest


def test_the_module_form_is_the_same_program() -> None:
    assert "compose" in run(
        sys.executable, *COMPOSE[1:], "--version", env={"PYTHONPATH": str(Path(__file__).parents[2])}
    )
