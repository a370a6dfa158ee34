"""Read an ELF object that streams by, without holding it: its structures are a few parts of a file of up to gigabytes.

Kept are the head, where linkers put the tables that the loader reads; the dynamic section, whose place the head tells;
and the tail, to which tools that rewrite objects move what has grown (cuDNN's and cuSPARSE's strings are there). Where
a structure lies elsewhere the caller has to keep more.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from composer.errors import ElfError
from composer.formats.elf import Elf, dynamic_range, read_elf

#: Bytes from the start that are worth keeping: first for nearly every object, then for one with as many symbols as
#: libtorch_cpu, whose names alone are 31 MB.
HEADS = (4 << 20, 64 << 20)
TAIL = 4 << 20
_PROGRAM_HEADERS = 1 << 16


class NotKeptError(Exception):
    """A structure lies in a part of the object that was not kept."""


class ElfStream:
    """Takes the bytes of one object in order and then tells what the loader would read of it."""

    def __init__(self, size: int, where: str, head: int = HEADS[0]) -> None:
        self._size = size
        self._most = head
        self._where = where
        self._seen = 0
        self._head = bytearray()
        self._dynamic = _Range()
        self._tail = _Range(max(0, size - TAIL), size)

    def feed(self, chunk: bytes | memoryview) -> None:
        """The next bytes."""
        start, end = self._seen, self._seen + len(chunk)
        if start < self._most:
            self._head += chunk[: self._most - start]
            if start < _PROGRAM_HEADERS <= end:
                self._dynamic = self._find_dynamic()
        for kept in (self._dynamic, self._tail):
            kept.feed(start, chunk)
        self._seen = end

    @property
    def complete(self) -> bool:
        """Whether all bytes went by."""
        return self._seen == self._size

    def read(self) -> Elf:
        """Raises ElfError as `read_elf` does, and NotKeptError when the whole file is needed."""
        return read_elf(self, self._where)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, wanted: slice) -> bytes:
        start, end = wanted.start, min(wanted.stop, self._size)
        if end <= len(self._head) or start >= self._size:
            return bytes(self._head[start:end])
        for kept in (self._dynamic, self._tail):
            if kept.start <= start and end <= kept.start + len(kept.data):
                return bytes(kept.data[start - kept.start : end - kept.start])
        raise NotKeptError

    def _find_dynamic(self) -> _Range:
        """The dynamic section; nothing where the head does not tell."""
        try:
            return _Range(*dynamic_range(self, self._where))
        except (ElfError, NotKeptError):
            return _Range()


@dataclass(slots=True)
class _Range:
    """Bytes of a file from `start` to `end`, as far as they went by."""

    start: int = 0
    end: int = 0
    data: bytearray = field(default_factory=bytearray)

    def feed(self, offset: int, chunk: bytes | memoryview) -> None:
        first, last = max(offset, self.start), min(offset + len(chunk), self.end)
        if first < last:
            self.data += chunk[first - offset : last - offset]
