"""Copy gigabytes past the page cache (O_DIRECT), so that a bundle neither evicts what is in use nor waits for memory.

Measured on a virtual machine with ample free memory: 1.3 GB/s written directly, 0.25 GB/s through the page cache. File
systems without O_DIRECT (tmpfs, some network ones) are used in the ordinary way.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from composer._fs import host_errors

#: Bytes per request; a multiple of every file system's block.
CHUNK = 8 << 20
_BLOCK = 4096


def read_directly(path: Path, start: int, size: int) -> Iterator[memoryview]:
    """`size` bytes of a file from `start`. HostError if there are fewer.

    A piece stays valid while the next one is read, and no longer: there are two buffers in turn.
    """
    buffers = itertools.cycle([mmap.mmap(-1, CHUNK), mmap.mmap(-1, CHUNK)])
    with contextlib.ExitStack() as stack:
        with host_errors(path):
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, handle)
        _set_direct(handle, wanted=True)
        while size:
            buffer, skip = next(buffers), start % _BLOCK
            with host_errors(path):
                count = _read_block(handle, buffer, start - skip)
                if count <= skip:
                    raise OSError(errno.EIO, "ends too early", str(path))
            taken = min(count - skip, size)
            yield memoryview(buffer)[skip : skip + taken]
            start, size = start + taken, size - taken


def _read_block(handle: int, buffer: mmap.mmap, offset: int) -> int:
    try:
        return os.preadv(handle, [buffer], offset)
    except OSError as fault:
        if fault.errno != errno.EINVAL:
            raise
        _set_direct(handle, wanted=False)
        return os.preadv(handle, [buffer], offset)


class DirectWriter:
    """Appends to an open, empty file; a thread writes one buffer while the next is filled.

    Nothing else may write to the file before `finish`. OSError as of write(2) comes from whichever call follows it.
    """

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._buffer, self._spare = mmap.mmap(-1, CHUNK), mmap.mmap(-1, CHUNK)
        self._filled = 0
        self._pool = ThreadPoolExecutor(1)
        # The thread starts here and not with the first buffer: ^C in the midst of that would leave it behind, writing.
        self._writing: Future[None] = self._pool.submit(lambda: None)
        _set_direct(handle, wanted=True)

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`, which is copied."""
        view = memoryview(data)
        while view:
            taken = min(len(view), CHUNK - self._filled)
            self._buffer[self._filled : self._filled + taken] = view[:taken]
            self._filled += taken
            view = view[taken:]
            if self._filled == CHUNK:
                self._flush()

    def finish(self) -> None:
        """Write what is left and wait for it. The last bytes fill no block, so they go the ordinary way."""
        self._wait()
        _set_direct(self._handle, wanted=False)
        self._flush()
        self._wait()

    def close(self) -> None:
        """Drop the buffers, once the thread is done with them."""
        self._pool.shutdown()
        self._buffer.close()
        self._spare.close()

    def _flush(self) -> None:
        """Hand the filled buffer to the thread, and go on with the other one."""
        self._wait()
        self._writing = self._pool.submit(self._write_all, self._buffer, self._filled)
        self._buffer, self._spare = self._spare, self._buffer
        self._filled = 0

    def _wait(self) -> None:
        self._writing.result()

    def _write_all(self, buffer: mmap.mmap, size: int) -> None:
        with memoryview(buffer) as view:
            done = 0
            while done < size:
                with view[done:size] as rest:
                    done += self._write(rest)

    def _write(self, rest: memoryview) -> int:
        try:
            return os.write(self._handle, rest)
        except OSError as fault:
            if fault.errno != errno.EINVAL:
                raise
            # The file system takes the flag but not the request, or a short write left an odd offset.
            _set_direct(self._handle, wanted=False)
            return os.write(self._handle, rest)


def _set_direct(handle: int, *, wanted: bool) -> None:
    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    with contextlib.suppress(OSError):
        fcntl.fcntl(handle, fcntl.F_SETFL, flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT)
