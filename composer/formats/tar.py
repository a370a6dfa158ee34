"""Tar members as bytes: deterministic headers for regular files and links, and a strict reader of such segments.

A *segment* is a run of members without the end-of-archive blocks: segments can be concatenated (POSIX.1-2017 pax).
Owner, group and times are constants, so equal files give equal bytes on every machine.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from typing import IO, Self, cast

from composer.errors import VerifyError

BLOCK = 512
#: Two zero blocks end an archive.
END_OF_ARCHIVE = bytes(2 * BLOCK)
#: The first moment ZIP can express. GNU tar calls 1970 implausibly old.
DEFAULT_MTIME = 315_532_800


def file_header(path: str, *, size: int, mode: int, mtime: int) -> bytes:
    """Header blocks of a regular file of `size` bytes; its content and `padding(size)` follow."""
    return _header(path, tarfile.REGTYPE, mode=mode, mtime=mtime, size=size)


def link_header(path: str, *, target: str, mtime: int) -> bytes:
    """Header blocks of a symbolic link, which has no content."""
    return _header(path, tarfile.SYMTYPE, mode=0o777, mtime=mtime, target=target)


def padding(size: int) -> bytes:
    """Zeros that fill the last block of a member of `size` bytes."""
    return bytes(-size % BLOCK)


def _header(path: str, kind: bytes, *, mode: int, mtime: int, size: int = 0, target: str = "") -> bytes:
    info = tarfile.TarInfo(path)
    info.type, info.mode, info.mtime, info.size, info.linkname = kind, mode, mtime, size, target
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


def read_members(stream: IO[bytes], where: str) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
    """(member, content) of every member of a segment or archive, in order, each checked before it is given out.

    content is None for links. VerifyError for a path that leaves the prefix, a link that does, any other member type
    and a truncated or corrupt stream. Nothing is extracted here: `tarfile`'s own extraction is not safe on every
    supported Python (CVE-2025-4517).
    """
    try:
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_StrictInfo) as archive:
            for info in archive:
                _check_member(info, where)
                content = archive.extractfile(info) if info.isreg() else None
                yield info, cast("IO[bytes]", _Content(content, where)) if content else None
    except _FAULTS as fault:
        raise _unreadable(where, fault) from fault


class _StrictInfo(tarfile.TarInfo):
    """A header that must be sound: `tarfile` takes a damaged one after the first member for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """The member of one header block; ReadError for a damaged one."""
        try:
            return super().frombuf(buf, encoding, errors)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as fault:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(fault)) from fault


_FAULTS = (tarfile.TarError, EOFError, ValueError, UnicodeError)


def _unreadable(where: str, fault: Exception) -> VerifyError:
    return VerifyError("not a readable tar stream", where=where, why=str(fault),
                       fix="Copy the bundle again and compare its .sha256.")  # fmt: skip


class _Content(io.RawIOBase):
    """The bytes of one member; what ends too early is a VerifyError here as well."""

    def __init__(self, content: IO[bytes], where: str) -> None:
        self._content = content
        self._where = where

    def readable(self) -> bool:
        """Always."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, none at the end."""
        try:
            return self._content.read(size)
        except _FAULTS as fault:
            raise _unreadable(self._where, fault) from fault


def _check_member(info: tarfile.TarInfo, where: str) -> None:
    fault = None
    if not is_inside(info.name):
        fault = "path leaves the prefix"
    elif info.issym():
        if info.linkname.startswith("/") or not is_inside(f"{info.name}/../{info.linkname}", resolve=True):
            fault = f"link to {info.linkname!r} leaves the prefix"
    elif not info.isreg() or info.issparse():
        fault = f"member type {info.type!r} is neither a plain file nor a link"
    elif info.mode & 0o7000:
        fault = f"mode {info.mode:o} has a set-id or sticky bit"
    if fault:
        raise VerifyError(fault, where=f"{where}: {info.name!r}", fix="Do not unpack this archive.")


def is_inside(path: str, *, resolve: bool = False) -> bool:
    """Whether a relative POSIX path stays below its root; with `resolve`, `..` may go up as long as it stays inside."""
    if not path or path.startswith("/") or "\0" in path or "\n" in path:
        return False
    depth = 0
    for part in path.split("/"):
        if part == "..":
            depth -= 1
            if not resolve or depth < 0:
                return False
        elif part not in ("", "."):
            depth += 1
    return True
