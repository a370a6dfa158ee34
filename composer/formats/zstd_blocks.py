"""Where the blocks of zstd frames are (RFC 8878, section 3.1), without decompressing them.

A block's compressed bytes depend on its plain bytes and on those before it in its frame. So two frames that begin alike
have equal blocks up to the first difference, and often again after it, when nothing was inserted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from typing_extensions import Buffer

_MAGIC = 0xFD2FB528
_SKIPPABLE = range(0x184D2A50, 0x184D2A60)
_DICTIONARY_ID = (0, 1, 2, 4)
_CONTENT_SIZE = (0, 2, 4, 8)
_CHECKSUM = 4
_RLE, _RESERVED = 1, 3


class Readable(Protocol):
    """Bytes that can be sliced, in memory or mapped from a file."""

    def __getitem__(self, where: slice, /) -> Buffer: ...


def blocks(data: Readable, begin: int, end: int) -> Iterator[int]:
    """Where each block ends of the frames in `data[begin:end]`; a frame's header goes with its first block.

    A skippable frame counts as one block, and so does all that follows from where the bytes are no whole frame: the
    last end is `end`, unless there is nothing.
    """
    while begin < end:
        ends = _frame(data, begin, end) or [end]
        yield from ends
        begin = ends[-1]


def _frame(data: Readable, begin: int, end: int) -> list[int]:
    """The ends of the blocks of one frame; empty when it is not whole."""
    magic = _number(data, begin, 4)
    if magic in _SKIPPABLE:
        after = begin + 8 + _number(data, begin + 4, 4)
        return [after] if after <= end else []
    if magic != _MAGIC:
        return []
    descriptor = _number(data, begin + 4, 1)
    at, ends, last = begin + _header_size(descriptor), [], False
    while not last:
        header = _number(data, at, 3)
        last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
        at += 3 + (1 if kind == _RLE else size)
        if kind == _RESERVED or at > end:
            return []
        ends.append(at)
    if descriptor & 4:
        ends[-1] += _CHECKSUM
    return ends if ends[-1] <= end else []


def _header_size(descriptor: int) -> int:
    """Bytes before the first block, by the byte that describes the frame."""
    single = descriptor >> 5 & 1
    content_size = _CONTENT_SIZE[descriptor >> 6] or single
    return 4 + 1 + (1 - single) + _DICTIONARY_ID[descriptor & 3] + content_size


def _number(data: Readable, at: int, size: int) -> int:
    return int.from_bytes(bytes(data[at : at + size]), "little")
