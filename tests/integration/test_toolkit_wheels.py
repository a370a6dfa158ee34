"""A small toolkit made of wheels: unpacked, mended, whole or not at all, whatever happens on the way."""

from __future__ import annotations

import ctypes
import hashlib
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from composer.errors import BuildError, CollisionError, FetchError, HostError, IntegrityError, LockError
from composer.events import Event, silent
from composer.model.lock import Artifact, Lock, LockedPackage, render_lock
from composer.model.toolchain import PinnedToolchain
from composer.steps import toolkit_wheels
from composer.steps.host_compiler import find_host_compiler
from composer.steps.toolkit_wheels import WheelToolkit, limits_of, make_toolkit, toolchain_lock
from composer.store import Store
from tests.toolkits import CUDA_H, host_config, nvcc_script
from tests.wheels import build_wheel, wheel_filename

SMS = (75, 90)
SPEC = PinnedToolchain(
    cuda="13.0", root="nvidia/cu13", requires=("cuda-toolkit==13.0.2",), compiler=("nvidia-cuda-nvcc",), sms=SMS,
    gcc_newest=15, clang_oldest=3, clang_newest=20,
)  # fmt: skip
COMPILER = find_host_compiler(limits_of(SPEC), os.environ)
NVCC = {
    "nvidia/cu13/bin/nvcc": nvcc_script("13.0.88", SMS).encode(),
    "nvidia/cu13/include/crt/host_config.h": host_config(15, 21).encode(),
    "nvidia/cu13/include/cuda.h": CUDA_H.encode(),
}
CUDART = {
    "nvidia/cu13/lib/libcudart.so.13": b"cudart" * 1000,
    "nvidia/cu13/lib/libnvrtc-builtins.so.13.0": b"builtins",
    "nvidia/cu13/lib/libcheckpoint.so": b"plain",
}


class Shelf:
    """A folder of wheels and the toolkit that is locked to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.packages: list[LockedPackage] = []
        self.add("nvidia-cuda-nvcc", "13.0.88", NVCC, "nvidia/cu13/bin/nvcc")
        self.add("nvidia-cuda-runtime", "13.0.96", CUDART)

    def add(self, name: str, version: str, files: dict[str, bytes], *executable: str) -> None:
        data = build_wheel(name, version, files, executable=executable)
        path = self.folder / wheel_filename(name, version)
        path.write_bytes(data)
        artifact = Artifact(filename=path.name, size=len(data), sha256=hashlib.sha256(data).hexdigest())
        self.packages.append(LockedPackage(name=name, version=version, index="pypi", artifacts=(artifact,)))

    def toolkit(self, spec: PinnedToolchain = SPEC) -> WheelToolkit:
        lock = Lock(name="small", recipe="0" * 64, python="3.12", machine="x86_64", platforms=(),
                    packages=tuple(self.packages))  # fmt: skip
        return WheelToolkit(name="cuda13.0", spec=spec, lock=lock, compiler_only=False)


def make(toolkit: WheelToolkit, store: Store, *wheelhouses: Path, listener: Callable[[Event], None] = silent) -> Path:
    make_toolkit(toolkit, COMPILER, store, offline=True, wheelhouses=wheelhouses, listener=listener)
    return toolkit.root(store)


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "shelf")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def visible(store: Store) -> list[Path]:
    return [path for path in (store.root / "objects").rglob("*") if path.is_file()]


def test_files_are_the_wheels_and_what_a_linker_needs_is_added(shelf, store):
    root = make(shelf.toolkit(), store, shelf.folder)
    for path, data in {**NVCC, **CUDART}.items():
        assert (root.parents[1] / path).read_bytes() == data
    assert os.access(root / "bin/nvcc", os.X_OK)
    assert not os.access(root / "lib/libcudart.so.13", os.X_OK)
    assert (root / "lib64").samefile(root / "lib")
    links = {path.name: str(path.readlink()) for path in (root / "lib").iterdir() if path.is_symlink()}
    assert links == {
        "libcudart.so": "libcudart.so.13",
        "libnvrtc-builtins.so": "libnvrtc-builtins.so.13.0",
    }


def test_the_stub_can_be_linked_with_and_says_that_it_is_one(shelf, store, tmp_path):
    root = make(shelf.toolkit(), store, shelf.folder)
    stubs, program = root / "lib/stubs", tmp_path / "a.out"
    source = "int cuMemAlloc_v2(void); int main(void) { return cuMemAlloc_v2(); }"
    link = ["gcc", "-x", "c", "-", "-o", str(program), f"-L{stubs}", "-lcuda"]
    subprocess.run(link, input=source.encode(), check=True)
    needed = subprocess.run(["readelf", "-d", str(program)], capture_output=True, check=True, text=True).stdout
    assert "[libcuda.so.1]" in needed
    assert ctypes.CDLL(str(stubs / "libcuda.so")).cuInit(0) == 34
    undefined = subprocess.run([*link[:-2], f"-L{stubs}", "-lcuda"], input=b"int cuNever(void); int main(void) "
                               b"{ return cuNever(); }", capture_output=True, check=False)  # fmt: skip
    assert undefined.returncode


def test_a_second_run_needs_nothing_and_writes_nothing(shelf, store):
    root = make(shelf.toolkit(), store, shelf.folder)
    shutil.rmtree(shelf.folder)
    shutil.rmtree(store.artifacts)
    before = {path: path.stat().st_mtime_ns for path in visible(store)}
    assert make(shelf.toolkit(), store) == root
    assert {path: path.stat().st_mtime_ns for path in visible(store)} == before


@pytest.mark.parametrize("damage", ["cut", "removed", "added", "unlinked"])
def test_a_damaged_toolkit_is_made_again(shelf, store, damage):
    root = make(shelf.toolkit(), store, shelf.folder)
    library = root / "lib/libcudart.so.13"
    if damage == "cut":
        os.truncate(library, 100)
    elif damage == "removed":
        library.unlink()
    elif damage == "added":
        (root / "include/more.h").touch()
    else:
        (root / "lib64").unlink()
    assert not shelf.toolkit().is_made(store)
    make(shelf.toolkit(), store)
    assert shelf.toolkit().is_made(store)
    assert library.read_bytes() == CUDART["nvidia/cu13/lib/libcudart.so.13"]
    assert not (root / "include/more.h").exists()


@pytest.mark.parametrize("field", ["sms", "gcc_newest", "cuda"])
def test_a_toolkit_that_is_not_what_the_data_says(shelf, store, field):
    changed: dict[str, object] = {"sms": (75, 90, 100), "gcc_newest": 14, "cuda": "13.1"}
    facts = {name: getattr(SPEC, name) for name in SPEC.__struct_fields__} | {field: changed[field]}
    with pytest.raises(BuildError, match=r"not what toolchains\.toml says"):
        make(shelf.toolkit(PinnedToolchain(**facts)), store, shelf.folder)
    assert not visible(store)


def test_two_wheels_with_one_file(shelf, store):
    shelf.add("nvidia-cuda-crt", "13.0.88", {"nvidia/cu13/include/cuda.h": b"another"})
    with pytest.raises(CollisionError, match="in two wheels"):
        make(shelf.toolkit(), store, shelf.folder)
    assert not visible(store)


def test_other_bytes_than_the_locked_ones(shelf, store):
    path = shelf.folder / wheel_filename("nvidia-cuda-runtime", "13.0.96")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError, match="not the locked bytes"):
        make(shelf.toolkit(), store, shelf.folder)
    assert not visible(store)


def test_offline_without_wheels_is_one_error_that_says_how(shelf, store):
    with pytest.raises(FetchError, match="2 wheels are not here") as caught:
        make(shelf.toolkit(), store)
    assert "compose toolchain ensure cuda13.0 -o WHEELHOUSE" in str(caught.value.fix)


def test_too_little_space_is_told_before_anything_is_unpacked(shelf, store, monkeypatch):
    monkeypatch.setattr(toolkit_wheels.shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(HostError, match="too little space"):
        make(shelf.toolkit(), store, shelf.folder)
    assert not visible(store)


def die(_event: Event) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _make_and_die(toolkit: WheelToolkit, root: Path, shelf: Path, step: str) -> None:
    make(toolkit, Store(root), shelf, listener=lambda event: die(event) if event.step == step else None)


@pytest.mark.parametrize("step", ["fetch", "toolchain"])
def test_a_killed_run_leaves_nothing_visible_and_the_next_one_ends(shelf, store, step):
    process = multiprocessing.get_context("fork").Process(
        target=_make_and_die, args=(shelf.toolkit(), store.root, shelf.folder, step)
    )
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert not visible(store)
    again = Store(store.root)
    assert not list((store.root / "tmp").iterdir())
    make(shelf.toolkit(), again, shelf.folder)
    assert shelf.toolkit().is_made(again)


def _make_and_tell(toolkit: WheelToolkit, root: Path, shelf: Path, log: Path) -> None:
    def note(event: Event) -> None:
        if event.step == "toolchain":
            with log.open("a") as stream:
                stream.write(f"{event.subject}\n")

    make(toolkit, Store(root), shelf, listener=note)


def test_of_several_at_once_one_makes_it(shelf, store, tmp_path):
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_make_and_tell, args=(shelf.toolkit(), store.root, shelf.folder, log)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(log.read_text().splitlines()) == len(shelf.packages)


def test_a_lock_of_other_requirements_is_stale(shelf, tmp_path, monkeypatch):
    folder = tmp_path / "recipes/toolchains"
    folder.mkdir(parents=True)
    monkeypatch.setattr(toolkit_wheels, "data_root", lambda: tmp_path)
    assert toolchain_lock("cuda13.0", SPEC, platform.machine()) is None
    path = folder / f"pylock.cuda13-0-{platform.machine()}.toml"
    path.write_text(render_lock(shelf.toolkit().lock))
    with pytest.raises(LockError, match="does not fit") as caught:
        toolchain_lock("cuda13.0", SPEC, platform.machine())
    assert caught.value.fix == "Run `compose toolchain lock cuda13.0` where an index can be reached."
