"""Lock to files: every artifact in a content-addressed folder, downloaded once, resumed when cut off, always verified.

An artifact of the folder is `artifacts/<first two digits>/<sha256>/<file name>`. Its name appears only when all of its
bytes have the locked digest; until then it is `<file name>.part`, which the next run continues.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal
from urllib.parse import urlsplit
from urllib.request import url2pathname

from filelock import FileLock, Timeout
from packaging.utils import InvalidSdistFilename, parse_sdist_filename
from packaging.version import Version

from composer._fs import atomic_file, host_errors, sync_folder
from composer.errors import ComposerError, FetchError, HostError, IntegrityError
from composer.model.lock import FILE, Artifact, LockedPackage
from composer.steps.load import LocalFile

if TYPE_CHECKING:
    from composer._pip import Body, IndexedFile, Indexes

_CHUNK = 1 << 20
_REDIRECTS = 5
_LONGEST_WAIT = 30.0
_CHECK_INDEX = "Check the index and the proxy (`pip config list`), or use --offline --wheelhouse DIR."
_REINSTALL = "Install composer's own dependencies again: its pip is pinned."
_CHECK_SOURCE = "Do not use this file. If the source is right, run `compose lock` again and review what changed."


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
class FetchEvent:
    """What happens to one artifact: it was `present`, comes from a `local` folder, has `bytes`, is `done` or `missing`.

    done, size: bytes of the artifact that are here, and that it has.
    """

    filename: str
    state: Literal["present", "local", "bytes", "done", "missing"]
    done: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """An optional artifact that could not be had, and why."""

    package: str
    artifact: Artifact
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """Where each artifact is, by its SHA-256, and which optional ones are not."""

    paths: Mapping[str, Path]
    missing: tuple[Missing, ...] = ()


def artifact_path(store: Path, artifact: Artifact) -> Path:
    """The place of `artifact` in the folder `store`, whether it is there or not."""
    return store / "artifacts" / artifact.sha256[:2] / artifact.sha256 / artifact.filename


def fetch(
    packages: Iterable[LockedPackage],
    *,
    into: Path,
    wheelhouse: Sequence[Path] = (),
    indexes: Mapping[str, str] | None = None,
    alternatives: Mapping[str, Sequence[str]] | None = None,
    local: Mapping[str, LocalFile] | None = None,
    offline: bool = False,
    verify: bool = False,
    jobs: int = 8,
    limits: Limits | None = None,
    progress: Callable[[FetchEvent], None] = lambda _: None,
) -> Fetched:
    """Bring every artifact of `packages` into the folder `into`, from `wheelhouse` folders first, then from its index.

    indexes: URL by index name, for all names but `pypi`. alternatives: by the SHA-256 of a URL source, further URLs
    that are tried before its own. local: the recipe's own files, by their SHA-256. offline: ask no index. verify: hash
    what is already there instead of trusting its size. jobs: artifacts at a time. progress: called by one thread at a
    time.

    Raises IntegrityError for bytes that are not the locked ones, FetchError for an index or a download that fails,
    HostError for a folder that cannot be written; faults of several artifacts come together, after all others are done.
    """
    run = _Run(
        store=into, wheelhouse=tuple(wheelhouse), indexes=dict(indexes or {}),
        alternatives=dict(alternatives or {}), local=dict(local or {}), offline=offline, verify=verify,
        limits=limits or Limits(), progress=progress,
    )  # fmt: skip
    wanted = [(package, artifact) for package in packages for artifact in package.artifacts]
    paths: dict[str, Path] = {}
    missing: list[Missing] = []
    faults: list[ComposerError] = []
    with contextlib.closing(_each(run, wanted, jobs)) as results:
        for (package, artifact), result in results:
            if isinstance(result, Path):
                paths[artifact.sha256] = result
            elif package.optional and isinstance(result, FetchError) and not isinstance(result, IntegrityError):
                run.tell(artifact, "missing", 0)
                missing.append(Missing(package=package.name, artifact=artifact, reason=str(result)))
            else:
                faults.append(result)
    _raise_together(faults)
    return Fetched(paths=paths, missing=tuple(sorted(missing, key=lambda item: item.package)))


def export_wheelhouse(artifacts: Iterable[Artifact], fetched: Fetched, to: Path) -> tuple[Path, ...]:
    """Put the fetched ones of `artifacts` into the folder `to` under their plain names, as links where possible.

    Raises HostError if `to` cannot be written.
    """
    exported = []
    with host_errors(to):
        to.mkdir(parents=True, exist_ok=True)
        for artifact in artifacts:
            if (source := fetched.paths.get(artifact.sha256)) is not None:
                exported.append(_link(source, to / artifact.filename))
        sync_folder(to)
    return tuple(exported)


def _link(source: Path, target: Path) -> Path:
    if target.exists() and target.samefile(source):
        return target
    with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as folder:
        temporary = Path(folder) / target.name
        try:
            os.link(source, temporary)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, temporary)
        temporary.replace(target)
    return target


# --- all of them -----------------------------------------------------------------------------------------------------

_Wanted = tuple[LockedPackage, Artifact]


class _StoppedError(Exception):
    """Another thread ended the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What all downloads of one call share."""

    store: Path
    wheelhouse: tuple[Path, ...]
    indexes: Mapping[str, str]
    alternatives: Mapping[str, Sequence[str]]
    local: Mapping[str, LocalFile]
    offline: bool
    verify: bool
    limits: Limits
    progress: Callable[[FetchEvent], None]
    stop: threading.Event = field(default_factory=threading.Event)
    mutex: threading.Lock = field(default_factory=threading.Lock)
    opened: list[Indexes] = field(default_factory=list)
    bodies: set[Body] = field(default_factory=set)

    def tell(
        self, artifact: Artifact, state: Literal["present", "local", "bytes", "done", "missing"], done: int
    ) -> None:
        with self.mutex:
            self.progress(FetchEvent(filename=artifact.filename, state=state, done=done, size=artifact.size))

    def index(self) -> Indexes:
        """pip's view of the indexes; opened when first needed, because importing pip takes a while."""
        with self.mutex, _index_errors("pip"):
            if not self.opened:
                from composer._pip import Indexes

                self.opened.append(Indexes(self.indexes))
            return self.opened[0]

    def abort(self) -> None:
        """End all downloads soon; what they have stays."""
        self.stop.set()
        for body in tuple(self.bodies):
            body.abort()

    def pause(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise _StoppedError


def _each(
    run: _Run, wanted: Sequence[_Wanted], jobs: int
) -> Generator[tuple[_Wanted, Path | ComposerError], None, None]:
    with ThreadPoolExecutor(max_workers=jobs, thread_name_prefix="fetch") as pool:
        try:
            # The largest first: the last one to end should be a small one.
            order = sorted(wanted, key=lambda item: -item[1].size)
            futures: dict[Future[Path], _Wanted] = {pool.submit(_obtain, run, *item): item for item in order}
            for future in as_completed(futures):
                fault = future.exception()
                if fault is not None and not isinstance(fault, ComposerError):
                    raise fault
                yield futures[future], fault or future.result()
        except BaseException:
            run.abort()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _raise_together(faults: Sequence[ComposerError]) -> None:
    """Faults of one kind as that kind; one index that is down is one fault, however many artifacts wanted it."""
    distinct = list({str(fault): fault for fault in faults}.values())
    kinds = {type(fault) for fault in distinct}
    (kinds.pop() if len(kinds) == 1 else FetchError).collect(sorted(distinct, key=str))


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
        raise FetchError(fault.what, where=where, why=fault.why or None, fix=_CHECK_INDEX) from fault


# --- one of them -----------------------------------------------------------------------------------------------------


def _obtain(run: _Run, package: LockedPackage, artifact: Artifact) -> Path:
    path = artifact_path(run.store, artifact)
    _refuse_changed(run, artifact, path)
    if _is_present(path, artifact, verify=run.verify):
        run.tell(artifact, "present", artifact.size)
        return path
    with host_errors(path), _exclusive(run, path.parent):
        if _is_present(path, artifact, verify=run.verify):  # another process was faster
            run.tell(artifact, "present", artifact.size)
            return path
        _remove(path)
        if not _from_wheelhouse(run, artifact, path) and not _from_recipe(run, artifact, path):
            if package.index == FILE:
                raise FetchError(
                    "locked as a local file, and the recipe names none with this sha256", where=artifact.filename,
                    fix="Run `compose lock` again, or give a --wheelhouse that holds it.",
                )  # fmt: skip
            if run.offline:
                raise FetchError(
                    "not in the store nor in a wheelhouse, and no index may be asked", where=artifact.filename,
                    fix="Run `compose fetch -o WHEELHOUSE` where there is a network, and give that folder here.",
                )  # fmt: skip
            _from_network(run, package, artifact, path)
    run.tell(artifact, "done", artifact.size)
    return path


def _is_present(path: Path, artifact: Artifact, *, verify: bool) -> bool:
    """Whether a regular file of the locked size is there; its bytes were verified before it got its name."""
    try:
        found = path.lstat()
    except OSError:
        return False
    if not stat.S_ISREG(found.st_mode) or found.st_size != (artifact.size or found.st_size):
        return False
    return not verify or _sha256(path) == artifact.sha256


def _sha256(path: Path) -> str:
    with host_errors(path), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _remove(path: Path) -> None:
    """Clear the place of an artifact of what is not the artifact."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _exclusive(run: _Run, folder: Path) -> Iterator[None]:
    """Only one process and thread at a time works on an artifact; the others wait and then find it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    while True:
        try:
            lock.acquire(timeout=0.5)
            break
        except Timeout:
            run.pause(0)
    try:
        yield
    finally:
        lock.release()


def _from_wheelhouse(run: _Run, artifact: Artifact, path: Path) -> bool:
    for folder in run.wheelhouse:
        source = folder / artifact.filename
        if source.is_file():
            run.tell(artifact, "local", 0)
            _copy(source, path, artifact)
            return True
    return False


def _from_recipe(run: _Run, artifact: Artifact, path: Path) -> bool:
    local = run.local.get(artifact.sha256)
    if local is None:
        return False
    run.tell(artifact, "local", 0)
    if not local.path.is_file():
        raise _no_local(local)
    try:
        _copy(local.path, path, artifact)
    except IntegrityError as fault:
        raise _other_local(local, fault.why or "") from fault
    return True


def _refuse_changed(run: _Run, artifact: Artifact, path: Path) -> None:
    """IntegrityError for a local file that is not any more what the store holds: the user means the one that is there.

    It is read only when it changed after the store's copy was made or last compared.
    """
    local = run.local.get(artifact.sha256)
    with contextlib.suppress(OSError):
        if local and local.path.stat().st_ctime_ns >= path.stat().st_mtime_ns:
            local_size(local, artifact.sha256)
            os.utime(path)


def local_size(local: LocalFile, sha256: str) -> int:
    """Bytes of a local file. FetchError when it is not there, IntegrityError when it is another one."""
    try:
        with local.path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
            size = stream.tell()
    except OSError as fault:
        raise _no_local(local, fault.strerror) from fault
    if found != sha256:
        raise _other_local(local, f"expected sha256 {sha256}, got {found}")
    return size


def _no_local(local: LocalFile, why: str | None = None) -> FetchError:
    return FetchError("the local file cannot be had", where=local.key, why=f"{local.path}: {why or 'no such file'}",
                      fix="Put it there, correct the path, or give a --wheelhouse that holds it.")  # fmt: skip


def _other_local(local: LocalFile, why: str) -> IntegrityError:
    return IntegrityError("the local file is not the one with this sha256", where=local.key, why=f"{local.path}: {why}",
                          fix="Put the right one there; or, if this is it, give its sha256 in the recipe.")  # fmt: skip


def _copy(source: Path, path: Path, artifact: Artifact) -> None:
    """Copy a local file, whole and verified, or raise IntegrityError and leave nothing."""
    digest, length = hashlib.sha256(), 0
    with atomic_file(path, mode=0o444) as target, source.open("rb") as stream:
        while length <= (artifact.size or length) and (chunk := stream.read(_CHUNK)):
            digest.update(chunk)
            length += len(chunk)
            target.write(chunk)
        if digest.hexdigest() != artifact.sha256:
            raise _mismatch(artifact, str(source), digest.hexdigest(), length)


def _mismatch(artifact: Artifact, where: str, sha256: str, size: int) -> IntegrityError:
    if artifact.size and size != artifact.size:
        got = f"{'more than ' * (size > artifact.size)}{min(size, artifact.size)} bytes"
        return IntegrityError(
            "not the locked size", where=where, why=f"expected {artifact.size} bytes, got {got}", fix=_CHECK_SOURCE
        )
    return IntegrityError(
        "not the locked bytes", where=where, why=f"expected sha256 {artifact.sha256}, got {sha256}", fix=_CHECK_SOURCE
    )


def _from_network(run: _Run, package: LockedPackage, artifact: Artifact, path: Path) -> None:
    fault: FetchError | None = None
    for url in _urls(run, package, artifact):
        try:
            if url.startswith("file:"):
                _copy(Path(url2pathname(urlsplit(url).path)), path, artifact)
            else:
                _download(run, url, artifact if artifact.size else _sized(run, url, artifact), path)
            return
        except FetchError as error:
            fault = error
    if fault is not None:
        raise fault


def _sized(run: _Run, url: str, artifact: Artifact) -> Artifact:
    """The artifact with the size that its server announces, so that its download has a bound like any other."""
    try:
        with _answer(run, url, 0) as body:
            length = body.headers.get("Content-Length", "") if body.status == 200 else ""
    except _TransientError as fault:
        raise FetchError("cannot be asked for", where=_shown(url), why=str(fault), fix=_CHECK_INDEX) from fault
    if not length.isdigit():
        raise FetchError("the server does not tell the size", where=_shown(url), fix="Give `size` in the recipe.")
    return replace(artifact, size=int(length))


def is_reachable(url: str, limits: Limits | None = None) -> bool:
    """Whether a server answers a request for `url` with the file, within a few seconds; nothing is downloaded."""
    patience = limits or Limits(connect=3.0, stall=5.0)
    run = _Run(store=Path(), wheelhouse=(), indexes={}, alternatives={}, local={}, offline=False, verify=False,
               limits=patience, progress=lambda _: None)  # fmt: skip
    try:
        with _answer(run, url, 0) as body:
            return body.status == 200
    except (FetchError, _TransientError):
        return False


def find_sdist(name: str, version: str, index: str, indexes: Mapping[str, str]) -> Artifact:
    """The source distribution of one version, as its index lists it. FetchError when it has none, or no digest of it.

    indexes: URL by index name, for all names but `pypi`.
    """
    run = _Run(store=Path(), wheelhouse=(), indexes=indexes, alternatives={}, local={}, offline=False, verify=False,
               limits=Limits(), progress=lambda _: None)  # fmt: skip
    with _index_errors(f"index {index!r}"):
        listed = run.index().files(name, index)
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
    return _sized(run, found.url, artifact)


def _is_sdist_of(filename: str, name: str, version: str) -> bool:
    try:
        return filename.endswith(".tar.gz") and parse_sdist_filename(filename) == (name, Version(version))
    except InvalidSdistFilename:
        return False


def _urls(run: _Run, package: LockedPackage, artifact: Artifact) -> list[str]:
    """Where the artifact's own index has it, best first: with the locked digest, then without any."""
    if artifact.url is not None:
        return [*run.alternatives.get(artifact.sha256, ()), artifact.url]
    with _index_errors(f"index {package.index!r}"):
        listed = run.index().files(package.name, package.index)
    same_name = [file for file in listed if file.filename == artifact.filename]
    usable = [file for file in same_name if file.sha256 in {None, artifact.sha256}]
    if not usable:
        raise _not_listed(package, artifact, same_name)
    return list(dict.fromkeys(file.url for file in sorted(usable, key=lambda file: file.sha256 is None)))


def _not_listed(package: LockedPackage, artifact: Artifact, same_name: Sequence[IndexedFile]) -> FetchError:
    if same_name:
        got = ", ".join(sorted({file.sha256 or "" for file in same_name}))
        return IntegrityError(
            f"index {package.index!r} offers other bytes under this name", where=artifact.filename,
            why=f"expected sha256 {artifact.sha256}, got {got}", fix=_CHECK_SOURCE,
        )  # fmt: skip
    return FetchError(f"index {package.index!r} does not have it", where=artifact.filename, fix=_CHECK_INDEX)


# --- one download ----------------------------------------------------------------------------------------------------


class _TransientError(Exception):
    """This attempt failed; another may not. `wait`: seconds that the server asks for."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait


class _Part:
    """The growing file of one artifact, with the digest of what it holds."""

    def __init__(self, stream: BinaryIO, artifact: Artifact) -> None:
        self._stream, self._artifact = stream, artifact
        self._digest = hashlib.sha256()
        self.length = 0
        stream.seek(0)
        while chunk := stream.read(_CHUNK):
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
        return None if digest == self._artifact.sha256 else _mismatch(self._artifact, where, digest, self.length)

    def publish(self, part: Path, path: Path) -> None:
        """Give the file its name, for good."""
        self._stream.flush()
        os.fchmod(self._stream.fileno(), 0o444)
        os.fsync(self._stream.fileno())
        part.replace(path)
        sync_folder(path.parent)


def _download(run: _Run, url: str, artifact: Artifact, path: Path) -> None:
    part = path.with_name(path.name + ".part")
    handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with os.fdopen(handle, "r+b", buffering=0) as stream:
        growing = _Part(stream, artifact)
        for last in (False, True):
            _complete(run, url, artifact, growing)
            fault = growing.fault(_shown(url))
            if fault is None:
                growing.publish(part, path)
                return
            if last or not growing.resumed:
                part.unlink()
                raise fault
            growing.restart()


def _complete(run: _Run, url: str, artifact: Artifact, part: _Part) -> None:
    """Ask until the part has as many bytes as the artifact, or one more."""
    deadline = time.monotonic() + run.limits.seconds_for(artifact.size)
    failures = 0
    while part.length < artifact.size:
        before = part.length
        try:
            _transfer(run, url, artifact, part, deadline)
        except _TransientError as fault:
            failures = 0 if part.length > before else failures + 1
            if failures >= run.limits.attempts:
                raise FetchError(
                    f"gave up after {failures} attempts", where=_shown(url), why=str(fault), fix=_CHECK_INDEX
                ) from fault
            run.pause(min(max(fault.wait, run.limits.backoff * 2 ** max(failures - 1, 0)), _LONGEST_WAIT))


def _transfer(run: _Run, url: str, artifact: Artifact, part: _Part, deadline: float) -> None:
    """One request, and as much of its body as comes."""
    with _answer(run, url, part.length) as body:
        _check_answer(body, url, artifact, part)
        told = part.length
        while part.room > 0 and (chunk := _read(body, min(_CHUNK, part.room))):
            part.append(chunk)
            if run.stop.is_set():
                raise _StoppedError
            if time.monotonic() > deadline:
                raise FetchError(
                    "too slow", where=_shown(url), why=f"{part.length} of {artifact.size} bytes so far; they are kept",
                    fix="Run it again: it goes on from there.",
                )  # fmt: skip
            if part.length - told >= _CHUNK:
                told = part.length
                run.tell(artifact, "bytes", told)
    if part.length < artifact.size:
        raise _TransientError(f"the body ended after {part.length} of {artifact.size} bytes")


def _read(body: Body, most: int) -> bytes:
    from composer._pip import PipFault

    try:
        return body.read(most)
    except PipFault as fault:
        raise _TransientError(fault.what) from fault


@contextlib.contextmanager
def _answer(run: _Run, url: str, start: int) -> Iterator[Body]:
    """The answer to a GET from byte `start`, after redirects, of which none may leave TLS."""
    for _ in range(_REDIRECTS + 1):
        body = _get(run, url, start)
        run.bodies.add(body)
        try:
            if body.redirect is None:
                yield body
                return
            if url.startswith("https:") and not body.redirect.startswith("https:"):
                raise FetchError(
                    "redirects away from https", where=_shown(url), why=_shown(body.redirect), fix=_CHECK_INDEX
                )
            url = body.redirect
        finally:
            run.bodies.discard(body)
            body.close()
    raise FetchError(f"more than {_REDIRECTS} redirects", where=_shown(url), fix=_CHECK_INDEX)


def _get(run: _Run, url: str, start: int) -> Body:
    from composer._pip import PipFault

    try:
        return run.index().get(url, start=start, connect=run.limits.connect, stall=run.limits.stall)
    except PipFault as fault:
        if fault.kind == "transient":
            raise _TransientError(": ".join(filter(None, (fault.what, fault.why)))) from fault
        raise FetchError(fault.what, where=_shown(url), why=fault.why or None, fix=_CHECK_INDEX) from fault


def _check_answer(body: Body, url: str, artifact: Artifact, part: _Part) -> None:
    """Make `part` fit the answer: a server may ignore a Range, or answer with another one."""
    if body.status == 206:
        start, total = _content_range(body.headers.get("Content-Range", ""))
        if start != part.length or total not in {None, artifact.size}:
            part.restart()
            raise _TransientError(f"asked for the rest, got {body.headers.get('Content-Range', 'no Content-Range')}")
        part.resumed = True
    elif body.status == 200:
        part.restart()
        length = body.headers.get("Content-Length", "")
        if length.isdigit() and int(length) != artifact.size and "Content-Encoding" not in body.headers:
            raise _mismatch(artifact, _shown(url), "", int(length))
    else:
        _refuse(body, url, part)


def _refuse(body: Body, url: str, part: _Part) -> None:
    if body.status == 416:
        part.restart()
    if body.status in {408, 416, 425, 429} or body.status >= 500:
        wait = body.headers.get("Retry-After", "")
        raise _TransientError(f"HTTP status {body.status}", wait=float(wait) if wait.isdigit() else 0.0)
    reason = {401: "needs a login", 403: "is forbidden", 404: "is not there", 410: "is gone"}.get(body.status, "failed")
    raise FetchError(f"the file {reason}", where=_shown(url), why=f"HTTP status {body.status}", fix=_CHECK_INDEX)


def _content_range(header: str) -> tuple[int | None, int | None]:
    """First byte and total of a Content-Range (RFC 9110, 14.4)."""
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", header.strip())
    if not found:
        return None, None
    return int(found[1]), None if found[2] == "*" else int(found[2])


def _shown(url: str) -> str:
    """The URL without credentials and query, which may hold a signature."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
