"""One URL to one file: resumed when cut off, bounded in time and size, verified; and what an index lists.

A download grows as `<file name>.part` and gets its name only when all of its bytes have the locked digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import urlsplit
from urllib.request import url2pathname

from packaging.utils import InvalidSdistFilename, parse_sdist_filename
from packaging.version import Version

from composer._fs import host_errors, sync_folder
from composer.errors import FetchError, HostError, IntegrityError
from composer.model.lock import Artifact
from composer.steps.artifact import CHUNK, mismatch

if TYPE_CHECKING:
    from composer._pip import Body, IndexedFile, Indexes

_REDIRECTS = 5
_LONGEST_WAIT = 30.0
_REINSTALL = "Install composer's own dependencies again: its pip is pinned."
#: What helps where an index fails.
CHECK_INDEX = "Check the index and the proxy (`pip config list`), or use --offline --wheelhouse DIR."


class StoppedError(Exception):
    """Another thread ended the run."""


class TransientError(Exception):
    """This attempt failed; another may not. `wait`: seconds that the server asks for."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How patient a download is; times in seconds.

    attempts: how many in a row may bring no byte. backoff: the wait after the first of them, doubled each time.
    connect: for a connection. stall: for the next byte. slowest: bytes per second that a whole artifact must reach,
    after a start of `grace`.
    """

    attempts: int = 5
    backoff: float = 0.5
    connect: float = 15.0
    stall: float = 60.0
    slowest: float = 32 * 1024.0
    grace: float = 120.0

    def seconds_for(self, size: int) -> float:
        """The longest that an artifact of `size` bytes may take."""
        return self.grace + size / self.slowest


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What the downloads of one run share: indexes, patience, and an end for all of them.

    indexes: URL by index name, for all names but `pypi`, which is whatever pip is configured with.
    """

    indexes: Mapping[str, str] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    stop: threading.Event = field(default_factory=threading.Event)
    _mutex: threading.Lock = field(default_factory=threading.Lock)
    _opened: list[Indexes] = field(default_factory=list)
    _bodies: set[Body] = field(default_factory=set)

    def files(self, name: str, index: str) -> list[IndexedFile]:
        """What `index` lists for the distribution `name`. Raises FetchError; HostError for a pip that is not ours."""
        with _index_errors(f"index {index!r}"):
            return self._index().files(name, index)

    def get(self, url: str, start: int) -> Body:
        """The answer to one GET from byte `start`. Raises TransientError or FetchError."""
        from composer._pip import PipFault

        try:
            return self._index().get(url, start=start, connect=self.limits.connect, stall=self.limits.stall)
        except PipFault as fault:
            if fault.kind == "transient":
                raise TransientError(": ".join(filter(None, (fault.what, fault.why)))) from fault
            raise FetchError(fault.what, where=shown(url), why=fault.why or None, fix=CHECK_INDEX) from fault

    @contextlib.contextmanager
    def using(self, body: Body) -> Iterator[None]:
        """While its bytes are read: `abort` ends it."""
        self._bodies.add(body)
        try:
            yield
        finally:
            self._bodies.discard(body)
            body.close()

    def abort(self) -> None:
        """End all downloads soon; what they have stays."""
        self.stop.set()
        for body in tuple(self._bodies):
            body.abort()

    def pause(self, seconds: float) -> None:
        """Wait, or raise StoppedError at once when another thread ended the run."""
        if self.stop.wait(seconds):
            raise StoppedError

    def _index(self) -> Indexes:
        """pip's view of the indexes; opened when first needed, because importing pip takes a while."""
        with self._mutex, _index_errors("pip"):
            if not self._opened:
                from composer._pip import Indexes

                self._opened.append(Indexes(self.indexes))
            return self._opened[0]


@contextlib.contextmanager
def _index_errors(where: str) -> Iterator[None]:
    """Translate a PipFault, and a pip that lacks what _pip imports."""
    try:
        from composer._pip import PipFault
    except ImportError as fault:
        raise HostError("not the pip that composer needs", where=where, why=str(fault), fix=_REINSTALL) from fault
    try:
        yield
    except PipFault as fault:
        if fault.kind == "pip":
            raise HostError(fault.what, where=where, why=fault.why or None, fix=_REINSTALL) from fault
        raise FetchError(fault.what, where=where, why=fault.why or None, fix=CHECK_INDEX) from fault


def is_reachable(url: str, limits: Limits | None = None) -> bool:
    """Whether a server answers a request for `url` with the file, within a few seconds; nothing is downloaded."""
    network = Network(limits=limits or Limits(connect=3.0, stall=5.0))
    try:
        with _answer(network, url, 0) as body:
            return body.status == 200
    except (FetchError, TransientError):
        return False


def find_sdist(name: str, version: str, index: str, indexes: Mapping[str, str]) -> Artifact:
    """The source distribution of one version, as its index lists it. FetchError when it has none, or no digest of it.

    indexes: URL by index name, for all names but `pypi`.
    """
    network = Network(indexes=indexes)
    listed = network.files(name, index)
    found = next((file for file in listed if _is_sdist_of(file.filename, name, version)), None)
    if found is None or found.sha256 is None:
        what = "has no sdist of it" if found is None else "gives no sha256 of its sdist"
        raise FetchError(f"index {index!r} {what}", where=f"{name} {version}",
                         fix="Give `url` and `sha256` of its source in the recipe instead of `sdist`.")  # fmt: skip
    artifact = Artifact(filename=found.filename, size=found.size or 0, sha256=found.sha256)
    if artifact.size:
        return artifact
    if found.url.startswith("file:"):
        path = Path(url2pathname(urlsplit(found.url).path))
        with host_errors(path):
            return replace(artifact, size=path.stat().st_size)
    return _sized(network, found.url, artifact)


def _sized(network: Network, url: str, artifact: Artifact) -> Artifact:
    """The artifact with the size that its server announces, so that its download has a bound like any other."""
    try:
        with _answer(network, url, 0) as body:
            length = body.headers.get("Content-Length", "") if body.status == 200 else ""
    except TransientError as fault:
        raise FetchError("cannot be asked for", where=shown(url), why=str(fault), fix=CHECK_INDEX) from fault
    if not length.isdecimal():
        raise FetchError("the server does not tell the size", where=shown(url), fix="Give `size` in the recipe.")
    return replace(artifact, size=int(length))


def _is_sdist_of(filename: str, name: str, version: str) -> bool:
    try:
        return filename.endswith(".tar.gz") and parse_sdist_filename(filename) == (name, Version(version))
    except InvalidSdistFilename:
        return False


# --- one download ----------------------------------------------------------------------------------------------------


class _Part:
    """The growing file of one artifact, with the digest of what it holds."""

    def __init__(self, stream: BinaryIO, artifact: Artifact) -> None:
        self._stream, self._artifact = stream, artifact
        self._digest = hashlib.sha256()
        self.length = 0
        stream.seek(0)
        while chunk := stream.read(CHUNK):
            self._digest.update(chunk)
            self.length += len(chunk)
        if self.length > artifact.size:
            self.restart()
        #: Whether bytes of another answer are in it: only then can a wrong digest be an accident.
        self.resumed = self.length > 0

    @property
    def room(self) -> int:
        """How many bytes may be asked for: one more than is missing, to see a body that does not end."""
        return self._artifact.size + 1 - self.length

    def append(self, chunk: bytes) -> None:
        self._stream.write(chunk)
        self._digest.update(chunk)
        self.length += len(chunk)

    def restart(self) -> None:
        self._stream.seek(0)
        self._stream.truncate()
        self._digest, self.length, self.resumed = hashlib.sha256(), 0, False

    def fault(self, where: str) -> IntegrityError | None:
        """Why this is not the artifact."""
        digest = self._digest.hexdigest()
        return None if digest == self._artifact.sha256 else mismatch(self._artifact, where, digest, self.length)

    def publish(self, part: Path, path: Path) -> None:
        """Give the file its name, for good."""
        self._stream.flush()
        os.fchmod(self._stream.fileno(), 0o444)
        os.fsync(self._stream.fileno())
        part.replace(path)
        sync_folder(path.parent)


def download(
    network: Network, url: str, artifact: Artifact, path: Path, progress: Callable[[int], None] = lambda _: None
) -> None:
    """Bring `artifact` from `url` to `path`, going on with what an earlier attempt left. progress: bytes that are here.

    Raises FetchError for a server that fails or is too slow, IntegrityError for bytes that are not the locked ones,
    StoppedError when the run was ended.
    """
    if not artifact.size:
        artifact = _sized(network, url, artifact)
    part = path.with_name(path.name + ".part")
    handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with os.fdopen(handle, "r+b", buffering=0) as stream:
        growing = _Part(stream, artifact)
        for last in (False, True):
            _complete(network, url, artifact, growing, progress)
            fault = growing.fault(shown(url))
            if fault is None:
                growing.publish(part, path)
                return
            if last or not growing.resumed:
                part.unlink()
                raise fault
            growing.restart()


def _complete(network: Network, url: str, artifact: Artifact, part: _Part, progress: Callable[[int], None]) -> None:
    """Ask until the part has as many bytes as the artifact, or one more."""
    deadline = time.monotonic() + network.limits.seconds_for(artifact.size)
    failures = 0
    while part.length < artifact.size:
        before = part.length
        try:
            _transfer(network, url, artifact, part, deadline, progress)
        except TransientError as fault:
            failures = 0 if part.length > before else failures + 1
            if failures >= network.limits.attempts:
                raise FetchError(
                    f"gave up after {failures} attempts", where=shown(url), why=str(fault), fix=CHECK_INDEX
                ) from fault
            network.pause(min(max(fault.wait, network.limits.backoff * 2 ** max(failures - 1, 0)), _LONGEST_WAIT))


def _transfer(
    network: Network, url: str, artifact: Artifact, part: _Part, deadline: float, progress: Callable[[int], None]
) -> None:
    """One request, and as much of its body as comes."""
    with _answer(network, url, part.length) as body:
        _check_answer(body, url, artifact, part)
        told = part.length
        while part.room > 0 and (chunk := _read(body, min(CHUNK, part.room))):
            part.append(chunk)
            if network.stop.is_set():
                raise StoppedError
            if time.monotonic() > deadline:
                raise FetchError(
                    "too slow", where=shown(url), why=f"{part.length} of {artifact.size} bytes so far; they are kept",
                    fix="Run it again: it goes on from there.",
                )  # fmt: skip
            if part.length - told >= CHUNK:
                told = part.length
                progress(told)
    if part.length < artifact.size:
        raise TransientError(f"the body ended after {part.length} of {artifact.size} bytes")


def _read(body: Body, most: int) -> bytes:
    from composer._pip import PipFault

    try:
        return body.read(most)
    except PipFault as fault:
        raise TransientError(fault.what) from fault


@contextlib.contextmanager
def _answer(network: Network, url: str, start: int) -> Iterator[Body]:
    """The answer to a GET from byte `start`, after redirects, of which none may leave TLS."""
    for _ in range(_REDIRECTS + 1):
        body = network.get(url, start)
        with network.using(body):
            if body.redirect is None:
                yield body
                return
            if url.startswith("https:") and not body.redirect.startswith("https:"):
                raise FetchError(
                    "redirects away from https", where=shown(url), why=shown(body.redirect), fix=CHECK_INDEX
                )
            url = body.redirect
    raise FetchError(f"more than {_REDIRECTS} redirects", where=shown(url), fix=CHECK_INDEX)


def _check_answer(body: Body, url: str, artifact: Artifact, part: _Part) -> None:
    """Make `part` fit the answer: a server may ignore a Range, or answer with another one."""
    if body.status == 206:
        start, total = _content_range(body.headers.get("Content-Range", ""))
        if start != part.length or total not in {None, artifact.size}:
            part.restart()
            raise TransientError(f"asked for the rest, got {body.headers.get('Content-Range', 'no Content-Range')}")
        part.resumed = True
    elif body.status == 200:
        part.restart()
        length = body.headers.get("Content-Length", "")
        if length.isdecimal() and int(length) != artifact.size and "Content-Encoding" not in body.headers:
            raise mismatch(artifact, shown(url), "", int(length))
    else:
        _refuse(body, url, part)


def _refuse(body: Body, url: str, part: _Part) -> None:
    if body.status == 416:
        part.restart()
    if body.status in {408, 416, 425, 429} or body.status >= 500:
        wait = body.headers.get("Retry-After", "")
        raise TransientError(f"HTTP status {body.status}", wait=float(wait) if wait.isdecimal() else 0.0)
    reason = {401: "needs a login", 403: "is forbidden", 404: "is not there", 410: "is gone"}.get(body.status, "failed")
    raise FetchError(f"the file {reason}", where=shown(url), why=f"HTTP status {body.status}", fix=CHECK_INDEX)


def _content_range(header: str) -> tuple[int | None, int | None]:
    """First byte and total of a Content-Range (RFC 9110, 14.4)."""
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", header.strip())
    if not found:
        return None, None
    return int(found[1]), None if found[2] == "*" else int(found[2])


def shown(url: str) -> str:
    """The URL without credentials and query, which may hold a signature."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
