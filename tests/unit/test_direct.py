"""Copies past the page cache: any length, any offset, any file system."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from composer._direct import CHUNK, DirectWriter, read_directly
from composer.errors import HostError

SIZES = (0, 1, 4095, 4096, 4097, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 12_345)


@pytest.fixture(params=["disk", "memory"])
def folder(request, tmp_path):
    if request.param == "disk":
        return tmp_path
    shm = Path("/dev/shm")  # a tmpfs refuses O_DIRECT
    if not os.access(shm, os.W_OK):
        pytest.skip("no /dev/shm")
    return request.getfixturevalue("shm_path")


@pytest.fixture
def shm_path():
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.mark.parametrize("size", SIZES)
def test_what_is_written_is_read(folder, size):
    data = random.Random(size).randbytes(size)
    path = folder / "file"
    with path.open("wb") as out:
        writer = DirectWriter(out.fileno())
        for start in range(0, size, 1_000_003):
            writer.write(data[start : start + 1_000_003])
        writer.finish()
        writer.close()
    assert path.read_bytes() == data
    for start in {0, min(5, size), size // 2, size}:
        got = b"".join(bytes(piece) for piece in read_directly(path, start, size - start))
        assert got == data[start:]


def test_a_file_that_ends_too_early_is_an_error(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 5000)
    with pytest.raises(HostError, match="too early"):
        list(read_directly(tmp_path / "file", 0, 6000))
