"""The small files that the programs for serving keep in the bundle's cache folder: whole or not there, and private."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from ..finding import error
from .report import HOST, Refusal

_FIX = "Set WHEEL_COMPOSER_CACHE to a folder that you may write to."


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time in `folder`, which is made if need be. Raises Refusal where it cannot be written to.

    The kernel drops the lock of a process that dies. A file system without locks has none.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as fault:
        raise unwritable(folder, fault) from None
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write(path: Path, content: bytes) -> None:
    """Put a file of mode 0600 at `path`; a reader sees the old one or the new one. Raises Refusal."""
    temporary: Path | None = None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".new.", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(handle)
        temporary.replace(path)
    except OSError as fault:
        if temporary:
            temporary.unlink(missing_ok=True)
        raise unwritable(path, fault) from None


def no_folder() -> Refusal:
    """The refusal where there is no cache folder."""
    return Refusal(HOST, error("serve.cache", "the cache folder", "there is none that can be written to", _FIX))


def unwritable(path: Path, fault: OSError) -> Refusal:
    """The refusal for a file or folder that could not be written."""
    return Refusal(HOST, error("serve.cache", str(path), f"cannot be written: {fault.strerror or fault}", _FIX))


def label(text: str) -> str:
    """A name for files about `text`: readable, and different for every text."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[-80:]
    return f"{slug}.{sha256(os.fsencode(text)).hexdigest()[:12]}"
