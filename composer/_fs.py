"""Atomic writes: a reader sees the old file or the new one, never half of one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from composer.errors import HostError


@contextlib.contextmanager
def host_errors(where: Path) -> Iterator[None]:
    """Translate an OSError into a HostError that names the file and, for the usual causes, the remedy."""
    fixes = {
        errno.ENOSPC: "Free some space, or choose another folder.",
        errno.EDQUOT: "Free some quota, or choose another folder.",
        errno.EACCES: "Choose a folder that you may write to.",
        errno.EPERM: "Choose a folder that you may write to.",
        errno.EROFS: "The file system is read-only: choose another folder.",
    }
    try:
        yield
    except OSError as fault:
        path = fault.filename if isinstance(fault.filename, str) else str(where)
        raise HostError(fault.strerror or str(fault), where=path, fix=fixes.get(fault.errno or 0)) from fault


@contextlib.contextmanager
def atomic_file(path: Path, *, mode: int = 0o644) -> Iterator[IO[bytes]]:
    """A writable temporary beside `path` that becomes `path` when the block ends well, and vanishes otherwise.

    Its `name` is its path, for who wants to read back what was written and flushed.

    Its writer holds a lock on it, which the kernel drops when the process dies: the next writer of `path` removes what
    dead ones left.
    """
    with host_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        handle, temporary = _claim(path)
    try:
        # Not os.fdopen, whose stream has no path for its name.
        with host_errors(path), open(temporary, "w+b", opener=lambda *_: handle) as stream:
            yield stream
            stream.flush()
            os.fchmod(stream.fileno(), mode)
            os.fsync(stream.fileno())
            temporary.replace(path)
        with host_errors(path):
            sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _claim(path: Path) -> tuple[int, Path]:
    while True:
        handle, name = tempfile.mkstemp(prefix=_prefix(path), suffix=".tmp", dir=path.parent)
        _lock(handle)
        # Between its creation and its lock, another writer may have taken it for a dead one's.
        if os.fstat(handle).st_nlink:
            return handle, Path(name)
        os.close(handle)


def _sweep(path: Path) -> None:
    """Remove the temporaries of `path` whose writer is dead."""
    for left in path.parent.glob(f"{glob.escape(_prefix(path))}*.tmp"):
        with contextlib.suppress(OSError), left.open("rb") as stream:
            if _lock(stream.fileno()):
                left.unlink()


def _prefix(path: Path) -> str:
    return f".{path.name[:100]}."


def _lock(handle: int) -> bool:
    """Whether an exclusive lock could be had; a file system may offer none."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write `data` to `path`, whole or not at all."""
    with atomic_file(path, mode=mode) as stream:
        stream.write(data)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
