"""The seek table: what is written is what other readers expect, and nothing but a sound table is read."""

from __future__ import annotations

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from composer.errors import VerifyError
from composer.formats.seekable import FOOTER_SIZE, Frame, parse_seek_table, render_seek_table, seek_table_size

FRAMES = (Frame(10, 1000), Frame(2**32 - 1, 0), Frame(7, 2**32 - 1))
_WORD = st.integers(0, 2**32 - 1)


def test_is_the_documented_layout() -> None:
    table = render_seek_table([Frame(3, 5)])
    assert table.hex() == "5e2a4d181100000003000000050000000100000000b1ea928f"


def test_every_zstd_decoder_skips_it() -> None:
    parts = [zstandard.compress(text) for text in (b"one", b"two")]
    table = render_seek_table([Frame(len(part), 3) for part in parts])
    with zstandard.ZstdDecompressor().stream_reader(b"".join(parts) + table, read_across_frames=True) as reader:
        assert reader.read() == b"onetwo"


@given(frames=st.lists(st.builds(Frame, _WORD, _WORD), min_size=1, max_size=20))
def test_reads_back_equal(frames: list[Frame]) -> None:
    table = render_seek_table(frames)
    assert seek_table_size(table[-FOOTER_SIZE:], "x") == len(table)
    assert parse_seek_table(table, "x") == tuple(frames)


def test_every_cut_and_every_longer_table_is_refused() -> None:
    table = render_seek_table(FRAMES)
    damaged = [table[start:] for start in range(1, len(table) + 1)]
    damaged += [table[:end] for end in range(len(table))] + [b"\0" + table, table + b"\0"]
    for data in damaged:
        with pytest.raises(VerifyError):
            parse_seek_table(data, "x")


def test_a_flip_outside_of_the_sizes_is_refused() -> None:
    table = render_seek_table(FRAMES)
    for place in (*range(8), *range(len(table) - FOOTER_SIZE, len(table))):
        for bit in range(8):
            flipped = bytearray(table)
            flipped[place] ^= 1 << bit
            with pytest.raises(VerifyError, match=r"seek table"):
                parse_seek_table(bytes(flipped), "x")


@given(data=st.binary(max_size=64))
def test_noise_is_no_table(data: bytes) -> None:
    for read in (seek_table_size, parse_seek_table):
        with pytest.raises(VerifyError):
            read(data, "x")


def test_no_frames_and_too_many_are_refused() -> None:
    footer = render_seek_table(FRAMES)[-FOOTER_SIZE:]
    for count in (0, (1 << 20) + 1, 2**32 - 1):
        with pytest.raises(VerifyError):
            seek_table_size(count.to_bytes(4, "little") + footer[4:], "x")
    assert seek_table_size((1 << 20).to_bytes(4, "little") + footer[4:], "x") == 8 + (8 << 20) + FOOTER_SIZE
