"""`compose gpu-code` on files, folders, wheels and bundles."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from composer.errors import HostError, VerifyError, WheelError
from composer.model.gpu import Selection
from composer.model.layer import Layer
from composer.model.manifest import Manifest, fingerprint_of
from composer.steps.gpu_code import Library, list_gpu_code
from composer.steps.layer import SUFFIX, LayerWriter
from composer.steps.pack import Ready, pack
from composer.store import Store
from tests.fatbins import Parts, container, cubin, gpu_library, image, images
from tests.wheels import build_wheel, wheel_filename

PARTS = Parts(
    fatbins=[
        images("elf80", "elf90", "elf90a", "ptx90"),
        container(image("elf", 100, compression="zstd")),
        images("ptx52"),
    ],
    items=[images("elf100a")],
    before=images("elf50"),
)
SM90 = Selection(sms=(90,))
ONE = 64 + 96  # bytes of an image of tests.fatbins


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gpu_library(tmp_path_factory.mktemp("gpu") / "libkernels.so.1", PARTS)


def listed(path: Path, selection: Selection = SM90) -> list[Library]:
    return list(list_gpu_code(path, selection))


def check(found: Library) -> None:
    assert (found.machine, found.doubts, found.pinned) == ("x86_64", (), 0)
    assert found.containers == {".nv_fatbin": 3, ".cask_resource": 1}
    assert found.elsewhere == {".rodata": 16 + ONE}
    rows = {(one.kind, one.sm, one.variant, one.compression): (one.count, one.size) for one in found.images}
    assert rows == dict.fromkeys(
        [
            ("elf", 80, "", "none"), ("elf", 90, "", "none"), ("elf", 90, "a", "none"), ("elf", 100, "", "zstd"),
            ("elf", 100, "a", "none"), ("ptx", 52, "", "none"), ("ptx", 90, "", "none"),
        ],
        (1, ONE),
    )  # fmt: skip
    assert found.selected is not None
    assert (found.selected.kept, found.selected.dropped) == (3 * ONE, 4 * ONE)
    assert (found.selected.without, found.selected.compiled) == ({90: 1}, {90: 1})


def test_a_file(library: Path) -> None:
    (found,) = listed(library)
    assert (found.path, found.size) == (library.name, library.stat().st_size)
    check(found)


def test_all_targets_select_nothing(library: Path) -> None:
    (found,) = listed(library, Selection())
    assert found.selected is None


def test_a_folder(library: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "libkernels.so").write_bytes(library.read_bytes())
    (tmp_path / "libkernels.so").symlink_to("a/libkernels.so")
    (tmp_path / "notes.so").write_bytes(b"no object" * 100)
    (tmp_path / "short.so").write_bytes(b"\x7fELF")
    gpu_library(tmp_path / "plain.so", Parts())
    found = listed(tmp_path)
    assert [one.path for one in found] == ["a/libkernels.so"]
    check(found[0])


def test_loose_cubins(tmp_path: Path) -> None:
    for name, sm, size in (("x/one", 90, 100), ("x/two", 80, 200), ("x/three", 80, 300), ("y/four", 86, 400)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.cubin").write_bytes(cubin(sm, size=size))
    first, second = listed(tmp_path)
    assert (first.path, first.size) == ("x/*.cubin", 600)
    assert [(one.sm, one.count, one.size) for one in first.images] == [(80, 2, 500), (90, 1, 100)]
    assert first.selected is not None
    assert (first.selected.kept, first.selected.dropped, first.selected.without) == (100, 500, {90: 2})
    assert second.selected is not None
    assert (second.path, second.selected.kept) == ("y/*.cubin", 0)


def files(library: Path) -> dict[str, bytes]:
    code = b"x = 1\n" * 99
    return {"kernels/k.cubin": cubin(90), "kernels/libk.so.1": library.read_bytes(), "kernels/x.py": code}


def check_both(found: list[Library], prefix: str, size: int) -> None:
    assert [(one.path, one.size) for one in found] == [
        (f"{prefix}kernels/libk.so.1", size), (f"{prefix}kernels/*.cubin", 500),
    ]  # fmt: skip
    check(found[0])


def test_a_wheel(library: Path, tmp_path: Path) -> None:
    wheel = tmp_path / wheel_filename("kernels", "1.0")
    wheel.write_bytes(build_wheel("kernels", "1.0", files(library)))
    check_both(listed(wheel), "", library.stat().st_size)


def test_a_bundle(library: Path, tmp_path: Path) -> None:
    """Of two layers, of which one has no object and is passed over."""
    store = Store(tmp_path / "store")
    layers = []
    for name, content in (("text", {"share/notes": b"notes" * 100}), ("kernels", files(library))):
        with store.writing("layer", name, SUFFIX) as path, path.open("wb") as out:
            writer = LayerWriter(store, out, level=1, mtime=0, progress=lambda _: None)
            for member, data in content.items():
                writer.data(f"lib/{member}", data)
            writer.link("lib/link.so", "kernels/libk.so.1")
            layers.append(Ready(key=name, layer=writer.finish(name=name, version="1"), fresh=True))

    def manifest(done: list[Layer]) -> Manifest:
        return Manifest(
            name="b", fingerprint=fingerprint_of(done), composer="1", recipe={"name": "b", "version": "1"},
            lock="", target={"sm": "90", "isa": "avx2", "cuda": "12.8", "python": "3.12", "machine": "x86_64"},
            python="3.12", interpreter="", torch="", serve=None, floors={}, checks=[], left_out=[], warnings=[],
            layers=done,
        )  # fmt: skip

    bundle = tmp_path / "b.tar.zst"
    pack(store, layers, manifest, bundle, mtime=0, listener=lambda _: None, accept=lambda _bundle: None)
    check_both(listed(bundle), "lib/", library.stat().st_size)


def test_a_library_that_cannot_be_read_is_listed_with_the_reason(library: Path, tmp_path: Path) -> None:
    data = bytearray(library.read_bytes())
    struct.pack_into("<Q", data, 40, len(data) - 32)
    (tmp_path / "broken.so").write_bytes(data)
    (found,) = listed(tmp_path)
    assert found.doubts == ("truncated",)


def test_what_is_neither(tmp_path: Path) -> None:
    with pytest.raises(HostError):
        listed(tmp_path / "missing.so")
    (tmp_path / "notes.txt").write_bytes(b"notes" * 100)
    os.mkfifo(tmp_path / "queue")
    for name in ("notes.txt", "queue"):
        with pytest.raises(VerifyError, match="neither a shared object, a wheel"):
            listed(tmp_path / name)
    (tmp_path / "cut.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" * 100)
    with pytest.raises(VerifyError, match="no seek table"):
        listed(tmp_path / "cut.tar.zst")
    (tmp_path / "x-1-py3-none-any.whl").write_bytes(b"notes" * 100)
    with pytest.raises(WheelError):
        listed(tmp_path / "x-1-py3-none-any.whl")


def compose(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).parent / "compose", "gpu-code", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command(library: Path) -> None:
    done = compose(library, "--sm", "9.0,80")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{library.name}: ")
    assert lines[0].endswith("3 containers in .nv_fatbin, 1 container in .cask_resource")
    table = {tuple(line.split()[:-3]) for line in lines if line.endswith(" 0.0")}
    assert {("sm_90a", "1"), ("ptx", "52", "1")} <= table
    assert [line.strip() for line in lines[-3:]] == [
        "sm_80: 1 are compiled from PTX when they are loaded",
        "sm_90: 1 have nothing for it",
        "sm_90: 1 are compiled from PTX when they are loaded",
    ]


def test_several_libraries_have_a_sum(library: Path, tmp_path: Path) -> None:
    for name in ("a.so", "b.so"):
        (tmp_path / name).write_bytes(library.read_bytes())
    done = compose(tmp_path, "--sm", "90")
    each, total = done.stdout.split("all 2 libraries: ")
    assert each.startswith("a.so: ")
    assert "b.so: " in each
    rows = [line.split() for line in total.splitlines()]
    assert ["sm_90a", "2", "0.0", "raw", "0.0"] in rows
    assert ["ptx", "52", "2", "0.0", "raw", "0.0"] in rows
    assert rows[-1] == ["keeps", "0.0", "MB,", "drops", "0.0", "MB"]


def test_the_command_as_json(library: Path) -> None:
    done = compose(library, "--sm", "90", "--json")
    (found,) = json.loads(done.stdout)
    assert found["selected"] == {"kept": 3 * ONE, "dropped": 4 * ONE, "without": {"90": 1}, "compiled": {"90": 1}}


def test_the_command_without_gpu_code(tmp_path: Path) -> None:
    done = compose(tmp_path)
    assert (done.returncode, done.stdout) == (0, "no GPU code\n")


def test_an_unknown_architecture(library: Path) -> None:
    done = compose(library, "--sm", "77")
    assert done.returncode == 2
    assert "77" in done.stderr
