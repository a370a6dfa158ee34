"""A map of a large library must not end up whole in the memory of the process that proves it."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from composer.proofs._slim_reader import Object, difference
from tests.shared_objects import library

_SIZE = 256 << 20


def _mapped_now() -> int:
    """Bytes of files that are in this process' memory (proc(5), RssFile)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (row,) = [line.split() for line in lines if line.startswith("RssFile:")]
    return int(row[1]) * 1024


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A library with a long hole behind it."""
    path = library(tmp_path / "large.so", "int one(void) { return 1; }")
    with path.open("r+b") as stream:
        stream.truncate(_SIZE)
    return path


def test_reading_all_of_a_map_keeps_little_of_it(large: Path) -> None:
    with large.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
        before = _mapped_now()
        elf = Object(view, "large.so")
        most = 0
        for offset in range(0, _SIZE, 1 << 20):
            elf.read(offset, 1 << 20)
            most = max(most, _mapped_now() - before)
        assert most < _SIZE // 2
        assert elf.read(0, 4) == b"\x7fELF"


def test_what_was_given_back_is_read_again(large: Path) -> None:
    with large.open("r+b") as stream:
        stream.seek(_SIZE - 1)
        stream.write(b"x")
    with large.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
        elf = Object(view, "large.so")
        assert difference(elf, 0, elf, 0, _SIZE) is None
        assert difference(elf, _SIZE // 2, elf, None, _SIZE // 2) == _SIZE // 2 - 1
