"""An ELF object that streams by is read as the whole one is, whatever pieces it comes in."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path

import pytest

from composer.errors import ElfError
from composer.formats.elf import read_elf
from composer.formats.elf_stream import HEADS, TAIL, ElfStream, NotKeptError
from tests.shared_objects import library, retag

_DYNLOAD = Path(sysconfig.get_path("stdlib"), "lib-dynload")


def _streamed(data: bytes, *, most: int, head: int = HEADS[0], seed: int = 0) -> ElfStream:
    """The object fed in pieces of random sizes up to `most`."""
    chance, view, start = random.Random(seed), memoryview(data), 0
    passing = ElfStream(len(data), "x.so", head)
    while start < len(data):
        assert not passing.complete
        size = chance.randint(0, most)
        passing.feed(view[start : start + size])
        start += size
    assert passing.complete
    return passing


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    script = folder / "versions"
    script.write_text("ONE_1 { global: one; }; ONE_2 { global: two; } ONE_1;")
    source = "int one(void) { return 1; } int two(void) { return 2; }"
    one = library(folder / "libone.so", source, "-Wl,-soname,libone.so", f"-Wl,--version-script={script}")
    call = "int two(void); int one(void); int three(void) { return two() + one(); }"
    return library(folder / "libtwo.so", call, one, "-Wl,-rpath,$ORIGIN/x", "-Wl,-soname,libtwo.so")


def _padded(path: Path, before: int, after: int, words: tuple[str, ...] = ()) -> bytes:
    """A library with so many bytes before and after its dynamic section."""
    source = f'asm(".section .rodata\\n.fill {before},1,7\\n.data\\n.fill {after},1,9\\n.text");'
    functions = "".join(f"int {name}(void) {{ return 1; }}" for name in (*words, "one"))
    return library(path, source + functions, "-Wl,-soname,libpadded.so").read_bytes()


@pytest.fixture(scope="module")
def middle(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Its dynamic section is behind the head that is kept and before the tail."""
    return _padded(tmp_path_factory.mktemp("middle") / "lib.so", HEADS[0] + 999, TAIL + 999)


def test_the_interpreters_own_modules() -> None:
    # Where all modules are built in there are none; the system's C library is then the real object.
    paths = sorted(_DYNLOAD.glob("*.so"))[::4]
    paths += sorted(Path("/lib").glob("*-linux-gnu/lib[cm].so.6"))
    assert len(paths) > 1
    for seed, path in enumerate(paths):
        data = path.read_bytes()
        for most in (700, 1 << 16, 1 << 24):
            assert _streamed(data, most=most, seed=seed).read() == read_elf(data, "x.so"), path.name


def test_versions_names_and_rpath(small: Path) -> None:
    data = small.read_bytes()
    found = _streamed(data, most=97).read()
    assert found == read_elf(data, "x.so")
    assert (found.soname, found.runpath or found.rpath) == ("libtwo.so", ("$ORIGIN/x",))
    assert found.versions_needed == {"libone.so": {"ONE_1", "ONE_2"}}


def test_byte_by_byte(small: Path) -> None:
    data = small.read_bytes()
    assert _streamed(data, most=1).read() == read_elf(data, "x.so")


@pytest.mark.parametrize("most", [5_000, 65_536, 1 << 20, 1 << 25])
def test_a_dynamic_section_in_the_middle(middle: bytes, most: int) -> None:
    whole = read_elf(middle, "x.so")
    assert whole.soname == "libpadded.so"
    assert _streamed(middle, most=most, seed=most).read() == whole


def test_tables_that_were_moved_to_the_end(tmp_path: Path) -> None:
    base = tmp_path / "base.so"
    _padded(base, HEADS[0], TAIL)
    long = ":".join(f"$ORIGIN/{number:0100}" for number in range(40))
    data = retag(base, tmp_path / "moved.so", tag="rpath", entries=long, needed=["libnew.so"]).read_bytes()
    found = _streamed(data, most=1 << 18).read()
    assert (found, found.needed, ":".join(found.rpath)) == (read_elf(data, "x.so"), ("libnew.so",), long)


def test_names_that_were_not_kept(tmp_path: Path) -> None:
    data = _padded(tmp_path / "lib.so", TAIL, TAIL, tuple(f"a_function_{number:05}" for number in range(4000)))
    passing = _streamed(data, most=1 << 16, head=70_000)
    with pytest.raises(NotKeptError):
        passing.read()
    assert _streamed(data, most=1 << 16).read() == read_elf(data, "x.so")


@pytest.mark.parametrize("data", [b"", b"\x7fEL", b"\x7fELF" + bytes(80), b"#!/bin/sh\n" * 20_000])
def test_what_is_not_elf(data: bytes) -> None:
    with pytest.raises(ElfError):
        _streamed(data, most=50_000).read()


def test_a_cut_object_is_refused_as_the_whole_is(small: Path) -> None:
    data = small.read_bytes()
    for end in range(0, 0x400, 16):
        with pytest.raises(ElfError) as whole:
            read_elf(data[:end], "x.so")
        with pytest.raises(ElfError) as passed:
            _streamed(data[:end], most=99).read()
        assert str(passed.value) == str(whole.value)
