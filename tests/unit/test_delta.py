"""The delta's header: what is written is read back, and nothing that could harm or mislead is read at all."""

from __future__ import annotations

import hashlib
import re

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from composer.errors import VerifyError
from composer.formats.seekable import Frame, render_seek_table
from composer.formats.zstd_blocks import blocks
from composer.model.delta import (
    SHORTEST_COPY,
    TRAILER,
    Chunk,
    Delta,
    Part,
    Sealed,
    header_size,
    parse_header,
    parts_of,
    render_header,
    shared,
)

K = SHORTEST_COPY
A, B, C = "a" * 64, "b" * 64, "0123456789abcdef" * 4
OLD = Sealed(name="stack-sm90", size=1000, sha256=A)
PARTS = (Part(100, 0), Part(7), Part(900, 100), Part(1))
GOOD = Delta(old=OLD, end=(10, C), new=Sealed(name="stack-sm120", size=1008, sha256=B), parts=PARTS)
TEXT = f"""old 1000 {A} stack-sm90
old-end 10 {C}
new 1008 {B} stack-sm120
copy 0 100
store 7
copy 100 900
store 1
"""


def read(body: str, *, stored: int = 8) -> Delta:
    data = f"compose-delta 1 {len(body.encode())}\n{body}".encode()
    assert header_size(data[:64], "x") == len(data)
    return parse_header(data, len(data) + stored + TRAILER, "x")


def test_is_the_documented_text() -> None:
    assert render_header(GOOD).decode() == f"compose-delta 1 {len(TEXT)}\n{TEXT}"
    assert read(TEXT) == GOOD
    assert GOOD.stored == 8


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("copy 0 100", "copy 1 100", "twice"),
        ("copy 100 900", "copy 101 900", "beyond"),
        ("copy 100 900", "copy 999999999999999 900", "beyond"),
        ("copy 100 900", "copy 9999999999999999 900", "list of parts"),
        ("copy 0 100", "copy 0 99", "add up"),
        ("copy 0 100", "copy 00 100", "list of parts"),
        ("copy 0 100", "copy -1 100", "list of parts"),
        ("copy 0 100", "copy 0x0 100", "list of parts"),
        ("copy 0 100", "copy \u0661 100", "list of parts"),
        ("copy 0 100", "move 0 100", "list of parts"),
        ("store 7\n", "store 7", "list of parts"),
        ("store 7\n", "store 7\n\n", "list of parts"),
        ("store 7\n", "store 7\r\n", "list of parts"),
        ("store 7\n", "store 7\nstore 0\n", "add up"),
        ("store 7", "store 8", "9"),
        ("store 1\n", "store 1", "list of parts"),
        ("old 1000", "old 999", "beyond"),
        ("old-end 10", "old-end 1001", "longer than the bundle"),
        ("new 1008", "new 1009", "add up"),
        (A, A[1:], "header"),
        (A, A.upper(), "header"),
        ("stack-sm90", "../../etc/passwd", "header"),
        ("stack-sm90", ".hidden", "header"),
        ("stack-sm90", "a\x1b[2J", "header"),
        ("stack-sm90", "", "header"),
        ("stack-sm90", "x" * 129, "header"),
        ("new ", "new  ", "header"),
    ],
)
def test_no_other_header_is_read(old: str, new: str, fault: str) -> None:
    assert old in TEXT
    with pytest.raises(VerifyError, match=fault):
        read(TEXT.replace(old, new, 1))


@pytest.mark.parametrize("stored", [-80, 0, 7, 9, 1 << 40])
def test_a_file_of_another_size_is_refused(stored: int) -> None:
    with pytest.raises(VerifyError, match="instead of 8"):
        read(TEXT, stored=stored)


@pytest.mark.parametrize(
    "first", ["", "compose-delta 2 10\n", "compose-delta 1 10", "compose-delta 1 010\n", "PK", "\0"]
)
def test_no_delta(first: str) -> None:
    with pytest.raises(VerifyError, match="no delta"):
        header_size(first.encode(), "x")


def test_a_huge_header_is_not_even_read() -> None:
    with pytest.raises(VerifyError, match="the most"):
        header_size(b"compose-delta 1 99999999999999\n", "x")


def test_every_cut_of_the_header_is_refused() -> None:
    data = render_header(GOOD)
    for end in range(len(data)):
        with pytest.raises(VerifyError):
            parse_header(data[:end], end, "x")


@given(st.data())
def test_no_flipped_bit_goes_unnoticed_or_makes_more_than_there_is(data: st.DataObject) -> None:
    header = bytearray(render_header(GOOD))
    at = data.draw(st.integers(0, len(header) - 1))
    header[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        header_size(bytes(header[:64]), "x")
        read_back = parse_header(bytes(header), len(header) + 8 + TRAILER, "x")
    except VerifyError:
        return
    assert re.search(rb"[A-Za-z0-9._+-]", header[at : at + 1])
    assert read_back.new.size <= read_back.old.size + read_back.stored
    assert all((one.offset or 0) + one.size <= read_back.old.size for one in read_back.parts if one.offset is not None)


def test_a_name_that_could_not_be_read_back_is_not_written() -> None:
    odd = Delta(old=OLD, end=(10, C), new=Sealed(name="a b", size=1008, sha256=B), parts=PARTS)
    with pytest.raises(VerifyError, match="plain word"):
        render_header(odd)


def chunks(*sizes_and_digests: tuple[int, str]) -> list[Chunk]:
    found, at = [], 0
    for size, digest in sizes_and_digests:
        found.append(Chunk(at, size, digest))
        at += size
    return found


def test_neighbours_become_one_part_and_short_ones_are_stored() -> None:
    old = chunks((K, "a"), (K, "b"), (10, "c"), (K, "d"), (5, "e"))
    new = chunks((5, "e"), (K, "b"), (10, "c"), (3, "x"), (K, "a"))
    size = new[-1].end
    assert parts_of(shared(old, new), size) == [Part(5), Part(K + 10, K), Part(3), Part(K, 0)]
    assert parts_of([], 9) == [Part(9)]
    assert parts_of([], 0) == []


def test_equal_chunks_are_each_used_once_and_in_runs() -> None:
    old = chunks((K, "a"), (K, "z"), (K, "a"), (K, "b"))
    assert parts_of(shared(old, chunks((K, "z"), (K, "a"), (K, "b"))), 3 * K) == [Part(3 * K, K)]
    assert parts_of(shared(old, chunks((K, "z"), (K, "z"))), 2 * K) == [Part(K, K), Part(K)]


@given(st.lists(st.sampled_from("abcd"), max_size=12), st.lists(st.sampled_from("abcd"), max_size=12))
def test_what_is_found_makes_the_new_bundle(old: list[str], new: list[str]) -> None:
    content = {one: hashlib.sha256(one.encode()).digest() * (K // 32) for one in "abcd"}
    before, after = (b"".join(map(content.__getitem__, names)) for names in (old, new))
    parts = parts_of(shared(*(chunks(*((K, one) for one in names)) for names in (old, new))), len(after))
    made, at, copied = b"", 0, []
    for part in parts:
        begin = at if part.offset is None else part.offset
        made += (after if part.offset is None else before)[begin : begin + part.size]
        copied += [] if part.offset is None else range(part.offset, part.offset + part.size, K)
        at += part.size
    assert made == after
    assert len(copied) == len(set(copied)) == sum(min(old.count(one), new.count(one)) for one in "abcd")


# --- blocks -----------------------------------------------------------------------------------------------------------


def frame(plain: bytes, **options: bool) -> bytes:
    return zstandard.ZstdCompressor(level=1, **options).compress(plain)


NOISE = b"".join(hashlib.sha256(b"%d" % index).digest() for index in range(20_000))


@pytest.mark.parametrize("options", [{}, {"write_checksum": True}, {"write_content_size": False}])
def test_blocks_of_frames(options: dict[str, bool]) -> None:
    data = frame(NOISE, **options) + frame(b"", **options) + frame(bytes(300_000), **options)
    data += render_seek_table([Frame(1, 1)])
    ends = list(blocks(b"before" + data + b"after", 6, 6 + len(data)))
    assert ends[-1] == 6 + len(data)
    assert len(ends) == 5 + 1 + 3 + 1
    assert ends == sorted(set(ends))


def test_blocks_of_frames_that_begin_alike() -> None:
    first, second = (frame(NOISE[:400_000] + end) for end in (b"one" * 9000, b"two" * 90))
    equal = [b for a, b in zip(blocks(first, 0, len(first)), blocks(second, 0, len(second)), strict=False) if a == b]
    assert first[20 : equal[1]] == second[20 : equal[1]]
    assert equal[1] > 200_000


@given(st.binary(max_size=60), st.integers(0, 400))
def test_what_is_no_frame_is_one_block(junk: bytes, cut: int) -> None:
    data = frame(b"some text" * 100)[:cut] + junk
    ends = list(blocks(data, 0, len(data)))
    assert ends == sorted(set(ends))
    assert (ends[-1] if ends else 0) == len(data)
