"""A remote that machines share: what one of them made, the others need not make again.

Layout below the URL:

    objects/KIND/ab/KEY.json    a record: the files of an object of the store, their sizes and sha256
    content/ab/SHA256           their bytes

Keys are of inputs and tell nothing of the bytes, so the record does, and every byte is compared with it before the
store sees it. A record is written after what it lists, so a transfer that was cut off leaves no object.

A remote can only cost time: whatever is wrong with it is a warning and a miss. What a record says is not proven,
though: who may write to the remote decides what others take from it, unless records are signed with a key (HMAC) that
is not kept there.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import queue
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

import msgspec

from composer._fs import host_errors
from composer._json import decode
from composer.errors import ComposerError, HostError, RecipeError
from composer.events import Event, Listener, silent

T = TypeVar("T")

_VALUE, _WITH_BYTES = (".json",), (".zst", ".json")
#: What is shared: the files of each kind of object, the one that vouches for the others last. Not shared is what holds
#: paths of one machine, and what a proof found: that is asked where it is used.
SHARED: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "blob": _WITH_BYTES, "layer": _WITH_BYTES, "content-1": _VALUE, "survey": _VALUE, "objects": _VALUE,
    "interface": _VALUE, "meeting": _VALUE, "wheel": (".whl", ".json"),
})  # fmt: skip
_EXTRA = "Install the extra: pip install 'wheel-composer[remote]'."
_RECORD = re.compile(r"(?P<kind>[0-9a-z-]+)/[0-9a-f]{2}/(?P<key>[0-9a-f]{64})\.json")
_MAX_RECORD = 4096
_PIECE = 16 << 20
_SHORTEST_KEY = 16
#: Seconds for an answer, and bytes per second, below which a remote is not worth its time.
_PATIENCE, _SLOWEST = 20.0, 256 << 10
_FAULTS_IN_A_ROW = 2
_UPLOADS_AT_A_TIME = 2
#: Where a file appears when all of it is there. Elsewhere it is written under another name first.
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs"})
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "file": {"auto_mkdir": True},
    "local": {"auto_mkdir": True},
    # Ten parts of 50 MB at a time would be held in memory; s3fs tries again five times by itself.
    "s3": {"max_concurrency": 2, "use_listings_cache": False,
           "config_kwargs": {"connect_timeout": 10, "read_timeout": 30, "retries": {"max_attempts": 0}}},
}  # fmt: skip


class StoredFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of an object: what its name ends in, and its content."""

    suffix: str
    size: Annotated[int, msgspec.Meta(ge=0)]
    sha256: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a remote has of one object. mac: HMAC-SHA256 of all else, empty where nobody signed."""

    schema: Literal[1] = 1
    kind: str
    key: str
    files: tuple[StoredFile, ...]
    mac: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What went over the line: objects and bytes, each way, and what went wrong."""

    fetched: int = 0
    fetched_bytes: int = 0
    stored: int = 0
    stored_bytes: int = 0
    warnings: tuple[str, ...] = ()

    def __add__(self, other: Traffic) -> Traffic:
        """Both together."""
        return Traffic(
            fetched=self.fetched + other.fetched, fetched_bytes=self.fetched_bytes + other.fetched_bytes,
            stored=self.stored + other.stored, stored_bytes=self.stored_bytes + other.stored_bytes,
            warnings=(*self.warnings, *other.warnings),
        )  # fmt: skip


class _DistrustedError(Exception):
    """Bytes that are not what they should be."""


def open_remote(url: str, *, key: Path | None = None, listener: Listener = silent,
                patience: float = _PATIENCE) -> Remote:  # fmt: skip
    """The remote at any URL that fsspec knows: s3://BUCKET/PREFIX, file:///SHARE, gs://...; nothing is asked yet.

    key: a file with the secret that records are signed with. patience: seconds that a request may take, plus its bytes.

    RecipeError for a URL of no known kind, HostError without the libraries it takes, or for an unusable key.
    """
    secret = _secret(key) if key else None
    filesystem, root = _filesystem(url)
    return Remote(filesystem, root, where=_shown(url), secret=secret, listener=listener, patience=patience)


def _secret(path: Path) -> bytes:
    with host_errors(path):
        data = path.read_bytes().strip()
    if len(data) < _SHORTEST_KEY:
        raise HostError(f"too short for a key: {len(data)} bytes", where=str(path),
                        fix="Write 32 random bytes: `openssl rand -hex 32`.")  # fmt: skip
    return data


def _filesystem(url: str) -> tuple[Any, str]:
    scheme, found, _ = url.partition("://")
    if not found:
        raise RecipeError("not a URL", where=url, fix=f"For a folder write file://{Path(url).absolute()}.")
    try:
        import fsspec.core
    except ImportError as fault:
        raise HostError("a remote store takes fsspec", where=_shown(url), why=str(fault), fix=_EXTRA) from fault
    try:
        filesystem, root = fsspec.core.url_to_fs(url, skip_instance_cache=True, **_OPTIONS.get(scheme, {}))
    except ImportError as fault:
        raise HostError(f"{scheme}:// takes a library that is not here", where=_shown(url), why=str(fault),
                        fix=_EXTRA) from fault  # fmt: skip
    except Exception as fault:  # every implementation of fsspec raises its own
        raise RecipeError("not the URL of a remote store", where=_shown(url), why=str(fault)) from fault
    return filesystem, str(root).rstrip("/")


def _shown(url: str) -> str:
    """The URL without what may be secret."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


class _Direction:
    """Reading or writing: given up when trying on would only cost time."""

    def __init__(self, doing: str) -> None:
        self.doing = doing
        self.given_up = False
        self._faults = 0

    def succeed(self) -> None:
        """A request went well."""
        self._faults = 0

    def fail(self, fault: Exception) -> str:
        """Count a fault; what to tell of it."""
        self._faults += 1
        self.given_up |= self._faults >= _FAULTS_IN_A_ROW or isinstance(fault, (PermissionError, TimeoutError))
        why = "no answer in time" if isinstance(fault, TimeoutError) else str(fault) or type(fault).__name__
        return f"{self.doing} failed{': not tried again' if self.given_up else ''} ({why.splitlines()[0]})"


class Remote:
    """A remote store. Usable from several threads; raises only what is wrong with this machine."""

    def __init__(self, filesystem: Any, root: str, *, where: str, secret: bytes | None, listener: Listener,  # noqa: ANN401
                 patience: float) -> None:  # fmt: skip
        self.where = where
        self._filesystem = filesystem
        self._root = root
        self._secret = secret
        self._listener = listener
        self._patience = patience
        self._refused: set[tuple[str, str]] = set()
        self._damaged: set[str] = set()
        self._lock = threading.Lock()
        self._begin()
        self._uploads: queue.Queue[tuple[str, str, Mapping[str, Path]]] = queue.Queue()
        self._threads: list[threading.Thread] = []

    def _begin(self) -> None:
        self._reading, self._writing = _Direction("reading"), _Direction("writing")
        self._counts = {"fetched": 0, "fetched_bytes": 0, "stored": 0, "stored_bytes": 0}
        self._warnings: list[str] = []

    # --- reading ---

    def find(self, kind: str, key: str) -> Record | None:
        """The record of an object; None where there is none that may be believed."""
        if kind not in SHARED or self._reading.given_up or (kind, key) in self._refused:
            return None
        with self._faults_told(kind, key):
            try:
                data = self._range(self._record(kind, key), 0, _MAX_RECORD)
            except FileNotFoundError:
                self._reading.succeed()
                return None
            return self._believed(data, kind, key)
        return None

    def fetch(self, record: Record, folder: Path) -> dict[str, Path] | None:
        """The files of an object by suffix, in `folder`, all their bytes checked; None where they are not sound.

        HostError when the folder cannot be written.
        """
        with self._faults_told(record.kind, record.key):
            files = {one.suffix: self._download(one, folder) for one in record.files}
            self._reading.succeed()
            self._count("fetched", sum(one.size for one in record.files))
            return files
        return None

    def refuse(self, kind: str, key: str, why: str) -> None:
        """What was fetched arrived whole and is not what it should be: it is not asked for again, and that is told."""
        self._refused.add((kind, key))
        self._warn(f"{kind} {key[:12]} is not used ({why})")

    def keys(self) -> Iterator[tuple[str, str]]:
        """Kind and key of everything here, sorted. HostError when that cannot be listed."""
        try:
            found = self._bounded(_PIECE, lambda: self._filesystem.find(f"{self._root}/objects"))
        except Exception as fault:
            raise HostError("cannot be listed", where=self.where, why=str(fault)) from fault
        for path in sorted(found):
            if name := _RECORD.fullmatch(path.removeprefix(f"{self._root}/objects/")):
                yield name["kind"], name["key"]

    @contextlib.contextmanager
    def _faults_told(self, kind: str, key: str) -> Iterator[None]:
        """Whatever the remote does wrong becomes a warning; what this machine does, an error."""
        try:
            yield
        except ComposerError:
            raise
        except (_DistrustedError, FileNotFoundError) as fault:
            self._refused.add((kind, key))
            self._warn(f"{kind} {key[:12]} is damaged there and not used ({fault})")
        except Exception as fault:  # noqa: BLE001 - every implementation of fsspec raises its own
            if not self._reading.given_up:
                self._warn(self._reading.fail(fault))

    def _believed(self, data: bytes, kind: str, key: str) -> Record:
        try:
            record = decode(data, Record)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as fault:
            raise _DistrustedError(f"its record does not read: {fault}") from fault
        if (record.kind, record.key) != (kind, key) or tuple(one.suffix for one in record.files) != SHARED[kind]:
            raise _DistrustedError("its record is of something else")
        if self._secret and not hmac.compare_digest(record.mac, self._mac(record)):
            raise _DistrustedError("its record is not signed with our key")
        return record

    def _download(self, file: StoredFile, folder: Path) -> Path:
        path, source, digest = folder / f"fetched{file.suffix}", self._content(file.sha256), hashlib.sha256()
        with contextlib.ExitStack() as stack:
            with host_errors(path):
                out = stack.enter_context(path.open("wb", buffering=0))
            for start in range(0, file.size, _PIECE):
                end = min(start + _PIECE, file.size)
                piece = self._range(source, start, end)
                if len(piece) != end - start:
                    break
                digest.update(piece)
                with host_errors(path):
                    out.write(piece)
        if digest.hexdigest() != file.sha256 or path.stat().st_size != file.size:
            self._damaged.add(file.sha256)
            raise _DistrustedError(f"its bytes are not those of sha256 {file.sha256}")
        return path

    def _range(self, path: str, start: int, end: int) -> bytes:
        data: bytes = self._bounded(end - start, lambda: self._filesystem.cat_file(path, start=start, end=end))
        return data

    # --- writing ---

    def put(self, kind: str, key: str, files: Mapping[str, Path]) -> None:
        """Upload an object in the background; `files` are its files by suffix. Nothing is said of kinds not shared."""
        if self._writing.given_up or tuple(files) != SHARED.get(kind):
            return
        with self._lock:
            while len(self._threads) < _UPLOADS_AT_A_TIME:
                # Daemons: who interrupts a build does not wait for uploads.
                thread = threading.Thread(target=self._upload_all, daemon=True)
                thread.start()
                self._threads.append(thread)
        self._uploads.put((kind, key, files))

    def finish(self) -> Traffic:
        """Wait until everything is uploaded or given up; what went over the line since the last time.

        Afterwards everything is tried again, also what was given up.
        """
        if self._uploads.unfinished_tasks:
            self._listener(Event(step="remote", subject=self.where))
        self._uploads.join()
        with self._lock:
            traffic = Traffic(**self._counts, warnings=tuple(self._warnings))
            self._begin()
            return traffic

    def _upload_all(self) -> None:
        while True:
            kind, key, files = self._uploads.get()
            try:
                if not self._writing.given_up:
                    self._upload(kind, key, files)
                    self._writing.succeed()
            except Exception as fault:  # noqa: BLE001 - every implementation of fsspec raises its own
                if not self._writing.given_up:
                    self._warn(self._writing.fail(fault))
            finally:
                self._uploads.task_done()

    def _upload(self, kind: str, key: str, files: Mapping[str, Path]) -> None:
        try:
            listed = tuple(_described(suffix, path) for suffix, path in files.items())
        except OSError:
            return  # somebody removed it from the store
        sent = sum(self._send(one, files[one.suffix]) for one in listed)
        record = Record(kind=kind, key=key, files=listed)
        data = msgspec.json.encode(msgspec.structs.replace(record, mac=self._mac(record)))
        self._write(self._record(kind, key), lambda target: self._filesystem.pipe_file(target, data), len(data))
        self._count("stored", sent + len(data))

    def _send(self, file: StoredFile, path: Path) -> int:
        """Upload a content unless it is there; the bytes that took."""
        target = self._content(file.sha256)
        if file.sha256 not in self._damaged and self._size(target) == file.size:
            return 0
        self._write(target, lambda name: self._filesystem.put_file(str(path), name), file.size)
        return file.size

    def _size(self, path: str) -> int | None:
        try:
            found = self._bounded(0, lambda: self._filesystem.info(path))["size"]
        except FileNotFoundError:
            return None
        return int(found)

    def _write(self, target: str, write: Callable[[str], object], size: int) -> None:
        protocol = self._filesystem.protocol
        if _OBJECT_STORES & {protocol, *(() if isinstance(protocol, str) else protocol)}:
            self._bounded(size, lambda: write(target))
            return
        temporary = f"{target}.{uuid.uuid4().hex}.part"
        self._bounded(size, lambda: write(temporary))
        self._bounded(0, lambda: self._filesystem.mv(temporary, target))

    # --- both ---

    def _record(self, kind: str, key: str) -> str:
        return f"{self._root}/objects/{kind}/{key[:2]}/{key}.json"

    def _content(self, sha256: str) -> str:
        return f"{self._root}/content/{sha256[:2]}/{sha256}"

    def _mac(self, record: Record) -> str:
        if self._secret is None:
            return ""
        return hmac.new(
            self._secret, msgspec.json.encode(msgspec.structs.replace(record, mac="")), "sha256"
        ).hexdigest()

    def _bounded(self, size: int, call: Callable[[], T]) -> T:
        """What a request for `size` bytes answers; TimeoutError when that takes too long.

        It runs in a thread that is left behind then, as few implementations of fsspec know time limits.
        """
        answer: Future[T] = Future()

        def ask() -> None:
            try:
                answer.set_result(call())
            except BaseException as fault:  # noqa: BLE001 - it is raised where the answer is taken
                answer.set_exception(fault)

        threading.Thread(target=ask, daemon=True).start()
        return answer.result(self._patience + size / _SLOWEST)

    def _count(self, what: str, size: int) -> None:
        with self._lock:
            self._counts[what] += 1
            self._counts[f"{what}_bytes"] += size

    def _warn(self, text: str) -> None:
        with self._lock:
            self._warnings.append(f"{self.where}: {text}")
        self._listener(Event(step="remote", subject=self.where, note=text))


def _described(suffix: str, path: Path) -> StoredFile:
    with path.open("rb") as stream:
        return StoredFile(suffix=suffix, sha256=hashlib.file_digest(stream, "sha256").hexdigest(), size=stream.tell())
