"""Put a model bundle into a folder of models: an archive that was checked when it was made, and is again, on its way.

The archive is a tar file of plain files, laid out as `tar -xf` should leave them in a bundle's folder:

    share/models/hub/models--ORG--NAME/snapshots/REVISION/SHA256SUMS    first: what is to come
    share/models/hub/models--ORG--NAME/snapshots/REVISION/...
    share/models/hub/models--ORG--NAME/refs/main                        holds REVISION

share/models/hub is laid out as a Hugging Face cache; `zstd` may have compressed the whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from ..staging import staging_folder
from .snapshot import SUMS, faults, parse_sums

#: Where models are below a bundle's folder.
HUB = "share/models/hub"
#: What a member is called, after HUB.
_MEMBER = re.compile(r"(?P<folder>models(?:--[A-Za-z0-9_][A-Za-z0-9._-]*)+)/(?:refs/main|snapshots/"
                     r"(?P<revision>[0-9a-f]{40})/(?P<path>[^\0]+))\Z")  # fmt: skip
_CHUNK, _READ = 8 << 20, 1 << 20
_LARGEST_SUMS = 64 << 20
_REVISION_SIZE = 40
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

Progress = Callable[[int], None]


class ArchiveError(ValueError):
    """An archive that is no model bundle, is damaged, or would write where it must not."""


@dataclass(frozen=True)
class Added:
    """A model that is in place. fresh: it was not there before."""

    name: str
    revision: str
    folder: Path
    fresh: bool


@dataclass(frozen=True)
class _Place:
    """Which model an archive is for."""

    folder: str
    revision: str

    @property
    def name(self) -> str:
        """As one asks for it: ORG/NAME."""
        return repository(self.folder)


def repository(folder: str) -> str:
    """`models--ORG--NAME` as ORG/NAME."""
    return folder.removeprefix("models--").replace("--", "/")


def cache_folder(name: str) -> str:
    """ORG/NAME as `models--ORG--NAME`."""
    return f"models--{name.replace('/', '--')}"


def add(stream: IO[bytes], hub: Path, *, progress: Progress = lambda _count: None) -> Added:
    """Read a model bundle from a stream of its plain tar bytes and put the model below `hub`, whole or not at all.

    progress: is told how many bytes of files were written, each time. What is there already, from the same archive, is
    left as it is. Raises ArchiveError for the archive, and OSError for the disk.
    """
    for folder in reversed((hub, *hub.parents)):
        _make(folder)
    with _reading(stream) as members, staging_folder(hub, "model") as staging:
        place, sums, listing = _first(members)
        final = hub / place.folder / "snapshots" / place.revision
        fresh = not _is_there(final, listing)
        if fresh:
            root = staging / place.revision
            _make(root)
            _write(root / SUMS, listing)
            _extract(members, place, sums, root, progress)
            _check(root)
            _install(root, final)
        _point(hub / place.folder / "refs" / "main", place.revision)
    return Added(place.name, place.revision, final, fresh)


@contextlib.contextmanager
def _reading(stream: IO[bytes]) -> Iterator[Iterator[tuple[tarfile.TarInfo, IO[bytes]]]]:
    """The members of an archive with their contents; what is wrong with its bytes is an ArchiveError."""
    try:
        with tarfile.open(fileobj=stream, mode="r|", bufsize=_READ) as archive:
            yield _members(archive)
    except ArchiveError:
        raise
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as fault:
        raise ArchiveError(f"is no whole tar archive: {fault}") from fault


def _members(archive: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
    for info in archive:
        content = archive.extractfile(info) if info.isreg() and not info.issparse() else None
        if content is None:
            raise ArchiveError(f"{info.name!r} is no plain file")
        yield info, content


def _first(members: Iterator[tuple[tarfile.TarInfo, IO[bytes]]]) -> tuple[_Place, dict[str, str], bytes]:
    """Which model it is, what its files' digests are, and that list as it is."""
    info, content = next(members, (None, None))
    if info is None or content is None:
        raise ArchiveError("is empty")
    place, path = _parse(info.name)
    if path != SUMS or place is None:
        raise ArchiveError(f"begins with {info.name!r}, not with a model's {SUMS}")
    if info.size > _LARGEST_SUMS:
        raise ArchiveError(f"{info.name!r} has {info.size} bytes")
    listing = content.read()
    sums, wrong = parse_sums(listing)
    if wrong or not sums:
        raise ArchiveError(f"{info.name!r} {wrong or 'is empty'}")
    for name in sums:
        _check_path(name)
        if any(str(folder) in sums for folder in PurePosixPath(name).parents):
            raise ArchiveError(f"{name!r} is below a file")
    return place, sums, listing


def _parse(member: str) -> tuple[_Place | None, str]:
    """(model, path in its snapshot); for refs/main (None, its folder)."""
    found = _MEMBER.match(member.removeprefix(f"{HUB}/")) if member.startswith(f"{HUB}/") else None
    if found is None:
        raise ArchiveError(f"{member!r} is no place for a file of a model")
    if found["path"] is None:
        return None, found["folder"]
    _check_path(found["path"])
    return _Place(found["folder"], found["revision"]), found["path"]


def _check_path(path: str) -> None:
    if path.startswith("/") or any(part in ("", ".", "..") for part in path.split("/")) or not path.isprintable():
        raise ArchiveError(f"{path!r} is no plain relative path")


def _extract(members: Iterator[tuple[tarfile.TarInfo, IO[bytes]]], place: _Place, sums: dict[str, str], root: Path,
             progress: Progress) -> None:  # fmt: skip
    """Write exactly the files that are listed, each with its digest."""
    left = dict(sums)
    with ThreadPoolExecutor(1) as pool:
        for info, content in members:
            owner, path = _parse(info.name)
            if owner is None and path == place.folder:
                _check_revision(content, place)
                continue
            if owner != place or path not in left:
                raise ArchiveError(f"{info.name!r} is not listed in {SUMS}, or comes twice")
            expected = left.pop(path)
            for folder in reversed(PurePosixPath(path).parents):
                _make(root / folder)
            if _copy(content, root / path, pool, progress) != expected:
                raise ArchiveError(f"{info.name!r} does not have the sha256 that {SUMS} lists")
    if left:
        raise ArchiveError(f"{next(iter(left))!r} is listed in {SUMS} and is not there: the archive is cut short")


def _check_revision(content: IO[bytes], place: _Place) -> None:
    if content.read(_REVISION_SIZE + 1) != place.revision.encode():
        raise ArchiveError("its refs/main names another revision")


def _copy(content: IO[bytes], path: Path, pool: ThreadPoolExecutor, progress: Progress) -> str:
    """Write one new file, to the disk; returns its sha256, which a thread computes meanwhile."""
    digest = hashlib.sha256()
    with os.fdopen(os.open(path, _NEW, 0o644), "wb", buffering=0) as out:
        os.fchmod(out.fileno(), 0o644)  # whatever the umask is
        while chunk := content.read(_CHUNK):
            hashing = pool.submit(digest.update, chunk)
            view = memoryview(chunk)
            while view:
                view = view[out.write(view) :]
            hashing.result()
            progress(len(chunk))
        os.fsync(out.fileno())
    return digest.hexdigest()


def _write(path: Path, data: bytes) -> None:
    with os.fdopen(os.open(path, _NEW, 0o644), "wb") as out:
        os.fchmod(out.fileno(), 0o644)
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


def _check(root: Path) -> None:
    """What is wrong with a model although its files are those that were packed."""
    errors = [one for one in faults(str(root), deep=False) if one["severity"] == "error"]
    if errors:
        raise ArchiveError("; ".join(f"{one['subject']} {one['evidence']}" for one in errors))


def _is_there(final: Path, listing: bytes) -> bool:
    if not os.path.lexists(final):
        return False
    try:
        same = (final / SUMS).read_bytes() == listing
    except OSError:
        same = False
    if not same:
        raise ArchiveError(f"this revision is there already, and not from this archive: {final}")
    return True


def _install(root: Path, final: Path) -> None:
    _require_own(final.parent)
    try:
        root.rename(final)
    except OSError as fault:
        if final.is_dir():  # another program was faster
            raise ArchiveError(f"this revision is there already: {final}") from fault
        raise
    _sync(final.parent)


def _require_own(folder: Path) -> None:
    """Make `models--ORG--NAME/X` below the hub; ArchiveError where a link would lead elsewhere."""
    for one in (folder.parent, folder):
        _make(one)
        if one.is_symlink():
            raise ArchiveError(f"{one} is a link: models are added to real folders only")


def _make(folder: Path) -> None:
    """Make a folder that everybody may read, unless it is there."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
        folder.chmod(0o755)


def _point(path: Path, revision: str) -> None:
    """Make a revision the one that the name alone means."""
    _require_own(path.parent)
    with staging_folder(path.parent, path.name) as staging:
        _write(staging / path.name, revision.encode())
        (staging / path.name).replace(path)
        _sync(path.parent)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
