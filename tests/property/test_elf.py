from __future__ import annotations

import contextlib
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composer.errors import ElfError
from composer.formats.elf import load_faults, read_elf
from tests.shared_objects import library


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("mutants")
    script = folder / "versions"
    script.write_text("ONE_1 { global: one; }; ONE_2 { global: two; } ONE_1;")
    source = "int one(void) { return 1; } int two(void) { return 2; }"
    one = library(folder / "libone.so", source, "-Wl,-soname,libone.so", f"-Wl,--version-script={script}")
    call = "int two(void); int one(void); int three(void) { return two() + one(); }"
    return library(folder / "libtwo.so", call, one, "-Wl,-rpath,$ORIGIN/x", "-Wl,-soname,libtwo.so").read_bytes()


def _must_not_leak(data: bytes) -> None:
    with contextlib.suppress(ElfError):
        load_faults(read_elf(data, "mutant.so"))


# Half of the flips hit the headers and the version and string tables at the front, the rest falls anywhere.
_FLIPS = st.lists(st.tuples(st.one_of(st.integers(0, 0x500), st.integers(0, 2**20)), st.integers(1, 255)), max_size=6)


@settings(max_examples=1500, deadline=timedelta(seconds=2))
@given(flips=_FLIPS)
def test_flipped_bytes(sound: bytes, flips: list[tuple[int, int]]) -> None:
    data = bytearray(sound)
    for place, mask in flips:
        data[place % len(data)] ^= mask
    _must_not_leak(bytes(data))


@settings(max_examples=500, deadline=timedelta(seconds=2))
@given(place=st.integers(0, 2**20), number=st.integers(0, 2**64 - 1), cut=st.integers(0, 2**20))
def test_replaced_words(sound: bytes, place: int, number: int, cut: int) -> None:
    data = bytearray(sound)
    start = place % (len(data) // 8) * 8
    data[start : start + 8] = number.to_bytes(8, "little")
    _must_not_leak(bytes(data[: len(data) - cut % 64]))


@settings(max_examples=300)
@given(tail=st.binary(max_size=400), bits=st.sampled_from([1, 2]), order=st.sampled_from([1, 2]))
def test_a_magic_and_noise(tail: bytes, bits: int, order: int) -> None:
    _must_not_leak(b"\x7fELF" + bytes([bits, order]) + tail)
