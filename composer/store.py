"""The content-addressed store: what was downloaded or made once is never made again.

Layout below the root (default: the user's cache folder, or WHEEL_COMPOSER_STORE):

    artifacts/        downloaded wheels, by their sha256 (steps/fetch.py)
    objects/KIND/     what steps made, by the sha256 of everything that determines it
    locks/            one file per object being made: a second process waits and finds it done
    tmp/              scratch of running steps; anything here may be deleted when nothing runs

An object is only believed after a check on use: values must decode, layers are hashed while they are copied. So no
object is flushed to disk when written: a torn one is a miss, not an error.

With a remote (composer.remote), an object that is not here is asked of it, and what is made here is uploaded there.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import filelock
import msgspec
import platformdirs

from composer._fs import host_errors
from composer._json import decode
from composer.errors import IntegrityError
from composer.remote import SHARED, Remote, Traffic, open_remote

_VALUE = ".json"
_NAME = re.compile(r"[0-9a-z][0-9a-z-]*")

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
    """A folder of artifacts and objects, and maybe a remote behind it."""

    def __init__(self, root: Path | None = None, remote: Remote | None = None) -> None:
        self.root = root or default_root()
        self.remote = remote
        self._forgotten: set[tuple[str, str]] = set()
        with host_errors(self.root):
            for name in ("artifacts", "objects", "locks", "tmp"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            self._sweep()

    @classmethod
    def here(cls, root: Path | None = None, url: str | None = None, key: Path | None = None) -> Store:
        """The store with this remote, or else the one that WHEEL_COMPOSER_REMOTE and WHEEL_COMPOSER_REMOTE_KEY name.

        For processes that work for others: all stores of one share the connection.
        """
        if url is None:
            url, named = (os.environ.get(f"WHEEL_COMPOSER_REMOTE{name}") for name in ("", "_KEY"))
            key = Path(named) if named else None
        return cls(root, _remote_here(url, key) if url else None)

    @property
    def artifacts(self) -> Path:
        """The folder of downloaded files."""
        return self.root / "artifacts"

    def path(self, kind: str, key: str, suffix: str) -> Path:
        """Where an object's file is, present or not. What the remote has of an object unknown here is fetched first.

        IntegrityError for what cannot be a kind or a key: both may come from values that others wrote.
        """
        path = self._place(kind, key, suffix)
        # Beside a value, a file that is missing was found damaged: it is made again, not fetched again.
        if suffix != _VALUE and not path.exists() and not self._place(kind, key, _VALUE).exists():
            self._fetch(kind, key)
        return path

    def load(self, kind: str, key: str, into: type[T]) -> T | None:
        """The value of an object, or None when it is absent or does not decode, here and at the remote."""
        value = self._decoded(kind, key, into)
        return self._decoded(kind, key, into) if value is None and self._fetch(kind, key) else value

    def save(self, kind: str, key: str, value: Any) -> None:  # noqa: ANN401
        """Make `value` the object's value: whole or not at all. It completes the object, which is uploaded then."""
        with self.writing(kind, key, _VALUE) as temporary, host_errors(temporary):
            temporary.write_bytes(msgspec.json.encode(value))
        if self.remote and kind in SHARED:
            self.remote.put(kind, key, {suffix: self._place(kind, key, suffix) for suffix in SHARED[kind]})

    def forget(self, kind: str, key: str) -> None:
        """Make an object absent, so that it is made again; the remote is not asked for it any more."""
        self._forgotten.add((kind, key))
        with host_errors(self.root):
            self._place(kind, key, _VALUE).unlink(missing_ok=True)

    def refuse(self, kind: str, key: str, why: str) -> None:
        """Forget an object that came from the remote and is not what its key says."""
        self.forget(kind, key)
        if self.remote:
            self.remote.refuse(kind, key, why)

    def share(self) -> int:
        """Upload what the remote does not have of what it may have; how many objects that are."""
        if self.remote is None:
            return 0
        missing = 0
        for kind, suffixes in SHARED.items():
            for value in sorted((self.root / "objects" / kind).glob(f"*/*{_VALUE}")):
                files = {suffix: value.with_suffix(suffix) for suffix in suffixes}
                if self.remote.find(kind, value.stem) is None and all(path.is_file() for path in files.values()):
                    self.remote.put(kind, value.stem, files)
                    missing += 1
        return missing

    def finish(self) -> Traffic:
        """Wait for uploads; what went to and from the remote since the last time."""
        return self.remote.finish() if self.remote else Traffic()

    def _place(self, kind: str, key: str, suffix: str) -> Path:
        if not (_NAME.fullmatch(kind) and _NAME.fullmatch(key)):
            raise IntegrityError("not an object of the store", where=f"{kind}/{key}")
        return self.root / "objects" / kind / key[:2] / f"{key}{suffix}"

    def _decoded(self, kind: str, key: str, into: type[T]) -> T | None:
        try:
            return decode(self._place(kind, key, _VALUE).read_bytes(), into)
        except (OSError, UnicodeDecodeError, RecursionError, msgspec.DecodeError):
            return None

    def _fetch(self, kind: str, key: str) -> bool:
        """Whether the remote has the object, and it is here now."""
        if self.remote is None or (kind, key) in self._forgotten:
            return False
        record = self.remote.find(kind, key)
        if record is None:
            return False
        with self.scratch() as folder:
            files = self.remote.fetch(record, folder)
            for suffix, path in (files or {}).items():
                _put(path, self._place(kind, key, suffix))
        return files is not None

    @contextlib.contextmanager
    def writing(self, kind: str, key: str, suffix: str) -> Iterator[Path]:
        """A temporary path that becomes the object's file when the block ends well."""
        final = self._place(kind, key, suffix)
        with self.scratch() as folder:
            temporary = folder / final.name
            yield temporary
            _put(temporary, final)

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


@functools.cache
def _remote_here(url: str, key: Path | None) -> Remote:
    return open_remote(url, key=key)


def _put(temporary: Path, final: Path) -> None:
    """Move a file or folder to its place, in that of an older one."""
    with host_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.is_dir() and not final.is_symlink():
            shutil.rmtree(final)
        temporary.replace(final)


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
