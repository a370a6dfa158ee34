from __future__ import annotations

import mmap
import re
import struct
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest

from composer.errors import ElfError
from composer.formats.elf import Elf, Load, is_elf, load_faults, read_elf
from tests.shared_objects import gcc, library

_VERSIONS = "ONE_1.0 { global: one; }; ONE_1.10 { global: two; } ONE_1.0;"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elf")


@pytest.fixture(scope="module")
def versioned(folder: Path) -> Path:
    script = folder / "versions"
    script.write_text(_VERSIONS)
    source = "int one(void) { return 1; } int two(void) { return 2; }"
    return library(folder / "libone.so.1", source, "-Wl,-soname,libone.so.1", f"-Wl,--version-script={script}")


@pytest.fixture(scope="module")
def user(folder: Path, versioned: Path) -> Path:
    source = "int two(void); int three(void) { return two(); }"
    words = ["-Wl,-soname,libuser.so", "-Wl,--disable-new-dtags", "-Wl,-rpath,$ORIGIN/a:$ORIGIN"]
    return library(folder / "libuser.so", source, versioned, *words)


def _read(path: Path) -> Elf:
    return read_elf(path.read_bytes(), path.name)


def test_a_shared_object_with_all_tags(user: Path, versioned: Path) -> None:
    elf = _read(user)
    assert (elf.machine, elf.bits, elf.kind, elf.dynamic) == ("x86_64", 64, "shared", True)
    assert (elf.soname, elf.needed) == ("libuser.so", ("libone.so.1",))
    assert (elf.rpath, elf.runpath) == (("$ORIGIN/a", "$ORIGIN"), ())
    assert elf.versions_needed == {"libone.so.1": frozenset({"ONE_1.10"})}
    assert elf.interpreter is None
    assert elf.size == user.stat().st_size
    assert _read(versioned).versions_defined == {"ONE_1.0", "ONE_1.10"}
    assert load_faults(elf) == ()


def test_runpath_is_not_rpath(folder: Path) -> None:
    elf = _read(library(folder / "librun.so", "", "-Wl,--enable-new-dtags", "-Wl,-rpath,/x:"))
    assert (elf.rpath, elf.runpath) == ((), ("/x", ""))


@pytest.mark.parametrize("view", [bytes, bytearray, memoryview])
def test_any_buffer(user: Path, view: type) -> None:
    assert read_elf(view(user.read_bytes()), "x") == _read(user)


def test_a_map_of_the_file(user: Path) -> None:
    with user.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
        assert read_elf(buffer, "x") == _read(user)


@pytest.mark.parametrize(
    ("words", "kind", "dynamic", "interpreted"),
    [
        (["-pie"], "executable", True, True),
        (["-no-pie"], "executable", True, True),
        (["-static", "-nostdlib", "-nostartfiles", "-Wl,-e,main"], "executable", False, False),
        (["-c"], "relocatable", False, False),
    ],
)
def test_kinds(folder: Path, words: list[str], kind: str, dynamic: bool, interpreted: bool) -> None:
    path = folder / "kind"
    gcc("-o", path, *words, source="int main(void) { return 0; }")
    elf = _read(path)
    assert (elf.kind, elf.dynamic, elf.interpreter is not None) == (kind, dynamic, interpreted)


def test_a_program_of_an_old_linker_and_a_library_that_can_be_run(folder: Path, user: Path) -> None:
    """Without DT_FLAGS_1, only the interpreter tells a program; libc.so.6 has one too, but also a SONAME."""
    path = folder / "old"
    gcc("-pie", "-o", path, source="int main(void) { return 0; }")
    data = path.read_bytes()
    flags = struct.pack("<qQ", 0x6FFFFFFB, 0x08000000)
    assert flags in data
    assert read_elf(data.replace(flags, struct.pack("<qQ", 0x6FFFFFFB, 0)), "x").kind == "executable"
    libc = next(line.split()[2] for line in _ldd(path) if "libc.so.6" in line)
    assert (_read(Path(libc)).kind, _read(Path(libc)).interpreter is not None) == ("shared", True)


def _ldd(path: Path) -> list[str]:
    return subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout.splitlines()


def test_another_machine(user: Path) -> None:
    data = bytearray(user.read_bytes())
    for number, name in [(183, "aarch64"), (3, "i386"), (9999, "em9999")]:
        data[18:20] = number.to_bytes(2, "little")
        assert read_elf(data, "x").machine == name


def test_a_32_bit_object(folder: Path) -> None:
    path = folder / "lib32.so"
    library(
        path, "int f(void) { return 0; }", "-m32", "-Wl,-soname,lib32.so", "-Wl,--enable-new-dtags", "-Wl,-rpath,/r"
    )
    elf = _read(path)
    assert (elf.machine, elf.bits, elf.soname, elf.runpath) == ("i386", 32, "lib32.so", ("/r",))
    assert load_faults(elf) == ()


def test_a_big_endian_header() -> None:
    header = b"\x7fELF\x02\x02\x01" + bytes(9) + struct.pack(">HHIQQQIHHHHHH", 3, 22, 1, 0, 0, 0, 0, 64, 56, 0, 0, 0, 0)
    assert read_elf(header, "x").kind == "shared"


@pytest.mark.parametrize(
    "data",
    [b"", b"\x7fELF", b"INPUT(libfoo.so)", b"\x7fELF" + bytes(60), b"\x7fELF\x02\x01" + bytes(10), b"PK\x03\x04" * 99],
)
def test_what_is_no_object(data: bytes) -> None:
    with pytest.raises(ElfError, match=r"lib\.so") as caught:
        read_elf(data, "lib.so")
    assert caught.value.where == "lib.so"


def test_every_truncation(user: Path) -> None:
    data = user.read_bytes()
    whole = _read(user)
    end = max(load.offset + load.filesz for load in whole.loads)
    for size in range(0, end, 97):
        try:
            elf = read_elf(data[:size], "x")
        except ElfError:
            continue
        assert load_faults(elf), f"cut at {size}"


def test_a_hostile_number_of_versions(user: Path) -> None:
    whole = user.read_bytes()
    count = struct.pack("<qQ", 0x6FFFFFFF, 1)
    assert count in whole
    data = bytearray(whole.replace(count, struct.pack("<qQ", 0x6FFFFFFF, 2**60)))
    (table,) = struct.unpack_from("<Q", data, data.index(struct.pack("<q", 0x6FFFFFFE)) + 8)
    data[table + 12 : table + 16] = (len(data) - table).to_bytes(4, "little")
    data += struct.pack("<HHIII", 1, 0, 0, 0, 16) * 40_000
    with pytest.raises(ElfError, match="more version records"):
        read_elf(data, "x")


def test_a_weak_reference_sets_no_floor(user: Path) -> None:
    data = bytearray(user.read_bytes())
    (table,) = struct.unpack_from("<Q", data, data.index(struct.pack("<q", 0x6FFFFFFE)) + 8)
    (auxiliary,) = struct.unpack_from("<I", data, table + 8)
    data[table + auxiliary + 4] = 2
    assert read_elf(data, "x").versions_needed == {"libone.so.1": frozenset()}


def test_more_program_headers_than_the_header_can_count(user: Path) -> None:
    data = bytearray(user.read_bytes())
    data[56:58] = b"\xff\xff"
    with pytest.raises(ElfError, match="too many program headers"):
        read_elf(data, "x")


@pytest.mark.parametrize("entries", [50, 70_000])
def test_a_dynamic_section_without_end(entries: int) -> None:
    """Neither a section that just stops nor an endless one is believed."""
    place, size = 64 + 2 * 56, entries * 16
    header = (
        b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    )
    load = struct.pack("<2I6Q", 1, 0, 0, 0, 0, place + size, place + size, 4096)
    dynamic = struct.pack("<2I6Q", 2, 0, place, place, 0, size, size, 8)
    with pytest.raises(ElfError, match="no end"):
        read_elf(header + load + dynamic + struct.pack("<qQ", 30, 0) * entries, "x")


def test_is_elf() -> None:
    assert is_elf(b"\x7fELF...")
    assert not is_elf(b"\x7fEL")


def test_the_same_as_readelf() -> None:
    """Every extension module of the interpreter and the test dependencies."""
    folders = [sysconfig.get_config_var("DESTSHARED"), sysconfig.get_path("platlib")]
    paths = sorted(path for folder in folders for path in Path(folder).rglob("*.so"))[:150]
    text = subprocess.run(["readelf", "-dW", *paths], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^File: (.*)\n", text, flags=re.MULTILINE)[1:]
    told = dict(zip(parts[::2], parts[1::2], strict=True))
    assert len(told) == len(paths) > 1
    for path in paths:
        elf, listing = _read(path), told[str(path)]
        assert list(elf.needed) == re.findall(r"\(NEEDED\).*\[(.*)\]", listing)
        assert ":".join(elf.rpath) == "".join(re.findall(r"\(RPATH\).*\[(.*)\]", listing))
        assert ":".join(elf.runpath) == "".join(re.findall(r"\(RUNPATH\).*\[(.*)\]", listing))
        assert (elf.soname or "") == "".join(re.findall(r"\(SONAME\).*\[(.*)\]", listing))
        assert load_faults(elf) == ()


def test_the_interpreter_needs_glibc() -> None:
    elfs = [_read(Path(sys.executable).resolve())]
    elfs += [_read(path) for path in Path(sysconfig.get_config_var("LIBDIR")).glob("libpython3.*.so.*")]
    assert any(name.startswith("GLIBC_2.") for elf in elfs for name in elf.versions_needed.get("libc.so.6", ()))


_SOUND = Elf(machine="x86_64", bits=64, kind="shared", versions_needed={}, size=0x3000)


@pytest.mark.parametrize(
    ("loads", "fault"),
    [
        ([Load(0x10, 0x20, 8, 8, 0x1000)], "not congruent"),
        ([Load(0, 0, 8, 8, 0x1800)], "alignment 6144"),
        ([Load(0, 0, 8, 8, 16)], "alignment 16"),
        ([Load(0, 0x2000, 8, 8, 0x1000), Load(0, 0, 8, 8, 0x1000)], "not above"),
        ([Load(0, 0, 0x1001, 0x1001, 0x1000), Load(0x1000, 0x1000, 8, 8, 0x1000)], "not above"),
        ([Load(0, 0, 9, 8, 0x1000)], "9 bytes in the file and 8"),
        ([Load(0x2000, 0x2000, 0x1001, 0x1001, 0x1000)], "past the end"),
    ],
)
def test_load_faults(loads: list[Load], fault: str) -> None:
    assert [each for each in load_faults(replace(_SOUND, loads=tuple(loads))) if fault in each]


def test_sound_segments() -> None:
    loads = (Load(0, 0, 0x1000, 0x1000, 0x1000), Load(0x1800, 0x201800, 0x800, 0x900, 0x200000 >> 9))
    assert load_faults(replace(_SOUND, loads=loads)) == ()
