"""The files of a relocatable CPython prefix, as values: nothing is copied that need not be edited."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from composer._fs import host_errors

FILE_MODE = 0o644
PROGRAM_MODE = 0o755


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeEntry:
    """One file or symbolic link.

    path: relative to the prefix, `/` between parts. source: where a file's bytes are, or the bytes themselves.
    target: what a link holds. sha256: hexadecimal, of a file's bytes or a link's target. size: bytes, 0 for a link.
    """

    path: str
    mode: int
    kind: Literal["file", "symlink"]
    source: Path | bytes = b""
    target: str = ""
    sha256: str
    size: int

    def read(self) -> bytes:
        """A file's bytes. Raises HostError."""
        if isinstance(self.source, bytes):
            return self.source
        with host_errors(self.source):
            return self.source.read_bytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class InterpreterTree:
    """A whole prefix.

    version: of CPython, in full; minor: `3.12`; provider: `path`, `archive` or `host`; glibc_floor: the lowest glibc
    that its objects load on, such as `2.35`; digest: see `tree_digest`; warnings: sentences for the plan.
    """

    version: str
    minor: str
    provider: str
    glibc_floor: str
    digest: str
    entries: tuple[TreeEntry, ...]
    warnings: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.entries)


def file_entry(path: str, source: Path | bytes, *, mode: int = FILE_MODE) -> TreeEntry:
    """A file, hashed. Raises HostError where `source` cannot be read."""
    if isinstance(source, bytes):
        digest, size = hashlib.sha256(source).hexdigest(), len(source)
    else:
        with host_errors(source), source.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            size = stream.tell()
    return TreeEntry(path=path, mode=mode, kind="file", source=source, sha256=digest, size=size)


def link_entry(path: str, target: str) -> TreeEntry:
    """A symbolic link."""
    digest = hashlib.sha256(target.encode()).hexdigest()
    return TreeEntry(path=path, mode=0o777, kind="symlink", target=target, sha256=digest, size=0)


def tree_digest(entries: Iterable[TreeEntry]) -> str:
    """sha256 over (path, kind, mode, content digest) in order of path: no times, no owners, no place."""
    total = hashlib.sha256()
    for entry in sorted(entries, key=lambda entry: entry.path):
        total.update(f"{entry.path}\0{entry.kind}\0{entry.mode:o}\0{entry.sha256}\n".encode())
    return total.hexdigest()
