"""Copies past the page cache: any length, any offset, any file system."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
import sys
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


# --- when the disk is full --------------------------------------------------------------------------------------------


def _write(writer, data):
    writer.write(data)
    writer.finish()


@pytest.mark.parametrize("size", [1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_a_full_disk_is_told_at_the_latest_when_finished(size):
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(Path("/dev/full").open("wb"))
        writer = stack.enter_context(contextlib.closing(DirectWriter(out.fileno())))
        with pytest.raises(OSError, match="No space left") as caught:
            _write(writer, bytes(size))
    assert caught.value.errno == errno.ENOSPC


def test_what_failed_stays_failed():
    """A caller that goes on after an error is told again, and closing waits for nobody."""
    with Path("/dev/full").open("wb") as out:
        writer = DirectWriter(out.fileno())
        for _ in range(3):
            with pytest.raises(OSError, match="No space left"):
                writer.write(bytes(3 * CHUNK))
        with pytest.raises(OSError, match="No space left"):
            writer.finish()
        writer.close()


_CHILD = """
import resource, sys
from composer._direct import CHUNK, DirectWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (CHUNK + 4096, CHUNK + 4096))
with open(sys.argv[1], "wb") as out:
    writer = DirectWriter(out.fileno())
    try:
        writer.write(bytes(CHUNK))
        writer.write(bytes(CHUNK))
        writer.finish()
    finally:
        writer.close()
"""


def test_a_disk_that_is_full_in_the_middle(tmp_path):
    """A short write, then an error: neither is lost in the thread."""
    path = tmp_path / "file"
    done = subprocess.run([sys.executable, "-c", _CHILD, path], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("OSError: [Errno 27] File too large\n")
    assert path.stat().st_size == CHUNK + 4096


_INTERRUPTED = """
import os, signal, sys, threading
from composer._direct import CHUNK, DirectWriter
reader, pipe = os.pipe()
def interrupt():
    os.read(reader, 1)  # the thread is in the middle of its first buffer
    os.kill(os.getpid(), signal.SIGINT)
    while os.read(reader, 1 << 20): pass
threading.Thread(target=interrupt, daemon=True).start()
writer = DirectWriter(pipe)
try:
    while True:
        writer.write(bytes(CHUNK))
except KeyboardInterrupt:
    print("interrupted")
finally:
    writer.close()
    print("closed")
"""


def test_an_interrupt_while_the_thread_writes():
    done = subprocess.run([sys.executable, "-c", _INTERRUPTED], check=False, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\nclosed\n", "")


def test_closing_without_finishing(tmp_path):
    with (tmp_path / "file").open("wb") as out:
        writer = DirectWriter(out.fileno())
        writer.write(bytes(CHUNK))
        writer.write(b"never written")
        writer.close()
    assert (tmp_path / "file").stat().st_size == CHUNK
