"""The content-addressed store: what was downloaded or made once is never made again.

Layout below the root (default: the user's cache folder, or WHEEL_COMPOSER_STORE):

    artifacts/        downloaded wheels, by their sha256 (steps/fetch.py)
    objects/KIND/     what steps made, by the sha256 of everything that determines it
    locks/            one file per object being made: a second process waits and finds it done
    tmp/              scratch of running steps; anything here may be deleted when nothing runs

An object is only believed after a check on use: values must decode, layers are hashed while they are copied. So no
object is flushed to disk when written: a torn one is a miss, not an error.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import filelock
import msgspec
import platformdirs

from composer._fs import host_errors

T = TypeVar("T")


def default_root() -> Path:
    """WHEEL_COMPOSER_STORE, or `wheel-composer` below the user's cache folder."""
    named = os.environ.get("WHEEL_COMPOSER_STORE")
    return Path(named).expanduser().absolute() if named else platformdirs.user_cache_path("wheel-composer")


def key_of(step: str, version: int, **inputs: Any) -> str:  # noqa: ANN401
    """sha256 over a step's name, the version of its code and all its inputs, in canonical JSON."""
    data = msgspec.json.encode({"step": step, "version": version, **inputs}, order="deterministic")
    return hashlib.sha256(data).hexdigest()


class Store:
    """A folder of artifacts and objects."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or default_root()
        with host_errors(self.root):
            for name in ("artifacts", "objects", "locks", "tmp"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            self._sweep()

    @property
    def artifacts(self) -> Path:
        """The folder of downloaded files."""
        return self.root / "artifacts"

    def path(self, kind: str, key: str, suffix: str) -> Path:
        """Where an object's file is, present or not."""
        return self.root / "objects" / kind / key[:2] / f"{key}{suffix}"

    def load(self, kind: str, key: str, into: type[T]) -> T | None:
        """The value of an object, or None when it is absent or does not decode."""
        try:
            return msgspec.json.decode(self.path(kind, key, ".json").read_bytes(), type=into)
        except (OSError, UnicodeDecodeError, RecursionError, msgspec.DecodeError):
            return None

    def save(self, kind: str, key: str, value: Any) -> None:  # noqa: ANN401
        """Make `value` the object's value: whole or not at all."""
        with self.writing(kind, key, ".json") as temporary, host_errors(temporary):
            temporary.write_bytes(msgspec.json.encode(value))

    @contextlib.contextmanager
    def writing(self, kind: str, key: str, suffix: str) -> Iterator[Path]:
        """A temporary path that becomes the object's file when the block ends well."""
        final = self.path(kind, key, suffix)
        with self.scratch() as folder:
            temporary = folder / final.name
            yield temporary
            with host_errors(final):
                final.parent.mkdir(parents=True, exist_ok=True)
                if final.is_dir() and not final.is_symlink():
                    shutil.rmtree(final)
                temporary.replace(final)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A private folder on the store's file system, removed afterwards whatever happens.

        Its owner holds a lock on it, which the kernel drops when the process dies: `_sweep` knows the dead by that.
        """
        with host_errors(self.root):
            folder, handle = self._claim_scratch()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(handle)

    def _claim_scratch(self) -> tuple[Path, int]:
        while True:
            folder = Path(tempfile.mkdtemp(dir=self.root / "tmp"))
            handle = _try_lock(folder)
            if handle is not None and folder.exists():
                return folder, handle

    def _sweep(self) -> None:
        """Remove the scratch folders whose owner is dead."""
        for folder in (self.root / "tmp").iterdir():
            handle = _try_lock(folder)
            if handle is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(handle)

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Exclusive between processes and threads; released by the kernel if the process dies."""
        with host_errors(self.root), filelock.FileLock(self.root / "locks" / f"{name}.lock"):
            yield


def _try_lock(folder: Path) -> int | None:
    """An open handle that locks the folder, or None when somebody else holds it or it is gone."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle
