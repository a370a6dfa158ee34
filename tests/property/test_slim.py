from __future__ import annotations

import contextlib
import struct
from collections.abc import Sequence
from datetime import timedelta

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from composer.errors import ElfError
from composer.formats.elf_cut import cut
from composer.formats.gpu_code import read_gpu_code
from composer.formats.slim import slim
from composer.model.gpu import Selection
from composer.proofs.slimmed import prove_slimmed
from tests.elf_memory import memory, sections, segments
from tests.fatbins import Parts, container, gpu_library, image

_KINDS = (1, 2, 8, 64)
_PLAIN, _ARCH_SPECIFIC, _FAMILY_SPECIFIC = 0x11, 0x100011, 0x200011
_SMS = (50, 61, 72, 75, 80, 86, 87, 89, 90, 100, 101, 103, 110, 120, 121)
_TARGETS = (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)


_Image = tuple[int, tuple[int, int]]  # kind, SM and flags


class _Object(bytes):
    """Bytes that do not fill the screen when a test fails."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"


def _object(folder_name: str, factory: pytest.TempPathFactory, payload: int, *words: str) -> _Object:
    fatbin = container(*(image(payload=bytes([number]) * payload) for number in range(1, 5)))
    parts = Parts(
        fatbins=[fatbin] * 3, relinkable=[fatbin] * 2, device_linked=[1, 3], items=[b"data", fatbin, b"more", fatbin]
    )
    return _Object(gpu_library(factory.mktemp(folder_name) / "lib.so", parts, *words).read_bytes())


@pytest.fixture(scope="module", params=["rela", "relr"])
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    words = ["-Wl,-z,pack-relative-relocs"] if request.param == "relr" else []
    return _object(request.param, tmp_path_factory, 4000, *words)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return _object("small", tmp_path_factory, 1500)


# Architecture-specific code exists from 90 on, family-specific from 100 on.
_VERSION = st.one_of(
    st.tuples(st.sampled_from(_SMS), st.just(_PLAIN)),
    st.tuples(st.sampled_from(_SMS[_SMS.index(90) :]), st.just(_ARCH_SPECIFIC)),
    st.tuples(st.sampled_from(_SMS[_SMS.index(100) :]), st.just(_FAMILY_SPECIFIC)),
)
_IMAGE = st.tuples(st.sampled_from(_KINDS), _VERSION)


# Without shrinking: an example is as small as another, and each takes a whole proof.
@settings(max_examples=100, deadline=timedelta(seconds=5), phases=(Phase.reuse, Phase.generate))
@given(
    content=st.lists(_IMAGE, min_size=28, max_size=28),
    sms=st.lists(st.sampled_from(_TARGETS), max_size=3, unique=True),
    keep_ptx=st.booleans(),
    debug=st.booleans(),
)
def test_any_images_and_any_targets(
    sound: bytes, content: Sequence[_Image], sms: list[int], keep_ptx: bool, debug: bool
) -> None:
    data = _with_images(sound, content)
    result = slim(data, "x.so", Selection(sms=tuple(sms), keep_ptx=keep_ptx), debug=debug)
    new = b"".join(result.pieces())
    assert result.why is None
    assert (result.how == "unchanged") == (new == data)
    prove_slimmed(data, new, "x.so", sms, keep_ptx=keep_ptx, debug=debug)
    code = read_gpu_code(new, "x.so")
    assert code.doubts == ()
    assert sum(len(one.entries) for region in code.regions for one in region.containers) == result.kept.images
    assert result.kept.images + result.dropped.images == len(content)


def _with_images(data: bytes, content: Sequence[_Image]) -> bytes:
    changed = bytearray(data)
    code = read_gpu_code(data, "x.so")
    entries = [entry for region in code.regions for one in region.containers for entry in one.entries]
    for entry, (kind, (sm, flags)) in zip(entries, content, strict=True):
        struct.pack_into("<H", changed, entry.start, kind)
        struct.pack_into("<I", changed, entry.start + 28, sm)
        struct.pack_into("<Q", changed, entry.start + 40, flags)
    return bytes(changed)


def _must_not_leak(data: bytes, *, debug: bool) -> None:
    with contextlib.suppress(ElfError):
        result = slim(data, "x.so", Selection(sms=(75,)), debug=debug)
        assert sum(map(len, result.pieces())) == result.size
        assert result.size <= len(data)


def _interesting(data: bytes) -> list[tuple[int, int]]:
    """Headers, tables and the first bytes of each container: where a flipped bit is not just another payload."""
    spots = [(0, 0x400), (len(data) - 64 * len(sections(data)), len(data))]
    named = sections(data)
    for name in (".dynamic", ".dynsym", ".rela.dyn", ".relr.dyn", ".nvFatBinSegment", ".data", ".symtab"):
        if name in named and named[name][5]:
            spots.append((named[name][4], named[name][4] + named[name][5]))
    code = read_gpu_code(data, "x.so")
    for region in code.regions:
        for one in region.containers:
            spots += [(one.start, one.start + 16), *((entry.start, entry.start + 64) for entry in one.entries)]
    return spots


@settings(max_examples=600, deadline=timedelta(seconds=5))
@given(
    flips=st.lists(st.tuples(st.integers(0, 999), st.integers(0, 9999), st.integers(1, 255)), min_size=1, max_size=5),
    debug=st.booleans(),
)
def test_flipped_bytes(sound: bytes, flips: list[tuple[int, int, int]], debug: bool) -> None:
    spots = _interesting(sound)
    data = bytearray(sound)
    for spot, place, mask in flips:
        start, end = spots[spot % len(spots)]
        data[start + place % (end - start)] ^= mask
    _must_not_leak(bytes(data), debug=debug)


@settings(max_examples=600, deadline=timedelta(seconds=5))
@given(
    spot=st.integers(0, 999),
    place=st.integers(0, 9999),
    number=st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 2**20), st.integers(2**63 - 4096, 2**63 + 4096)),
    missing=st.one_of(st.just(0), st.integers(0, 2**20)),
    debug=st.booleans(),
)
def test_replaced_words(sound: bytes, spot: int, place: int, number: int, missing: int, debug: bool) -> None:
    spots = _interesting(sound)
    start, end = spots[spot % len(spots)]
    data = bytearray(sound)
    at = start + place % ((end - start) // 8) * 8
    data[at : at + 8] = number.to_bytes(8, "little")
    _must_not_leak(bytes(data[: len(data) - missing % len(data)]), debug=debug)


@settings(max_examples=100, deadline=timedelta(seconds=5))
@given(kept=st.integers(0, 40_000), shift=st.integers(0, 40_000))
def test_memory_outside_a_cut_is_the_same(small: bytes, kept: int, shift: int) -> None:
    """Any part of the first region's end, with some zeros between what stays and what leaves."""
    row = sections(small)[".nv_fatbin"]
    start = row[4] + kept % row[5]
    new = bytes(
        cut(small, [(start, row[4] + row[5])], {}, "x.so", zero=[(max(row[4], start - shift % 5000), start)])[:]
    )
    before, after = memory(small), memory(new)
    free = range(row[3] + max(0, start - shift % 5000 - row[4]), row[3] + row[5])
    for address, byte in before.items():
        if address not in free and address >= 0x400:
            assert after[address] == byte
    assert after.keys() <= before.keys()
    assert all((line[3] - line[2]) % line[7] == 0 for line in segments(new) if line[0] == 1)
