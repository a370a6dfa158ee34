"""Slimmed objects of real linkers, loaded by the real loader."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

from composer.formats.slim import Slimmed, slim
from composer.model.gpu import Selection
from composer.proofs.slimmed import prove_slimmed
from tests.elf_memory import readelf, segments
from tests.fatbins import Parts, container, gpu_library, held, image

_LOADER = Path("/lib64/ld-linux-x86-64.so.2")
_BIG = bytes(range(1, 201)) * 150
_RELR = "-Wl,-z,pack-relative-relocs"


def _fat(*names: str) -> bytes:
    return container(*(image(name[:3], int(name[3:].rstrip("af")), name[3:].lstrip("0123456789"), payload=_BIG)
                       for name in names))  # fmt: skip


def _slim(path: Path, sms: tuple[int, ...] = (90,), *, debug: bool = False) -> tuple[Path, Slimmed]:
    """A slimmed, proven copy of an object."""
    data = path.read_bytes()
    result = slim(data, path.name, Selection(sms=sms), debug=debug)
    new = path.with_name(f"slim-{'-'.join(map(str, sms))}-{path.name}")
    new.write_bytes(b"".join(result.pieces()))
    prove_slimmed(data, new.read_bytes(), path.name, sms, keep_ptx=False, debug=debug)
    readelf(new)
    return new, result


_FATBINS = (_fat("elf80", "elf90", "ptx90"), _fat("elf75"), _fat("elf90", "elf90a", "elf100"))


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize(
    "words",
    [
        (),
        ("-Wl,-z,max-page-size=0x200000",),
        ("-Wl,-z,noseparate-code",),
        (_RELR,),
        (_RELR, "-Wl,-z,max-page-size=0x200000"),
        ("-Wl,-z,now", "-Wl,-z,relro", "-g"),
    ],
    ids=["default", "2mb", "one-segment", "relr", "relr-2mb", "relro"],
)
def test_wrappers_lead_to_the_images_that_stay(tmp_path: Path, words: tuple[str, ...], debug: bool) -> None:
    path = gpu_library(tmp_path / "lib.so", Parts(fatbins=_FATBINS), *words)
    assert held(path, 3) == list(_FATBINS)
    new, result = _slim(path, debug=debug)
    assert result.how == "shrunk"
    assert path.stat().st_size - new.stat().st_size > 4 * len(_BIG) - 2 * 4096
    assert held(new, 3) == [_fat("elf90"), container(), _fat("elf90", "elf90a")]


@pytest.mark.parametrize(("sms", "expected"), [
    ((80,), ["elf80"]), ((80, 90), ["elf80", "elf90"]), ((100,), ["ptx90"]), ((120,), ["ptx90"]), ((72,), []),
])  # fmt: skip
def test_other_targets(tmp_path: Path, sms: tuple[int, ...], expected: list[str]) -> None:
    path = gpu_library(tmp_path / "lib.so", Parts(fatbins=_FATBINS))
    new, _ = _slim(path, sms)
    assert held(new, 1) == [_fat(*expected)]


def test_device_linked_code(tmp_path: Path) -> None:
    """What the driver would link again is not needed when all that is linked has the target."""
    parts = Parts(fatbins=_FATBINS[::2], relinkable=[_fat("elf80", "elf90"), _fat("elf90")], device_linked=[0, 1])
    path = gpu_library(tmp_path / "lib.so", parts)
    new, result = _slim(path)
    assert result.how == "shrunk"
    assert held(new, 4) == [_fat("elf90"), _fat("elf90", "elf90a"), container(), container()]
    assert len([row for row in segments(new.read_bytes()) if row[0] == 1]) >= 6  # two regions, so two holes


@pytest.mark.parametrize("words", [(), (_RELR,)], ids=["rela", "relr"])
def test_resource_items(tmp_path: Path, words: tuple[str, ...]) -> None:
    items = [b"tables", _fat("elf100"), b"more tables", _fat("elf90", "elf100")]
    path = gpu_library(tmp_path / "lib.so", Parts(fatbins=_FATBINS[:1], items=items), *words)
    new, _ = _slim(path)
    library = ctypes.CDLL(str(new))
    library.item.restype = library.item_end.restype = ctypes.c_void_p
    found = [
        ctypes.string_at(library.item(index), library.item_end(index) - library.item(index) - 8) for index in range(4)
    ]
    assert [found[0].rstrip(b"\0"), found[2].rstrip(b"\0")] == [items[0], items[2]]
    assert (found[1], found[3]) == (container(), _fat("elf90"))


def test_addresses_behind_the_code_are_the_same(tmp_path: Path) -> None:
    """What follows the GPU code in its segment, and in the ones behind it."""
    extra = """
    .section .zz_after,"a",%progbits
    .global after
    after: .ascii "after the code"
    .data
    .global behind
    behind: .ascii "in the data"
    .text
    """
    path = gpu_library(tmp_path / "lib.so", Parts(fatbins=_FATBINS, extra=extra))
    new, _ = _slim(path, debug=True)
    places = []
    for one in (path, new):
        library = ctypes.CDLL(str(one))
        after, behind = (ctypes.addressof(ctypes.c_char.in_dll(library, name)) for name in ("after", "behind"))
        assert (ctypes.string_at(after, 14), ctypes.string_at(behind, 11)) == (b"after the code", b"in the data")
        places.append((behind - after, after - ctypes.cast(library.container, ctypes.c_void_p).value))
    assert places[0] == places[1]


def test_the_loader_and_strip_agree(tmp_path: Path) -> None:
    """ld.so --verify gives 2 for a library; a debugger's tools still read the file."""
    path = gpu_library(tmp_path / "lib.so", Parts(fatbins=_FATBINS), "-g")
    new, _ = _slim(path)
    assert subprocess.run([_LOADER, "--verify", new], check=False).returncode == 2
    done = subprocess.run(["objdump", "-d", new], check=True, capture_output=True, text=True)
    assert "<container>:" in done.stdout
    assert done.stderr == ""


def test_aarch64(tmp_path: Path) -> None:
    path = gpu_library(tmp_path / "lib.so", Parts(fatbins=_FATBINS), machine="aarch64")
    new, result = _slim(path, debug=True)
    assert result.how == "shrunk"
    assert path.stat().st_size - new.stat().st_size > 65536
    for kind, _, offset, address, *_ in segments(new.read_bytes()):
        assert kind != 1 or (address - offset) % 65536 == 0
