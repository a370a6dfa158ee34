"""Unpack an archive without trusting it: `tarfile`'s own extraction has been escaped (CVE-2025-4517)."""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from posixpath import dirname, normpath
from typing import IO, Final, cast

import zstandard

from composer._fs import host_errors
from composer.errors import IntegrityError

_ZSTD: Final = b"\x28\xb5\x2f\xfd"
_XZ: Final = b"\xfd7zXZ\x00"
_MEMBERS: Final = 100_000
_BYTES: Final = 2 << 30


def unpack(archive: Path, folder: Path, *, members: int = _MEMBERS, size: int = _BYTES) -> None:
    """Write the regular files, folders and inner links of a .tar.gz, .tar.xz or .tar.zst below `folder`, which is made.

    Links are made last, so no member is written through one. Raises IntegrityError for a member that is absolute,
    leaves `folder`, is of another kind or comes twice, for more than `members` members or `size` bytes (100,000 and
    2 GiB), and for a damaged archive.
    """
    with host_errors(folder):
        folder.mkdir(parents=True)
    links: dict[str, str] = {}
    left = size
    try:
        with _stream(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for index, member in enumerate(tar):
                left -= member.size
                if index >= members or left < 0:
                    raise _refused(archive, member.name, f"more than {members:,} members or {size >> 30} GiB")
                _write(archive, tar, member, folder, links)
    except (tarfile.TarError, zstandard.ZstdError, zlib.error, lzma.LZMAError, EOFError, gzip.BadGzipFile) as fault:
        raise IntegrityError("damaged archive", where=str(archive), why=str(fault)) from fault
    for path in links:
        if any(parent.as_posix() in links for parent in PurePosixPath(path).parents):
            raise _refused(archive, path, "below a symbolic link")
    for path, target in links.items():
        _link(folder / path, target)
    for path in links:
        # Each target is inside by its text; through other links it may still not be.
        if not (folder / path).resolve().is_relative_to(folder.resolve()):
            raise _refused(archive, path, "outside the archive's folder")


def _write(archive: Path, tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, links: dict[str, str]) -> None:
    path = _checked(archive, member.name)
    if member.isdir():
        with host_errors(folder / path):
            (folder / path).mkdir(parents=True, exist_ok=True)
    elif member.issym():
        _checked(archive, f"{dirname(path)}/{member.linkname}" if dirname(path) else member.linkname)
        links[path] = member.linkname
    elif member.isreg():
        data = tar.extractfile(member)
        assert data is not None
        _file(folder / path, data, executable=bool(member.mode & 0o100))
    else:
        raise _refused(archive, member.name, "neither a file, a folder nor a symbolic link")


def _checked(archive: Path, name: str) -> str:
    path = normpath(name)
    if name.startswith("/") or path == ".." or path.startswith("../") or "\0" in name or "\\" in name:
        raise _refused(archive, name, "outside the archive's folder")
    return path


def _refused(archive: Path, name: str, why: str) -> IntegrityError:
    return IntegrityError(f"member {name!r} is refused", where=str(archive), why=why)


def _file(path: Path, data: IO[bytes], *, executable: bool) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with host_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, flags, 0o755 if executable else 0o644)
        except FileExistsError as fault:
            raise IntegrityError("two members have one path", where=str(path)) from fault
        with os.fdopen(handle, "wb") as stream:
            shutil.copyfileobj(data, stream, 1 << 20)


def _link(path: Path, target: str) -> None:
    with host_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.symlink_to(target)
        except FileExistsError as fault:
            raise IntegrityError("two members have one path", where=str(path)) from fault


@contextmanager
def _stream(archive: Path) -> Iterator[IO[bytes]]:
    with host_errors(archive):
        raw = archive.open("rb")
    with raw:
        magic = raw.read(6)
        raw.seek(0)
        if magic == _XZ:
            with lzma.open(raw) as unpacked:
                yield cast(IO[bytes], unpacked)
        elif magic.startswith(_ZSTD):
            with zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as plain:
                yield plain
        else:
            with gzip.open(raw) as unzipped:
                yield cast(IO[bytes], unzipped)
