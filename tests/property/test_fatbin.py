"""Generated GPU code, and mutants of a small object that holds some."""

from __future__ import annotations

import itertools
import struct
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composer.errors import ElfError
from composer.formats.fatbin import read_containers
from composer.formats.gpu_code import GpuCode, kept_entries, read_gpu_code
from composer.formats.instructions import _adrp, _lea
from composer.formats.references import _expand_relr
from composer.model.gpu import Selection
from tests.fatbins import Parts, container, gpu_library, image, images

ENTRIES = st.tuples(
    st.sampled_from(["ptx", "elf", "lto", "other"]),
    st.sampled_from([50, 80, 87, 90, 100, 101, 120]),
    st.sampled_from(["", "a", "f"]),
    st.sampled_from(["none", "lz4", "zstd"]),
    st.integers(8, 12).map(lambda eights: eights * 8),
    st.binary(min_size=4, max_size=200),
)


@given(st.lists(st.tuples(st.lists(ENTRIES, max_size=6), st.integers(0, 5)), max_size=6))
def test_what_is_written_is_read(wanted: list[tuple[list[tuple[str, int, str, str, int, bytes]], int]]) -> None:
    data = b"".join(
        bytes(8 * gap)
        + container(
            *(
                image(kind, sm, variant, compression=how, header=header, payload=payload)
                for kind, sm, variant, how, header, payload in entries
            )
        )
        for entries, gap in wanted
    )
    found = read_containers(data, 0, len(data), "x")
    assert [[(one.kind, one.sm, one.variant, one.compression) for one in each.entries] for each in found] == [
        [entry[:4] for entry in entries] for entries, _ in wanted
    ]
    for each, (entries, _) in zip(found, wanted, strict=True):
        for one, entry in zip(each.entries, entries, strict=True):
            assert data[one.start + entry[4] : one.end].rstrip(b"\0") == entry[5].rstrip(b"\0")
        assert [one.start for one in each.entries] == [each.start + 16, *(one.end for one in each.entries)][:-1]


@given(st.binary(max_size=400), st.integers(0, 400))
def test_any_bytes_are_containers_or_a_fault(noise: bytes, at: int) -> None:
    data = container(image(payload=noise), image("ptx"))
    data = data[:at] + noise + data[at:]
    try:
        found = read_containers(data, 0, len(data), "x")
    except ElfError:
        return
    assert all(0 <= one.start < one.end <= len(data) for one in found)


@given(st.lists(st.integers(0, (1 << 64) - 1), max_size=60), st.integers(1, 9))
def test_relr_in_pieces_is_relr(rows: list[int], piece: int) -> None:
    rows = [0x1000, *rows]
    expected, following = [], 0
    for row in rows:
        if row & 1:
            expected += [(following + 8 * bit) % (1 << 64) for bit in range(63) if row >> (bit + 1) & 1]
            following += 63 * 8
        else:
            expected.append(row)
            following = row + 8
        following %= 1 << 64
    found: list[int] = []
    after = 0
    for start in range(0, len(rows), piece):
        words, after = _expand_relr(np.array(rows[start : start + piece], np.uint64), after)
        found += words.tolist()
    assert sorted(found) == sorted(expected)


@given(st.binary(max_size=60), st.integers(0, 3), st.integers(-(1 << 31), (1 << 31) - 1), st.integers(0, 7))
def test_every_lea_is_found(before: bytes, spare: int, displacement: int, register: int) -> None:
    address = 1 << 40
    code = before + struct.pack("<BBBi", 0x48 | spare & 4, 0x8D, register << 3 | 5, displacement)
    target = address + len(code) + displacement
    found = _lea(np.frombuffer(code, np.uint8), address, np.array([target], np.int64))
    assert target in found.tolist()


@given(
    st.integers(0, 1 << 32).map(lambda words: words * 4),
    st.integers(-(1 << 31), (1 << 31) - 1),
    st.integers(0, 31),
    st.integers(0, 31),
)
def test_every_adrp_with_its_add_is_found(address: int, away: int, register: int, between: int) -> None:
    address += 1 << 40
    target = address + away
    pages = (target >> 12) - (address >> 12)
    adrp = 0x90000000 | (pages & 3) << 29 | (pages >> 2 & 0x7FFFF) << 5 | register
    add = 0x91000000 | (target & 0xFFF) << 10 | register << 5 | (register + 1) % 31
    code = np.array([adrp, *[0xD503201F] * between, add], "<u4").view(np.uint8)
    # Another address in the page does not count: the ADD tells which one is meant.
    wanted = np.array(sorted({target, target ^ 8}), np.int64)
    assert _adrp(code, address, wanted).tolist() == [target]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    parts = Parts(
        fatbins=[images("elf80", "elf90a", "ptx90"), images("elf100f")],
        relinkable=[images("elf80", "ptx52")],
        device_linked=[1],
        items=[b"data", images("elf100a")],
    )
    words = ("-Wl,-z,pack-relative-relocs", "-s")
    return gpu_library(tmp_path_factory.mktemp("gpu") / "lib.so", parts, *words).read_bytes()


def check(data: bytes) -> None:
    """A result, or a fault; and a result without doubts has what an edit builds upon."""
    began = time.monotonic()
    try:
        code = read_gpu_code(data, "lib.so")
    except ElfError:
        return
    finally:
        assert time.monotonic() - began < 5
    if not code.doubts:
        hold_together(data, code)


def hold_together(data: bytes, code: GpuCode) -> None:
    containers = [one for region in code.regions for one in region.containers]
    led = [wrapper.container for wrapper in code.wrappers]
    assert len(set(led)) == len(led)
    for region in code.regions:
        places = sorted((one.start, one.end) for one in region.containers)
        assert all(region.offset <= start and end <= region.offset + region.size for start, end in places)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(places))
    for wrapper in code.wrappers:
        assert struct.unpack_from("<I", data, wrapper.container) == (0xBA55ED50,)
    kept = kept_entries(code, Selection(sms=(90,)))
    assert kept.keys() == {one.start for one in containers}


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_mutants(library: bytes, data: st.DataObject) -> None:
    changed = bytearray(library)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(library) - 8))
        value = data.draw(st.one_of(st.integers(0, 255), st.sampled_from([(1 << 64) - 1, 1 << 63, 1 << 31, 4096])))
        size = data.draw(st.sampled_from([1, 2, 4, 8]))
        changed[place : place + size] = (value % (1 << (8 * size))).to_bytes(size, "little")
    check(bytes(changed))


@given(st.integers(0, 20_000))
@settings(max_examples=200, deadline=None)
def test_truncated(library: bytes, length: int) -> None:
    check(library[:length])


def test_every_byte_of_the_headers_and_tables(library: bytes) -> None:
    """Exhaustive where it matters: file header, program headers, dynamic section, relocations, wrappers, items."""
    code = read_gpu_code(library, "lib.so")
    places = {*range(64 + 56 * 12)}
    places |= {place for one in code.wrappers for place in range(one.offset, one.offset + 24)}
    places |= {
        place
        for region in code.regions
        for one in region.containers
        for place in range(one.start, one.entries[0].start + 64)
    }
    for place in sorted(places):
        for value in (0, 0x7F, 0xFF, library[place] ^ 1):
            changed = bytearray(library)
            changed[place] = value
            check(bytes(changed))


def test_the_check_examines_and_can_fail(library: bytes) -> None:
    code = read_gpu_code(library, "lib.so")
    assert not code.doubts
    hold_together(library, code)
    changed = bytearray(library)
    changed[code.wrappers[0].container] ^= 1
    with pytest.raises(AssertionError):
        hold_together(bytes(changed), code)
