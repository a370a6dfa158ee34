"""Mutants of tar segments: a damaged one is refused or reads as something else, and nothing else ever happens."""

from __future__ import annotations

import io
from datetime import timedelta

from hypothesis import given, settings
from hypothesis import strategies as st

from composer.errors import VerifyError
from composer.formats import tar

_NAMES = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="/"), min_size=1, max_size=40).filter(
    lambda name: name not in (".", "..")
)
_PATHS = st.lists(_NAMES, min_size=1, max_size=8).map("/".join)
_FILES = st.dictionaries(_PATHS, st.binary(max_size=1300), min_size=1, max_size=5)


def _segment(files: dict[str, bytes]) -> bytes:
    return b"".join(
        tar.file_header(path, size=len(data), mode=0o644, mtime=1) + data + tar.padding(len(data))
        for path, data in files.items()
    )


def _read(data: bytes) -> list[tuple[object, ...]] | None:
    """What a caller can see of every member; None when the archive is refused."""
    found: list[tuple[object, ...]] = []
    try:
        for info, content in tar.read_members(io.BytesIO(data), "x.tar"):
            assert tar.is_inside(info.name)
            found.append((info.name, info.type, info.mode, info.linkname, content.read() if content else None))
    except VerifyError:
        return None
    return found


@given(files=_FILES)
def test_reads_back_equal(files: dict[str, bytes]) -> None:
    assert _read(_segment(files)) == [(path, b"0", 0o644, "", data) for path, data in files.items()]


_SAMPLE = {"a/b": b"x" * 700, "e" * 120: b"y" * 512, "c": b""}


def _meaning(sample: dict[str, bytes]) -> list[bool]:
    """For every byte of the segment whether it counts; padding and what follows a checksum's digits do not."""
    flags: list[bool] = []
    for path, data in sample.items():
        header = tar.file_header(path, size=len(data), mode=0o644, mtime=1)
        for block in range(0, len(header), tar.BLOCK):
            ustar = header[block + 257 : block + 262] == b"ustar"
            flags += [ustar and not 154 <= place < 156 for place in range(tar.BLOCK)]
        flags += [True] * len(data) + [False] * len(tar.padding(len(data)))
    return flags


_WHOLE = _segment(_SAMPLE)
_COUNTS = _meaning(_SAMPLE)


@settings(max_examples=400)
@given(place=st.integers(0, len(_WHOLE) - 1), mask=st.integers(1, 255))
def test_a_flipped_byte_shows(place: int, mask: int) -> None:
    data = bytearray(_WHOLE)
    data[place] ^= mask
    if _COUNTS[place]:
        assert _read(bytes(data)) != _read(_WHOLE)
    else:
        _read(bytes(data))


@settings(max_examples=400, deadline=timedelta(seconds=2))
@given(
    field=st.sampled_from(
        ["path", "linkpath", "size", "mtime", "uid", "hdrcharset", "GNU.sparse.map", "GNU.sparse.size",
         "GNU.sparse.major", "GNU.sparse.numblocks", "GNU.sparse.name", "GNU.sparse.realsize"]
    ),
    value=st.one_of(st.text(max_size=20), st.integers(-(2**70), 2**70).map(str), st.sampled_from(["0,1", "inf"])),
    rest=st.binary(max_size=600),
)  # fmt: skip
def test_no_attribute_leaks_another_error(field: str, value: str, rest: bytes) -> None:
    record = b" %s=%s\n" % (field.encode(), value.encode("utf-8", "replace"))
    length = next(size for size in range(len(record), len(record) + 5) if size == len(record) + len(str(size)))
    record = str(length).encode() + record
    extended = bytearray(tar.file_header("pax", size=len(record), mode=0o644, mtime=1))
    extended[156:157] = b"x"
    extended[148:156] = b" " * 8
    extended[148:155] = b"%06o\0" % sum(extended)
    _read(bytes(extended) + record + tar.padding(len(record)) + _segment({"member": rest}))


@settings(max_examples=200)
@given(data=st.binary(max_size=2000))
def test_noise(data: bytes) -> None:
    _read(data)
    _read(_WHOLE + data)
