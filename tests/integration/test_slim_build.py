"""Slimmed bundles: what is cut, what stays byte for byte, what the manifest says of both, and the licence gate."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import signal
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from composer.formats.elf import read_elf
from tests import gpu_wheels
from tests.fatbins import container, held
from tests.gpu_wheels import FATBINS, KERNELS, VENDOR, fatbin, libraries
from tests.servers import Index
from tests.shared_objects import library
from tests.stack import NAME, PYTHON, SITE, Stack, serve

_ACCEPT = ("--slim", "all", "--accept-license-modification")
_KERNELS, _VENDOR = f"{SITE}/kernels/lib", f"{SITE}/nvidia/vendor/lib"
_FOR_90, _FOR_100 = ([fatbin("elf90"), container()], [fatbin("elf100"), container()])
_RECIPE = f"""
schema = 1
name = "small"
version = "1.0"
summary = "A small stack with GPU code"
cuda = "12.8"
pythons = ["{PYTHON}"]
as-of = 2026-03-10T00:00:00Z
sm = [90, 100]
machines = ["x86_64"]

[[untouched]]
names = ["nvidia-*"]
reason = "CUDA EULA"

[[component]]
name = "kernels"
version = "1.0"
imports = ["kernels"]

[component.slim]
files = ["kernels/lib/*.so"]
licence = "MIT"
text = "licenses/LICENSE"
sha256 = "{hashlib.sha256(gpu_wheels.MIT).hexdigest()}"
"""


@pytest.fixture(scope="module")
def shelf() -> Iterator[Index]:
    with Index() as index:
        serve(index, {KERNELS: gpu_wheels.kernels(large=True), VENDOR: gpu_wheels.vendor()})
        yield index


def _write(home: Path, index: Index) -> Stack:
    home.mkdir(parents=True, exist_ok=True)
    stack = Stack(home=home, index_url=index.url, store=home / "store", output=home / "out")
    stack.recipe.write_text(_RECIPE)
    return stack


@dataclass(frozen=True, kw_only=True)
class Built:
    """A bundle, its manifest, and the folder it was unpacked into."""

    stack: Stack
    bundle: Path
    tree: Path

    @property
    def manifest(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.tree / "share/compose/manifest.json").read_bytes())
        return found

    def layer(self, name: str) -> dict[str, Any]:
        found: dict[str, Any]
        (found,) = [one for one in self.manifest["layers"] if one["name"] == name]
        return found

    def entry(self, layer: str, path: str) -> dict[str, Any]:
        found: dict[str, Any]
        (found,) = [one for one in self.layer(layer)["entries"] if one["path"] == path]
        return found

    def slimmed(self, layer: str) -> dict[str, dict[str, Any]]:
        files = self.layer(layer)["changes"].get("files", [])
        return {one["path"].rpartition("/")[2]: one for one in files if one["kind"] == "slim"}

    def held(self, folder: str, name: str, count: int = 2) -> list[bytes]:
        return held(self.tree / folder / name, count)


def _unpacked(stack: Stack, tree: Path, name: str = NAME) -> Built:
    bundle = stack.output / f"{name}.tar.zst"
    tree.mkdir(parents=True)
    subprocess.run(["tar", "--zstd", "-xf", bundle, "-C", tree], check=True)
    return Built(stack=stack, bundle=bundle, tree=tree)


@pytest.fixture(scope="module")
def free(shelf: Index, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Built by default. Tests do not change it."""
    home = tmp_path_factory.mktemp("free")
    stack = _write(home, shelf)
    stack.build().ok()
    return _unpacked(stack, home / "tree")


@pytest.fixture
def stack(free: Built, tmp_path: Path) -> Stack:
    """A copy of the recipe, the lock and the store, without the layer of `kernels`."""
    home = tmp_path / "recipe"
    home.mkdir()
    for path in (free.stack.recipe, free.stack.lock):
        shutil.copy(path, home)
    shutil.copytree(free.stack.store, home / "store")
    for path in (home / "store/objects/layer").rglob("*.json"):
        if json.loads(path.read_bytes())["name"] == "kernels":
            path.unlink()
    return replace(free.stack, home=home, store=home / "store", output=home / "out")


@pytest.fixture(scope="module")
def everything(free: Built, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The same with --slim all."""
    folder = tmp_path_factory.mktemp("all")
    stack = replace(free.stack, output=folder)
    stack.build(*_ACCEPT).ok()
    return _unpacked(stack, folder / "tree", f"{NAME}-private")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- what is cut ------------------------------------------------------------------------------------------------------


def test_what_the_licence_allows_is_cut(free: Built) -> None:
    """After the RPATH, by which the library finds what it needs."""
    path = free.tree / _KERNELS / "libfat.so"
    assert free.held(_KERNELS, "libfat.so") == _FOR_90
    elf = read_elf(path.read_bytes(), path.name)
    assert elf.rpath == ("$ORIGIN/../../nvidia/vendor/lib",)
    sections = subprocess.run(["readelf", "-SW", path], check=True, capture_output=True, text=True)
    assert (".debug_info" in sections.stdout, sections.stderr) == (False, "")
    assert path.stat().st_size < len(libraries()["libfat.so"]) - 100_000
    large = free.tree / _KERNELS / "liblarge.so"
    assert free.held(_KERNELS, "liblarge.so", 3) == [container(), *_FOR_90]
    assert large.stat().st_size < 200_000


def test_the_manifest_says_what_was_cut_and_from_what(free: Built) -> None:
    assert free.manifest["slim"] == "free"
    note = free.slimmed("kernels")["libfat.so"]
    assert note["reason"] == "MIT"
    assert "1 of 5 images kept for SM 90" in note["detail"]
    assert "debug symbols cut" in note["detail"]
    entry = free.entry("kernels", f"{_KERNELS}/libfat.so")
    data = (free.tree / _KERNELS / "libfat.so").read_bytes()
    assert (entry["sha256"], entry["size"]) == (_sha256(data), len(data))
    assert entry["original"] == _sha256(libraries()["libfat.so"])
    assert "untouched" not in free.layer("kernels")["changes"]


def test_what_cannot_be_proven_is_left_alone_and_says_why(free: Built) -> None:
    note = free.slimmed("kernels")["libodd.so"]
    assert note["detail"].startswith("left alone: the GPU code stays: something points into .nv_fatbin")
    entry = free.entry("kernels", f"{_KERNELS}/libodd.so")
    assert entry["sha256"] == _sha256(libraries()["libodd.so"])
    assert "original" not in entry


def test_what_has_nothing_to_cut_is_upstreams(free: Built) -> None:
    assert "libplain.so" not in free.slimmed("kernels")
    assert (free.tree / _KERNELS / "libplain.so").read_bytes() == libraries()["libplain.so"]


def test_what_may_not_be_modified_is_upstreams(free: Built) -> None:
    """Byte for byte, RPATH included, and the manifest proves it by the wheel's digest."""
    changes = free.layer("nvidia-vendor")["changes"]
    assert (changes["untouched"], changes.get("files", [])) == ("CUDA EULA", [])
    entry = free.entry("nvidia-vendor", f"{_VENDOR}/libvendor.so.12")
    with zipfile.ZipFile(BytesIO(gpu_wheels.vendor())) as wheel:
        assert entry["sha256"] == _sha256(wheel.read("nvidia/vendor/lib/libvendor.so.12"))
    assert "original" not in entry
    assert (free.tree / _VENDOR / "libvendor.so.12").read_bytes() == libraries()["libvendor.so.12"]
    assert free.held(_VENDOR, "libvendor.so.12") == list(FATBINS)


def test_wheels_in_the_store_stay_what_they_are(free: Built) -> None:
    wheels = {path.name: path for path in (free.stack.store / "artifacts").rglob("*.whl")}
    assert wheels[KERNELS].read_bytes() == gpu_wheels.kernels(large=True)
    assert wheels[VENDOR].read_bytes() == gpu_wheels.vendor()


def test_the_bundle_is_sound(free: Built, everything: Built) -> None:
    """Digests, RECORD, the loader's closure, and the libraries are loaded by their own import."""
    for one in (free, everything):
        done = one.stack.compose("verify", str(one.bundle)).ok()
        assert "sound; " in done.out
        assert "not sound" not in done.out
        one.stack.compose("verify", str(one.tree)).ok()


def test_the_plan_names_it(free: Built) -> None:
    layers = {one["name"]: one["edits"] for one in free.stack.plan()["layers"]}
    assert layers["kernels"][0] == "slim"
    assert layers["nvidia-vendor"] == []


# --- again, elsewhere, otherwise --------------------------------------------------------------------------------------


def test_a_second_run_has_nothing_to_do(free: Built) -> None:
    digest = free.stack.digest()
    assert json.loads(free.stack.build("--json").ok().out.splitlines()[-1])["up_to_date"]
    assert free.stack.digest() == digest


def test_the_same_bytes_from_another_store(free: Built, tmp_path: Path) -> None:
    other = free.stack.fresh(tmp_path)
    other.build("--jobs", "1").ok()
    assert other.digest() == free.stack.digest()


def test_another_sm_keeps_other_code_and_shares_the_rest(free: Built, tmp_path: Path) -> None:
    other = replace(free.stack, output=tmp_path / "out")
    other.build("--sm", "100").ok()
    built = _unpacked(other, tmp_path / "tree", NAME.replace("sm90", "sm100"))
    assert built.held(_KERNELS, "libfat.so") == _FOR_100
    assert json.loads((built.tree / "share/compose/target.json").read_bytes())["sm"] == [100]
    assert built.layer("nvidia-vendor") == free.layer("nvidia-vendor")


def test_ptx_is_kept_when_asked_for(free: Built, tmp_path: Path) -> None:
    other = replace(free.stack, output=tmp_path / "out")
    keys = {one["name"]: one["key"] for one in free.stack.plan()["layers"]}
    changed = {one["name"]: one["key"] for one in other.plan("--keep-ptx")["layers"]}
    assert {name for name, key in keys.items() if changed[name] != key} == {"kernels"}
    other.build("--keep-ptx").ok()
    built = _unpacked(other, tmp_path / "tree")
    assert built.held(_KERNELS, "libfat.so") == [fatbin("elf90", "ptx90"), container()]
    assert json.loads((built.tree / "share/compose/target.json").read_bytes())["ptx"] is True


def test_slimming_can_be_left_out(free: Built, tmp_path: Path) -> None:
    other = replace(free.stack, output=tmp_path / "out")
    other.build("--slim", "none").ok()
    built = _unpacked(other, tmp_path / "tree")
    assert built.manifest["slim"] == "none"
    assert built.slimmed("kernels") == {}
    assert built.held(_KERNELS, "libfat.so") == list(FATBINS)
    assert (built.tree / _KERNELS / "liblarge.so").read_bytes() == libraries()["liblarge.so"]


# --- the licence gate -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["build", "plan"])
def test_all_needs_to_be_accepted(command: str, stack: Stack) -> None:
    done = stack.run(stack.words("--slim", "all", command=command))
    done.refused(2, "--accept-license-modification", "CUDA EULA")
    assert not stack.output.exists()


def test_accepting_alone_changes_nothing(free: Built) -> None:
    assert free.stack.plan("--accept-license-modification") == free.stack.plan()


def test_all_cuts_what_only_its_user_may_have(everything: Built) -> None:
    assert everything.held(_VENDOR, "libvendor.so.12") == _FOR_90
    assert everything.held(_KERNELS, "libfat.so") == _FOR_90
    note = everything.slimmed("nvidia-vendor")["libvendor.so.12"]
    assert note["reason"] == "modified against its licence: CUDA EULA"
    assert "debug" not in note["detail"]
    entry = everything.entry("nvidia-vendor", f"{_VENDOR}/libvendor.so.12")
    assert entry["original"] == _sha256(libraries()["libvendor.so.12"])
    assert "untouched" not in everything.layer("nvidia-vendor")["changes"]


def test_all_says_so_wherever_the_bundle_goes(everything: Built, free: Built) -> None:
    note = "share/compose/DO-NOT-REDISTRIBUTE"
    assert everything.bundle.name == f"{NAME}-private.tar.zst"
    assert (everything.manifest["name"], everything.manifest["slim"]) == (f"{NAME}-private", "all")
    assert (everything.tree / note).read_text().startswith("Do not pass this bundle on.\n")
    assert json.loads((everything.tree / "share/compose/target.json").read_bytes())["name"] == f"{NAME}-private"
    assert not (free.tree / note).exists()
    path = everything.stack.output / f"{NAME}-private.tar.zst"
    warning = "warning:  the bundle must not be passed on"
    assert warning in everything.stack.compose("inspect", str(path)).ok().out
    assert warning not in free.stack.compose("inspect", str(free.stack.bundle)).ok().out


def test_the_layers_of_all_do_not_get_into_another_bundle(everything: Built, free: Built, tmp_path: Path) -> None:
    """Both were made in one store."""
    assert everything.stack.store == free.stack.store
    again = replace(free.stack, output=tmp_path)
    again.build().ok()
    assert again.digest() == free.stack.digest()


def test_another_licence_text_is_not_modified_under(stack: Stack, shelf: Index) -> None:
    stack.edit(_sha256(gpu_wheels.MIT), "a" * 64)
    stack.build().refused(2, "component kernels: slim", _sha256(gpu_wheels.MIT), "the licence is not the one")
    stack.edit("licenses/LICENSE", "licenses/COPYING")
    stack.build().refused(2, "component kernels: slim", "no licenses/COPYING")
    assert stack.leftovers() == []
    stack.build("--slim", "none").ok()


def test_a_new_release_with_another_licence_is_refused(tmp_path: Path) -> None:
    with Index() as index:
        serve(index, {KERNELS: gpu_wheels.kernels(licence=gpu_wheels.EULA), VENDOR: gpu_wheels.vendor()})
        stack = _write(tmp_path, index)
        stack.build().refused(2, "the licence is not the one under which", _sha256(gpu_wheels.EULA))
        assert stack.leftovers() == []


def test_files_that_are_not_there(stack: Stack) -> None:
    stack.edit('"kernels/lib/*.so"', '"kernels/lib/*.so", "kernels/bin/*.so"')
    stack.build().refused(2, "component kernels: slim", "'kernels/bin/*.so' matches no file")


def test_only_the_named_files_are_cut(stack: Stack, tmp_path: Path) -> None:
    stack.edit('"kernels/lib/*.so"', '"kernels/lib/liblarge.so"')
    stack.build().ok()
    built = _unpacked(stack, tmp_path / "tree")
    assert set(built.slimmed("kernels")) == {"liblarge.so"}
    assert built.held(_KERNELS, "libfat.so") == list(FATBINS)


# --- faults -----------------------------------------------------------------------------------------------------------


def _while_slimming(stack: Stack, act: Callable[[subprocess.Popen[str]], None]) -> subprocess.Popen[str]:
    """Start a build and act once it has begun to inflate an object for slimming."""
    process = stack.start(stack.words())
    deadline = time.monotonic() + 60
    while process.poll() is None and not any(path.stat().st_size for path in _scratch(stack)):
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    act(process)
    return process


def _scratch(stack: Stack) -> list[Path]:
    return list((stack.store / "tmp").glob("*/*/object"))


def _goes_on(stack: Stack, free: Built) -> None:
    stack.build().ok()
    assert stack.digest() == free.stack.digest()
    assert stack.leftovers() == []


def test_killed_while_slimming(stack: Stack, free: Built) -> None:
    for _ in range(3):
        process = _while_slimming(stack, lambda process: process.kill())
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not stack.bundle.exists()
    assert _scratch(stack)
    _goes_on(stack, free)


@pytest.mark.parametrize(("sent", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "term")])
def test_interrupted_while_slimming(sent: signal.Signals, code: int, word: str, stack: Stack, free: Built) -> None:
    process = _while_slimming(stack, lambda process: process.send_signal(sent))
    stack.end(process).refused(code, word, "goes on from here")
    assert stack.leftovers() == []
    _goes_on(stack, free)


def test_no_room_to_slim_in(stack: Stack, free: Built) -> None:
    """The thread that writes the copy has the fault; the user is told."""
    stack.build(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9 << 20, 9 << 20))).refused(
        10, "File too large", "object"
    )
    assert stack.leftovers() == []
    _goes_on(stack, free)


# --- on the host ------------------------------------------------------------------------------------------------------

_NVML = """
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **found) { *found = 0; return 0; }
int nvmlDeviceGetName(void *one, char *name, unsigned size) { name[0] = 'X', name[1] = 0; return 0; }
int nvmlDeviceGetCudaComputeCapability(void *one, int *major, int *minor) { *major = @MAJOR@, *minor = 0; return 0; }
"""


@pytest.mark.parametrize(("major", "code"), [(8, 10), (9, 0)])
def test_a_foreign_gpu_is_refused_at_the_start(free: Built, tmp_path: Path, major: int, code: int) -> None:
    library(tmp_path / "libnvidia-ml.so.1", _NVML.replace("@MAJOR@", str(major)))
    look = "import importlib.util; importlib.util.find_spec('torch'); print('looked')"
    done = subprocess.run([free.tree / "bin/python", "-c", look], check=False, capture_output=True, text=True,
                          env={"LD_LIBRARY_PATH": str(tmp_path), "HOME": str(tmp_path)})  # fmt: skip
    assert (done.returncode, done.stdout) == (code, "" if code else "looked\n"), done.stderr
    if code:
        assert done.stderr.startswith(f"{NAME}: this bundle was built for SM 90; this host has X (SM 80)\n")
