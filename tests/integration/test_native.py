"""The prebuilt launcher against a driver that writes down what reaches it, on every CPython at hand."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import pytest

import composer
from composer.errors import BuildError
from composer.formats.patch import apply_patch
from composer.steps.fetch import fetch
from composer.steps.load import load_recipe
from composer.steps.native import (
    TRIPLES,
    NativeLibrary,
    build_library,
    libnuma,
    library_key,
    own_library,
    tar_member,
)
from composer.steps.own import debian_mirrors, releases
from composer.store import Store

HERE = Path(__file__).parent / "native"
SOURCE = Path(composer.__file__).parent / "native" / "triton_launch"


def _pythons() -> list[Path]:
    """This interpreter, and any other CPython from 3.10 to 3.13 on PATH or in pyenv."""
    named = [shutil.which(f"python3.{minor}") for minor in range(10, 14)]
    pyenv = sorted(Path.home().glob(".pyenv/versions/3.1[0-3].*/bin/python3"))
    return [Path(sys.executable), *pyenv] if pyenv else [Path(sys.executable), *map(Path, filter(None, named))]


@pytest.fixture(scope="module")
def zig() -> Path:
    found = importlib.util.find_spec("ziglang")
    if found is None or found.origin is None:
        pytest.skip("the package ziglang is not installed")
    return Path(found.origin).parent


@pytest.fixture(scope="module")
def extension(zig: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("native") / "_composer_launch.abi3.so"
    build_library(own_library(SOURCE), zig=zig, triple=TRIPLES[os.uname().machine], out=out)
    return out


@pytest.fixture(scope="module")
def driver(zig: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the fake libcuda.so.1."""
    folder = tmp_path_factory.mktemp("driver")
    source = NativeLibrary(files={"fake.c": (HERE / "fake_cuda.c").read_bytes()}, flags=("-w",))
    build_library(source, zig=zig, triple=TRIPLES[os.uname().machine], out=folder / "libcuda.so.1")
    (folder / "libcuda.so").symlink_to("libcuda.so.1")
    return folder


def drive(python: Path, driver: Path, *args: str | Path, **env: str) -> Mapping[str, object]:
    done = subprocess.run(
        [python, "-I", HERE / "drive.py", *args], capture_output=True, text=True, timeout=600,
        env={"PATH": os.environ["PATH"], "LD_LIBRARY_PATH": str(driver), **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen: Mapping[str, object] = json.loads(done.stdout)
    return seen


@pytest.fixture(scope="module")
def seen(extension: Path, driver: Path) -> Mapping[str, object]:
    return drive(Path(sys.executable), driver, "ours", extension)


@pytest.fixture(scope="module")
def seen_of_38(extension: Path, driver: Path) -> Mapping[str, object]:
    """The same, called as Triton 3.8 calls it."""
    return drive(Path(sys.executable), driver, "ours-3.8", extension)


def params(seen: Mapping[str, object], name: str) -> list[str]:
    """The argument bytes of one launch, in hexadecimal, without the two scratch pointers."""
    text = seen[name]
    assert isinstance(text, list), (name, text)
    return str(text[0]).partition("| ")[2].split()[:-2]


def packed(layout: str, *values: float) -> list[str]:
    return [struct.pack(f"<{code}", value).hex() for code, value in zip(layout, values, strict=True)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nothing", []),
        ("pointers", packed("QQQ", 0x7000 | 1 << 40, 0x123456789ABC, 0)),
        ("null tensor", packed("Q", 0)),
        ("signed", packed("BBhiq", 1, 255, -32768, -(2**31), -(2**63))),
        ("unsigned masked", packed("BHIQ", 255, 1, 5, 2**64 - 1)),
        ("floats", [*packed("e", 1.1), struct.pack("<f", 1.1)[2:].hex(), *packed("ffd", 1.1, -2.5, 1.1)]),
        ("zeros", packed("eef", 0.0, -0.0, -0.0)),
        ("constexpr", packed("Qi", 16, 7)),
        ("tuples", packed("Qifq", 64 | 1 << 40, 5, 0.5, -1)),
        ("tuple of a list", packed("QiB", 64 | 1 << 40, 5, 1)),
        ("many", packed("Qi", 4096 | 1 << 40, 9) * 60),
    ],
)
def test_arguments_reach_the_driver(seen: Mapping[str, object], name: str, expected: list[str]) -> None:
    assert params(seen, name) == expected


def test_every_half_is_rounded_as_struct_does(seen: Mapping[str, object]) -> None:
    halves = [name for name in seen if name.startswith("half ")]
    assert len(halves) > 200
    for name in halves:
        number = float(name.removeprefix("half "))
        try:
            expected = packed("e", number)
        except OverflowError:
            assert seen[name] == "OverflowError", name
        else:
            assert params(seen, name)[0] == expected[0], name


def test_launch_shapes(seen: Mapping[str, object]) -> None:
    plain, cluster, everything, coop, pdl, empty, negative = (seen[f"shape {index}"] for index in range(7))
    assert str(plain[0]).startswith("launch 3,4,5 128,1,1 shared=1000 stream=0xabc function=0xdef extra=(nil) | ")
    assert str(cluster[0]).startswith("launch 6,4,5 256,1,1 shared=0 ")
    attributes = str(everything[0]).partition("extra=(nil) ")[2].partition(" |")[0].split()
    dims = struct.pack("<3I", 2, 2, 1).hex()
    assert attributes == [*packed("IIIII", 6, 1, 2, 1, 4), dims, *packed("II", 5, 1)]
    assert str(everything[0]).split()[-2:] == packed("QQ", 0x100 | 1 << 40, 0x200)
    assert packed("I", 2)[0] in str(coop[0])
    assert packed("I", 6)[0] in str(pdl[0])
    assert (empty[0], negative[0]) == ("", "")


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("too few", "TypeError"), ("too many", "TypeError"), ("i8 negative", "OverflowError"),
        ("i32 high", "OverflowError"), ("i32 of a float", "TypeError"), ("fp16 overflow", "OverflowError"),
        ("pointer of text", "TypeError"), ("data_ptr raises", "TypeError"), ("host tensor", "ValueError"),
        ("driver failure", "RuntimeError"), ("no tensor map", "TypeError"), ("tuple too short", "TypeError"),
        ("tuple too long", "TypeError"), ("no tuple", "TypeError"), ("launch fails", "RuntimeError"),
        ("hook raises", "ZeroDivisionError"), ("load broken", "RuntimeError"), ("fifo negative", "ValueError"),
    ],
)  # fmt: skip
def test_faults(seen: Mapping[str, object], name: str, error: str) -> None:
    assert seen[name] == error


def test_hooks_surround_the_launch_and_the_gil_is_free_meanwhile(seen: Mapping[str, object]) -> None:
    enter, leave = seen["hooks"]
    assert enter == ["enter", "metadata", ""]
    assert leave[:2] == ["exit", "metadata"]
    assert leave[2].startswith("launch ")
    assert seen["hook raises, nothing launched"] == ""
    assert seen["others run meanwhile"] is True


@pytest.mark.parametrize("python", _pythons(), ids=lambda path: "-".join(path.parts[-3:]))
def test_one_file_serves_every_cpython(python: Path, extension: Path, driver: Path, seen: Mapping[str, object]) -> None:
    assert drive(python, driver, "ours", extension) == seen


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("signed", packed("BBhiq", 1, 255, -32768, -(2**31), -(2**63))),
        ("unsigned", packed("BBHIQ", 1, 255, 65535, 2**32 - 1, 2**64 - 1)),
        ("tuples", packed("Qifq", 64 | 1 << 40, 5, 0.5, -1)),
        ("many", packed("Qi", 4096 | 1 << 40, 9) * 60),
    ],
)
def test_arguments_as_triton_38_gives_them(seen_of_38: Mapping[str, object], name: str, expected: list[str]) -> None:
    assert params(seen_of_38, name) == expected


def test_what_triton_38_asks_for_besides(seen_of_38: Mapping[str, object]) -> None:
    assert seen_of_38["unload"] == ["unload 0x1111 ", None]
    assert seen_of_38["capability"] == ["", "(75003, 76003)"]
    assert seen_of_38["current device"] == ["", "5"]
    sides = struct.pack("<3I", 2, 1, 1).hex()
    assert seen_of_38["clusters"] == [f"set 0x2222 8 1024 set 0x2222 14 1 {sides} ", "1026"]
    assert str(seen_of_38["16 CTAs"]).startswith("['set 0xdef 14 1 launch 16,1,1 ")
    assert seen_of_38["unsigned masked"] == "OverflowError"


def test_a_small_tensor_map_is_mended(seen_of_38: Mapping[str, object]) -> None:
    texts = seen_of_38["map in memory"]
    assert isinstance(texts, list)
    small, large = (struct.unpack("<16Q", bytes.fromhex(text.partition("| ")[2])) for text in texts)
    assert large[1] ^ small[1] == 1 << 21
    assert (large[:1], large[2:]) == (small[:1], small[2:])


def test_a_description_that_is_none(extension: Path) -> None:
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_composer_launch", {str(extension)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for codes in ("?", "(", ")", "i)", "((i)", "i" * 8193, "(" * 33 + ")" * 33):
    try:
        module.launcher(codes)
    except ValueError:
        continue
    sys.exit(codes[:9])
try:
    module.launcher("i")()
except RuntimeError as fault:
    assert "libcuda.so.1" in str(fault)
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_foreign_symbol_and_an_old_glibc(extension: Path) -> None:
    imported = subprocess.run(["nm", "-D", "--undefined-only", extension], capture_output=True, text=True).stdout
    names = [line.split()[-1] for line in imported.splitlines()]
    assert not [name for name in names if name.startswith("cu")]
    versions = {tuple(map(int, found.split("."))) for found in re.findall(r"GLIBC_([\d.]+)", imported)}
    assert versions
    assert max(versions) <= (2, 17)
    needed = subprocess.run(["readelf", "-d", extension], capture_output=True, text=True).stdout
    assert set(re.findall(r"NEEDED.*\[(.*)\]", needed)) == {"libc.so.6", "libm.so.6", "libdl.so.2"}


def test_the_same_bytes_from_another_folder(
    zig: Path, extension: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    out = tmp_path / "elsewhere" / "again.so"
    build_library(own_library(SOURCE), zig=zig, triple=TRIPLES[os.uname().machine], out=out)
    assert out.read_bytes() == extension.read_bytes()


def test_for_the_other_processor(zig: Path, tmp_path: Path) -> None:
    out = tmp_path / "arm.so"
    build_library(own_library(SOURCE), zig=zig, triple=TRIPLES["aarch64"], out=out)
    assert out.read_bytes()[18:20] == struct.pack("<H", 183)


def test_the_compilers_words_and_no_half_file(zig: Path, tmp_path: Path) -> None:
    broken = NativeLibrary(files={"x.c": b"int f( { }"}, flags=())
    with pytest.raises(BuildError, match=r"x\.c:1"):
        build_library(broken, zig=zig, triple=TRIPLES["x86_64"], out=tmp_path / "x.so")
    with pytest.raises(BuildError, match="no zig"):
        build_library(broken, zig=tmp_path, triple=TRIPLES["x86_64"], out=tmp_path / "x.so")
    assert list(tmp_path.iterdir()) == []


def test_the_key_covers_all_that_matters() -> None:
    library = NativeLibrary(files={"a.c": b"1", "b.h": b"2"}, flags=("-w",))
    others = [
        library_key(library, zig_version="0.15.1", triple="t"),
        library_key(library, zig_version="0.15.2", triple="u"),
        library_key(NativeLibrary(files={"a.c": b"1", "b.h": b"3"}, flags=("-w",)), zig_version="0.15.2", triple="t"),
        library_key(NativeLibrary(files={"a.c": b"1", "b.h": b"2"}, flags=()), zig_version="0.15.2", triple="t"),
    ]
    key = library_key(library, zig_version="0.15.2", triple="t")
    assert len({key, *others}) == 5
    assert library_key(own_library(SOURCE), zig_version="1", triple="t") != library_key(
        own_library(SOURCE), zig_version="2", triple="t"
    )
    assert key == library_key(library, zig_version="0.15.2", triple="t")


def test_no_sources(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no C sources"):
        library_key(own_library(tmp_path), zig_version="1", triple="t")


def test_no_source_archive() -> None:
    with pytest.raises(BuildError, match="not a source archive"):
        tar_member(b"rubbish", "numa.h")


@pytest.mark.real
def test_libnuma_from_its_source_release(zig: Path, tmp_path: Path) -> None:
    recipe = load_recipe("sglang").recipe
    fetched = fetch(releases(recipe), into=tmp_path, alternatives=debian_mirrors(recipe, Store(tmp_path)))
    (tarball,) = (path.read_bytes() for path in fetched.paths.values())
    out = tmp_path / "libnuma.so.1"
    build_library(libnuma(tarball), zig=zig, triple=TRIPLES[os.uname().machine], out=out)
    code = f"import ctypes; n = ctypes.CDLL({str(out)!r}); assert n.numa_num_configured_cpus() > 0"
    subprocess.run([sys.executable, "-c", code], check=True)
    exported = subprocess.run(["nm", "-D", "--defined-only", out], capture_output=True, text=True, check=True).stdout
    for name in ("numa_bind", "numa_bitmask_free", "copy_nodemask_to_bitmask", "numa_num_configured_nodes"):
        assert f"{name}@@libnuma_1.2" in exported
    assert b"GNU LESSER GENERAL PUBLIC LICENSE" in tar_member(tarball, "LICENSE.LGPL2.1")


@pytest.mark.real
@pytest.mark.skipif(sys.version_info[:2] < (3, 10), reason="triton 3.5.1 has no wheel")
def test_the_same_bytes_as_tritons_own_launchers(driver: Path, seen: Mapping[str, object], tmp_path: Path) -> None:
    """Triton compiles its driver.c and one launcher per signature here, and both are asked the same 300 things."""
    assert shutil.which("gcc"), "Triton's own way needs gcc"
    assert (Path(sysconfig.get_paths()["include"]) / "Python.h").exists()
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, "triton==3.5.1"]
    subprocess.run(pip, check=True)
    done = subprocess.run(
        [sys.executable, HERE / "drive.py", "triton"], capture_output=True, text=True, timeout=600,
        env={"PATH": os.environ["PATH"], "LD_LIBRARY_PATH": str(driver), "PYTHONPATH": str(site),
             "TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_LIBCUDA_PATH": str(driver)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == seen


@pytest.fixture(scope="module")
def triton_38(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A CPython 3.12, and a folder with the Triton that is locked for it."""
    python = next((one for one in _pythons() if one.parts[-3].startswith("3.12")), None)
    if python is None:
        pytest.skip("triton 3.8.0 is locked for CPython 3.12")
    site = tmp_path_factory.mktemp("triton")
    pip = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", site, "triton==3.8.0"]
    subprocess.run(pip, check=True)
    return python, site


@pytest.mark.real
def test_the_same_bytes_as_the_launcher_of_triton_38(
    driver: Path, seen_of_38: Mapping[str, object], triton_38: tuple[Path, Path], tmp_path: Path
) -> None:
    """Its one launcher is compiled here, and both are asked the same 300 things."""
    assert shutil.which("gcc"), "Triton's own way needs gcc"
    python, site = triton_38
    theirs = subprocess.run(
        [python, HERE / "drive.py", "triton-3.8"], capture_output=True, text=True, timeout=600,
        env={"PATH": os.environ["PATH"], "LD_LIBRARY_PATH": str(driver), "PYTHONPATH": str(site),
             "TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_LIBCUDA_PATH": str(driver)},
    )  # fmt: skip
    assert theirs.returncode == 0, theirs.stderr
    assert json.loads(theirs.stdout) == seen_of_38


LAUNCH_OF_38 = """
import ctypes
from types import SimpleNamespace
import triton
from triton.backends.nvidia import driver

fake = ctypes.CDLL("libcuda.so.1")
fake.fake_text.restype = ctypes.c_char_p
triton.runtime.driver.set_active(driver.CudaDriver())
metadata = SimpleNamespace(
    global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0, profile_scratch_align=1, num_ctas=1,
    launch_cooperative_grid=False, launch_pdl=True, tensordesc_meta=None, instrumentation_mode="",
)
signature = {"x": "*fp32", "pair": ("i32", ("*bf16", "constexpr")), "n": "i32", "BLOCK": "constexpr", "scale": "bf16"}
launcher = driver.CudaLauncher(SimpleNamespace(constants={}, signature=signature), metadata)
sizes = (8, 4, 8, 4, 2, 8, 8)
fake.fake_reset((ctypes.c_int * len(sizes))(*sizes), len(sizes), 0, 0)
launcher(2, 3, 4, 0x55, 0xDEF, (4, 1, 1024), None, None, None, 0x7000, (7, (0x9000, 9)), -1, 3, 1.5)
print(fake.fake_text().decode().partition("| ")[2])
"""


@pytest.mark.real
def test_the_patched_triton_38_launches_without_a_compiler(
    driver: Path, extension: Path, triton_38: tuple[Path, Path], tmp_path: Path
) -> None:
    python, site = triton_38
    shutil.copytree(site, tmp_path / "site")
    (patch,) = (Path(composer.__file__).parents[1] / "patches/triton/3.8.0").iterdir()
    for name, data in apply_patch(patch.read_bytes(), lambda path: (site / path).read_bytes()).items():
        (tmp_path / "site" / name).write_bytes(data)
    shutil.copy(extension, tmp_path / "site/triton/backends/nvidia")
    done = subprocess.run(
        [python, "-B", "-c", LAUNCH_OF_38], capture_output=True, text=True,
        env={"PATH": "/nonexistent", "LD_LIBRARY_PATH": str(driver), "PYTHONPATH": str(tmp_path / "site"),
             "TRITON_CACHE_DIR": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    values = [*packed("QiQi", 0x7000, 7, 0x9000, -1), struct.pack("<f", 1.5)[2:].hex()]
    assert done.stdout.split() == [*values, *packed("QQ", 0, 0)]
    assert not (tmp_path / "cache").exists()
