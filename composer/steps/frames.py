"""Read the frames of a bundle one by one, in any order and by many threads, every byte checked."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import threading
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, cast

import zstandard

from composer.errors import VerifyError
from composer.formats.segment import Member, members, padded_end
from composer.model.layer import Layer
from composer.steps.bundle import Bundle

if TYPE_CHECKING:
    from hashlib import _Hash

_FIX = "Copy the bundle again and compare its .sha256."
# Plain bytes at a time: few enough to stay in a core's cache on their way to a file.
_CHUNK = 1 << 20
_threads = threading.local()


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One frame: its compressed bytes in the bundle, and its plain ones in the tar stream of its layer.

    members: those whose header or content it has a part of. rank: how far into its layer it is, from 0 to 1.
    digest: the sha256 of its compressed bytes, where the manifest has one for it alone.
    """

    layer: str
    offset: int
    compressed: int
    begin: int
    end: int
    members: Sequence[Member]
    rank: float
    digest: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Compressed bytes of several frames, and the sha256 that the manifest has for them together."""

    layer: str
    offset: int
    compressed: int
    digest: str


def frames_of(bundle: Bundle) -> Iterator[Frame]:
    """Every frame of every layer. VerifyError where their sizes are not those of the files that the manifest lists."""
    for layer, offset in zip(bundle.manifest.layers, bundle.offsets, strict=True):
        yield from _frames(layer, offset, bundle.path.name)


def spans_of(bundle: Bundle) -> Iterator[Span]:
    """Every run of frames that has one digest together."""
    for layer, offset in zip(bundle.manifest.layers, bundle.offsets, strict=True):
        offsets = itertools.accumulate((part.compressed for part in layer.parts), initial=offset)
        for part, begin in zip(layer.parts, offsets, strict=False):
            if len(part.frames) > 1:
                yield Span(layer=layer.name, offset=begin, compressed=part.compressed, digest=part.digest)


def _frames(layer: Layer, offset: int, where: str) -> Iterator[Frame]:
    held = list(members(layer.entries))
    headers = [member.header for member in held]
    count, first, begin = len(layer.frames), 0, 0
    digests = (part.digest if len(part.frames) == 1 else None for part in layer.parts for _ in part.frames)
    for index, (frame, digest) in enumerate(zip(layer.frames, digests, strict=True)):
        end = begin + frame.size
        last = bisect_left(headers, end, first)
        yield Frame(layer=layer.name, offset=offset, compressed=frame.compressed, begin=begin, end=end,
                    members=held[first:last], rank=(index + 0.5) / count, digest=digest)  # fmt: skip
        first = last - 1 if last > first and held[last - 1].end > end else last
        offset, begin = offset + frame.compressed, end
    if begin != (padded_end(held[-1]) if held else 0):
        raise VerifyError("its frames are not as long as the files that the manifest lists",
                          where=f"{where}: {layer.name}", fix=_FIX)  # fmt: skip


def check_span(handle: int, span: Span, where: str) -> None:
    """VerifyError unless these bytes of an open bundle have their digest."""
    source = _Compressed(handle, span.offset, span.compressed)
    while source.read(_CHUNK):
        pass
    _compare(source.digest, span.digest, f"{where}: {span.layer}")


class Plain:
    """The plain bytes of one frame of an open bundle, front to back. VerifyError for damage, wherever it is noticed.

    A thread may have one of these at a time.
    """

    def __init__(self, handle: int, frame: Frame, where: str) -> None:
        if not hasattr(_threads, "decompressor"):
            _threads.decompressor, _threads.buffer = zstandard.ZstdDecompressor(), bytearray(_CHUNK)
        self._source = _Compressed(handle, frame.offset, frame.compressed)
        self._stream = _threads.decompressor.stream_reader(
            cast("IO[bytes]", self._source), read_size=_CHUNK, read_across_frames=True
        )
        self._buffer = memoryview(_threads.buffer)
        self._ready = self._buffer[:0]
        self._frame = frame
        self._where = f"{where}: {frame.layer}"
        self.position = frame.begin

    def take(self, most: int) -> memoryview:
        """The next bytes, at least one and at most `most`; they are valid until the next call."""
        if not self._ready:
            self._fill()
        taken, self._ready = self._ready[:most], self._ready[most:]
        self.position += len(taken)
        return taken

    def skip_to(self, position: int) -> None:
        """Pass over what comes before `position` in the layer's tar stream."""
        while self.position < position:
            self.take(position - self.position)

    def finish(self) -> None:
        """Read to the end, and compare what can only be compared there."""
        self.skip_to(self._frame.end)
        if self._ready or self._read():
            raise self._damaged("more bytes than its seek table says")
        if self._frame.digest:
            _compare(self._source.digest, self._frame.digest, self._where)

    def _fill(self) -> None:
        self._ready = self._buffer[: self._read()]
        if not self._ready:
            raise self._damaged("fewer bytes than its seek table says")

    def _read(self) -> int:
        try:
            return cast("int", self._stream.readinto(self._buffer))
        except zstandard.ZstdError as fault:
            raise self._damaged(str(fault)) from fault

    def _damaged(self, why: str) -> VerifyError:
        return VerifyError("damaged compressed data", where=self._where, why=why, fix=_FIX)


class _Compressed(io.RawIOBase):
    """A range of a file that others read, too, as a stream; `digest` is over what was read."""

    def __init__(self, handle: int, offset: int, size: int) -> None:
        self._handle, self._offset, self._end = handle, offset, offset + size
        self.digest: _Hash = hashlib.sha256()

    def readable(self) -> bool:
        """Always."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, none at the end."""
        left = self._end - self._offset
        data = os.pread(self._handle, left if size < 0 else min(size, left), self._offset)
        self._offset += len(data)
        self.digest.update(data)
        return data


def _compare(digest: _Hash, expected: str, where: str) -> None:
    if digest.hexdigest() != expected:
        raise VerifyError("its compressed bytes do not have the manifest's digest", where=where,
                          why=f"expected sha256 {expected}, got {digest.hexdigest()}", fix=_FIX)  # fmt: skip
