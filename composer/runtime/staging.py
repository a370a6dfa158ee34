"""A private folder in which something is made before it is put in place by a rename.

Its maker holds a lock on it, which the kernel drops when the process dies, however it dies: whoever makes the next one
removes what dead ones left.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_SUFFIX = ".part"


@contextlib.contextmanager
def staging_folder(parent: Path, name: str) -> Iterator[Path]:
    """An empty folder in `parent`, hidden and named after `name`; removed at the end of the block if still there.

    OSError where it cannot be made.
    """
    parent.mkdir(parents=True, exist_ok=True)
    sweep(parent, name)
    folder, handle = _claim(parent, name)
    try:
        yield folder
    finally:
        os.close(handle)
        shutil.rmtree(folder, ignore_errors=True)


def sweep(parent: Path, name: str | None = None) -> None:
    """Remove the staging folders in `parent`, for one name or all, whose maker is dead."""
    for left in parent.glob(f".{'*' if name is None else glob.escape(name[:100])}.*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            handle = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            finally:
                os.close(handle)


def _claim(parent: Path, name: str) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{name[:100]}.", suffix=_SUFFIX, dir=parent))
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.suppress(BlockingIOError):
            _lock(handle)
            # Between its creation and its lock, another sweep may have taken it for a dead one's.
            if folder.exists() and folder.stat().st_ino == os.fstat(handle).st_ino:
                return folder, handle
        os.close(handle)


def _lock(handle: int) -> None:
    """BlockingIOError if another process has the lock; a file system may offer none."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return
