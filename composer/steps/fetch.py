"""Lock to files: every artifact in a content-addressed folder, downloaded once, resumed when cut off, always verified.

An artifact of the folder is `artifacts/<first two digits>/<sha256>/<file name>`. Its name appears only when all of its
bytes have the locked digest; until then it is `<file name>.part`, which the next run continues.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit
from urllib.request import url2pathname

from filelock import FileLock, Timeout

from composer._fs import host_errors, sync_folder
from composer.errors import ComposerError, FetchError, IntegrityError
from composer.model.lock import FILE, Artifact, LockedPackage
from composer.steps.artifact import CHECK_SOURCE, artifact_path, copy_artifact, is_present
from composer.steps.download import CHECK_INDEX, Limits, Network, download
from composer.steps.load import LocalFile

if TYPE_CHECKING:
    from composer._pip import IndexedFile


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
        store=into, wheelhouse=tuple(wheelhouse),
        network=Network(indexes=dict(indexes or {}), limits=limits or Limits()),
        alternatives=dict(alternatives or {}), local=dict(local or {}), offline=offline, verify=verify,
        progress=progress,
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What all downloads of one call share."""

    store: Path
    wheelhouse: tuple[Path, ...]
    network: Network
    alternatives: Mapping[str, Sequence[str]]
    local: Mapping[str, LocalFile]
    offline: bool
    verify: bool
    progress: Callable[[FetchEvent], None]
    mutex: threading.Lock = field(default_factory=threading.Lock)

    def tell(
        self, artifact: Artifact, state: Literal["present", "local", "bytes", "done", "missing"], done: int
    ) -> None:
        with self.mutex:
            self.progress(FetchEvent(filename=artifact.filename, state=state, done=done, size=artifact.size))


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
            run.network.abort()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _raise_together(faults: Sequence[ComposerError]) -> None:
    """Faults of one kind as that kind; one index that is down is one fault, however many artifacts wanted it."""
    distinct = list({str(fault): fault for fault in faults}.values())
    kinds = {type(fault) for fault in distinct}
    (kinds.pop() if len(kinds) == 1 else FetchError).collect(sorted(distinct, key=str))


# --- one of them -----------------------------------------------------------------------------------------------------


def _obtain(run: _Run, package: LockedPackage, artifact: Artifact) -> Path:
    path = artifact_path(run.store, artifact)
    _refuse_changed(run, artifact, path)
    if is_present(path, artifact, verify=run.verify):
        run.tell(artifact, "present", artifact.size)
        return path
    with host_errors(path), _exclusive(run, path.parent):
        if is_present(path, artifact, verify=run.verify):  # another process was faster
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
            run.network.pause(0)
    try:
        yield
    finally:
        lock.release()


def _from_wheelhouse(run: _Run, artifact: Artifact, path: Path) -> bool:
    for folder in run.wheelhouse:
        source = folder / artifact.filename
        if source.is_file():
            run.tell(artifact, "local", 0)
            copy_artifact(source, path, artifact)
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
        copy_artifact(local.path, path, artifact)
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


def _from_network(run: _Run, package: LockedPackage, artifact: Artifact, path: Path) -> None:
    fault: FetchError | None = None
    for url in _urls(run, package, artifact):
        try:
            if url.startswith("file:"):
                copy_artifact(Path(url2pathname(urlsplit(url).path)), path, artifact)
            else:
                download(run.network, url, artifact, path, lambda done: run.tell(artifact, "bytes", done))
            return
        except FetchError as error:
            fault = error
    if fault is not None:
        raise fault


def _urls(run: _Run, package: LockedPackage, artifact: Artifact) -> list[str]:
    """Where the artifact's own index has it, best first: with the locked digest, then without any."""
    if artifact.url is not None:
        return [*run.alternatives.get(artifact.sha256, ()), artifact.url]
    listed = run.network.files(package.name, package.index)
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
            why=f"expected sha256 {artifact.sha256}, got {got}", fix=CHECK_SOURCE,
        )  # fmt: skip
    return FetchError(f"index {package.index!r} does not have it", where=artifact.filename, fix=CHECK_INDEX)
