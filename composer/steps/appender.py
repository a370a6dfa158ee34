"""Append pieces of files to a new file: other threads read ahead, hash and write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import IO, TYPE_CHECKING, Self

from composer._direct import DirectWriter

if TYPE_CHECKING:
    from hashlib import _Hash


class Appender:
    """Appends to an open, empty file, past the page cache where it can; `progress` is told the bytes so far.

    OSError as of write(2) comes from whichever call follows it.
    """

    def __init__(self, out: IO[bytes], progress: Callable[[int], None]) -> None:
        self._out = DirectWriter(out.fileno())
        self._progress = progress
        self._done = 0
        # One reads ahead; two hashes at most take their turns at each piece.
        self._pool = ThreadPoolExecutor(3)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        self._out.close()

    def append(self, pieces: Iterator[memoryview], hashes: Sequence[_Hash] = ()) -> None:
        """Append all pieces and add them to `hashes`. Each piece must stay as it is while the next one is made."""
        for piece in self._ahead(pieces):
            pending = [self._pool.submit(one.update, piece) for one in hashes]
            try:
                self._out.write(piece)
            finally:
                # Also on ^C and a full disk: the threads read the piece, which is not theirs.
                wait(pending)
            self._done += len(piece)
            self._progress(self._done)

    def finish(self) -> None:
        """Write the last bytes, which fill no block."""
        self._out.finish()

    def _ahead(self, pieces: Iterator[memoryview]) -> Iterator[memoryview]:
        """The pieces; while one is worked on, the next is read."""
        following = self._pool.submit(next, pieces, None)
        while (piece := following.result()) is not None:
            following = self._pool.submit(next, pieces, None)
            yield piece
