"""Read bundles: the manifest without unpacking, and the files of one layer or all, checked on their way."""

from __future__ import annotations

import io
import itertools
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import zstandard

from composer.errors import VerifyError
from composer.formats import tar
from composer.formats.seekable import FOOTER_SIZE, Frame, parse_seek_table, seek_table_size
from composer.model.layer import Entry, Layer
from composer.model.manifest import MANIFEST_PATH, Manifest, parse_manifest

_FIX = "Copy the bundle again and compare its .sha256."
#: The manifest of a real stack is 6 MB; a limit keeps a hostile one from filling memory.
_MAX_MANIFEST = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """An open description of a bundle file: what its manifest says and where each layer's bytes are."""

    path: Path
    manifest: Manifest
    manifest_json: bytes
    offsets: tuple[int, ...]

    def entries(self, index: int) -> Iterator[tuple[Entry, IO[bytes] | None]]:
        """(what the manifest says, content) of every member of a layer, in order; content is None for links.

        VerifyError when the members are not exactly those that the manifest lists. The content is not hashed here.
        """
        layer = self.manifest.layers[index]
        with self.path.open("rb") as handle:
            handle.seek(self.offsets[index])
            where = f"{self.path.name}: {layer.name}"
            yield from _matched(layer, cast("IO[bytes]", _Plain(handle, layer.compressed, where)), where)


def open_bundle(path: Path) -> Bundle:
    """Read the seek table and the manifest. VerifyError for anything that is not a whole bundle."""
    try:
        with path.open("rb") as handle:
            return _open(path, handle)
    except OSError as fault:
        raise VerifyError(fault.strerror or "cannot be read", where=str(path)) from fault


def _open(path: Path, handle: IO[bytes]) -> Bundle:
    where = path.name
    size = handle.seek(0, io.SEEK_END)
    handle.seek(max(0, size - FOOTER_SIZE))
    table_size = seek_table_size(handle.read(), where)
    handle.seek(max(0, size - table_size))
    frames = parse_seek_table(handle.read(), where)
    if sum(frame.compressed for frame in frames) + table_size != size or len(frames) < 2:
        raise VerifyError("its size does not match its seek table", where=where, fix=_FIX)
    starts = [0, *itertools.accumulate(frame.compressed for frame in frames)]
    handle.seek(starts[-3])
    data = _manifest(handle.read(frames[-2].compressed), frames[-2], where)
    manifest = parse_manifest(data, where)
    return Bundle(path=path, manifest=manifest, manifest_json=data, offsets=_offsets(manifest, frames, where))


def _manifest(packed: bytes, frame: Frame, where: str) -> bytes:
    if frame.size > _MAX_MANIFEST:
        raise VerifyError("the manifest is too large", where=where, fix=_FIX)
    try:
        plain = zstandard.ZstdDecompressor().decompress(packed, max_output_size=frame.size)
    except zstandard.ZstdError as fault:
        raise VerifyError("the manifest is damaged", where=where, why=str(fault), fix=_FIX) from fault
    for info, content in tar.read_members(io.BytesIO(plain), where):
        if info.name == MANIFEST_PATH and content is not None:
            return content.read()
    raise VerifyError("holds no manifest where it should be", where=where, fix=_FIX)


def _offsets(manifest: Manifest, frames: tuple[Frame, ...], where: str) -> tuple[int, ...]:
    listed = [frame for layer in manifest.layers for frame in layer.frames]
    if tuple(listed) != frames[:-2]:
        raise VerifyError("its seek table is not that of its manifest", where=where, fix=_FIX)
    return tuple(itertools.accumulate((layer.compressed for layer in manifest.layers), initial=0))[:-1]


def _matched(layer: Layer, stream: IO[bytes], where: str) -> Iterator[tuple[Entry, IO[bytes] | None]]:
    members = tar.read_members(stream, where)
    for entry, found in itertools.zip_longest(layer.entries, members):
        info, content = found or (None, None)
        if entry is None or info is None or not _agrees(entry, info):
            name = info.name if info else entry.path
            raise VerifyError("is not as the manifest lists it", where=f"{where}: {name}", fix=_FIX)
        yield entry, content


def _agrees(entry: Entry, info: tarfile.TarInfo) -> bool:
    return (entry.path, entry.size, entry.mode, entry.target or "") == (
        info.name, info.size, info.mode, info.linkname,
    )  # fmt: skip


class _Plain(io.RawIOBase):
    """The decompressed bytes of the next `compressed` bytes of a file; VerifyError where they are damaged."""

    def __init__(self, handle: IO[bytes], compressed: int, where: str) -> None:
        self._frames = _Window(handle, compressed)
        self._plain = zstandard.ZstdDecompressor().stream_reader(
            cast("IO[bytes]", self._frames), read_size=1 << 20, read_across_frames=True
        )
        self._where = where

    def readable(self) -> bool:
        """Always."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, none at the end."""
        try:
            return self._plain.read(size)
        except zstandard.ZstdError as fault:
            raise VerifyError("damaged compressed data", where=self._where, why=str(fault), fix=_FIX) from fault


class _Window(io.RawIOBase):
    """The next `size` bytes of a file, as a file."""

    def __init__(self, handle: IO[bytes], size: int) -> None:
        self._handle = handle
        self._left = size

    def readable(self) -> bool:
        """Always."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, none at the end."""
        data = self._handle.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        return data
