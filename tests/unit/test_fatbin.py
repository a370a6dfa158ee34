"""Containers: what is read, and that nothing else is."""

from __future__ import annotations

import struct

import pytest

from composer.errors import ElfError
from composer.formats import fatbin
from composer.formats.fatbin import find_containers, read_containers
from tests.fatbins import container, image


def read(data: bytes, start: int = 0) -> tuple[fatbin.Container, ...]:
    return read_containers(data, start, len(data), "lib.so")


def test_an_entry() -> None:
    data = container(image("elf", 90, "a"))
    (found,) = read(data)
    assert (found.start, found.end) == (0, len(data))
    (entry,) = found.entries
    assert (entry.kind, entry.sm, entry.variant, entry.compression) == ("elf", 90, "a", "none")
    assert (entry.start, entry.end, entry.image) == (16, len(data), 96)


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_a_compressed_entry(compression: str) -> None:
    ((entry,),) = (found.entries for found in read(container(image("ptx", 52, compression=compression, header=80))))
    assert (entry.kind, entry.compression, entry.image) == ("ptx", compression, 96 * 4)
    assert entry.end - entry.start == 80 + 96


def test_kinds_and_variants() -> None:
    (found,) = read(
        container(image("ptx", 80), image("lto", 90), image("other", 1), image("elf", 100, "f", header=128))
    )
    assert [(one.kind, one.sm, one.variant) for one in found.entries] == [
        ("ptx", 80, ""), ("lto", 90, ""), ("other", 1, ""), ("elf", 100, "f"),
    ]  # fmt: skip


def test_several_containers_with_padding() -> None:
    first, second = container(image()), container()
    found = read(bytes(8) + first + bytes(24) + second + bytes(40), 8)
    assert [(one.start, one.end) for one in found] == [(8, 8 + len(first)), (32 + len(first), 48 + len(first))]
    assert found[1].entries == ()


def test_nothing() -> None:
    assert read(b"") == read(bytes(64)) == ()


def patched(data: bytes, layout: str, offset: int, value: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into("<" + layout, changed, offset, value)
    return bytes(changed)


GOOD = container(image(compression="lz4"), image("ptx", 80))


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (patched(GOOD, "I", 0, 0xBA55ED51), "not a container"),
        (patched(GOOD, "H", 4, 2), "container of an unknown version"),
        (patched(GOOD, "H", 6, 24), "container of an unknown version"),
        (patched(GOOD, "Q", 8, len(GOOD)), "ends outside its section"),
        (patched(GOOD, "Q", 8, 1 << 63), "ends outside its section"),
        (patched(GOOD, "Q", 8, 200), "outside its container|truncated"),
        (patched(GOOD, "Q", 8, 160), "not a container|is truncated"),
        (patched(GOOD, "H", 18, 0x0102), "image of an unknown version"),
        (patched(GOOD, "I", 20, 56), "image of an unknown version"),
        (patched(GOOD, "I", 20, 68), "image of an unknown version"),
        (patched(GOOD, "I", 20, 1 << 20), "image of an unknown version"),
        (patched(GOOD, "Q", 24, 1 << 62), "ends outside its container"),
        (patched(GOOD, "Q", 24, 97), "image of an unknown version"),
        (patched(GOOD, "I", 32, 50), "sizes of an image disagree"),
        (patched(GOOD, "I", 32, 0), "sizes of an image disagree"),
        (patched(GOOD, "Q", 56, 0x11), "sizes of an image disagree"),
        (patched(GOOD, "Q", 56, 0x302011), "both arch-specific and family-specific"),
        (GOOD + b"\1" + bytes(7), "truncated"),
        (GOOD + bytes(4) + GOOD, "not a container"),
        (GOOD[:-8], "ends outside its section"),
        (GOOD + bytes(4096) + GOOD, None),
        (GOOD + bytes(4104) + GOOD, "not a container"),
    ],
)
def test_lies(data: bytes, fault: str | None) -> None:
    if fault is None:
        assert len(read(data)) == 2
        return
    with pytest.raises(ElfError, match=fault) as caught:
        read(data)
    assert caught.value.where == "lib.so"


def test_a_range_outside_the_file() -> None:
    with pytest.raises(ElfError, match="truncated"):
        read_containers(GOOD, 0, len(GOOD) + 8, "lib.so")


def test_a_container_inside_a_payload_is_payload() -> None:
    outer = container(image(payload=container(image())))
    (found,) = read(outer)
    assert len(found.entries) == 1


def test_more_headers_than_can_be_real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fatbin, "_MOST_HEADERS", 9)
    assert len(read(container() * 9)) == 9
    with pytest.raises(ElfError, match="more than 9"):
        read(container() * 10)


def test_containers_among_other_data() -> None:
    one = container(image())
    noise = b"\x50\xed\x55\xba" * 10
    # The last one is not aligned, so nobody made it to be loaded.
    data = b"text".ljust(40, b"!") + one + one + noise + one + b"rest" + one + bytes(4)
    found = find_containers(data, 0, len(data), "lib.so")
    second = 40 + 2 * len(one) + len(noise)
    assert [place.start for place in found] == [40, 40 + len(one), second]


def test_a_container_inside_another_is_not_found_twice() -> None:
    outer = container(image(payload=container(image())))
    assert len(find_containers(outer, 0, len(outer), "lib.so")) == 1


def test_search_crosses_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fatbin, "_SCAN", 64)
    data = bytes(7 * 8) + container(image()) + bytes(48) + container(image())
    found = find_containers(data, 3, len(data), "lib.so")
    assert [one.start for one in found] == [56, 56 + 176 + 48]


def test_search_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fatbin, "_MOST_HEADERS", 5)
    data = b"\x50\xed\x55\xba\0\0\0\0" * 20
    with pytest.raises(ElfError, match="more than 5"):
        find_containers(data, 0, len(data), "lib.so")
