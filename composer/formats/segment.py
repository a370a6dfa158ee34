"""Where the files of a layer lie in its tar stream, computed from its manifest: so any frame can be read on its own.

A tar archive has no index, but equal entries give equal headers (`formats.tar`), so the manifest's entries say where
every byte is. Each header is compared with its entry all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from composer.formats import tar
from composer.model.layer import Entry

# The fields of a header block (POSIX.1-2017, ustar): name, mode, owner, group, size; then type and link's target.
_NAME, _OCTAL_SIZE = 100, 8**11
_FIRST, _SECOND = slice(0, 136), slice(156, 257)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """An entry, and where its content is in the plain tar stream: from `start` to `end`, after its header."""

    entry: Entry
    start: int

    @property
    def header(self) -> int:
        """Where its header block begins."""
        return self.start - tar.BLOCK

    @property
    def end(self) -> int:
        """Where its content ends and padding begins."""
        return self.start + self.entry.size


def members(entries: Iterable[Entry]) -> Iterator[Member]:
    """The members of a segment that holds exactly these entries, in order."""
    position = 0
    for entry in entries:
        member = Member(entry=entry, start=position + _header_size(entry))
        yield member
        position = padded_end(member)


def padded_end(member: Member) -> int:
    """Where the next member begins."""
    return member.end + len(tar.padding(member.entry.size))


def _header_size(entry: Entry) -> int:
    """One block; a pax header before it takes more, for what does not fit into the fields."""
    target = entry.target or ""
    if _fits(entry.path) and _fits(target) and entry.size < _OCTAL_SIZE:
        return tar.BLOCK
    if entry.target is not None:
        return len(tar.link_header(entry.path, target=target, mtime=0))
    return len(tar.file_header(entry.path, size=entry.size, mode=entry.mode, mtime=0))


def _fits(text: str) -> bool:
    return text.isascii() and len(text) <= _NAME


def is_header(block: bytes, entry: Entry) -> bool:
    """Whether a member's header block is that of this entry. Its time and checksum are not looked at."""
    name, target = (text.encode("ascii", "replace")[:_NAME] for text in (entry.path, entry.target or ""))
    size = entry.size if entry.size < _OCTAL_SIZE else 0
    first = b"%b%07o\0%07o\0%07o\0%011o\0" % (name.ljust(_NAME, b"\0"), entry.mode, 0, 0, size)
    second = (b"0" if entry.target is None else b"2") + target.ljust(_NAME, b"\0")
    return block[_FIRST] == first and block[_SECOND] == second
