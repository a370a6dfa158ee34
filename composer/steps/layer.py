"""Write layers: files stream into a tar segment in zstd frames, never to disk unpacked; each is hashed on its way.

A large unedited file becomes a *blob*: frames of its own, kept in the store by the digest of its content. All layers
that hold the file share them, so a changed recipe, another target or another version compresses it no second time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import IO, TYPE_CHECKING

import zstandard

from composer._fs import host_errors
from composer.errors import WheelError
from composer.formats import tar
from composer.formats.seekable import Frame
from composer.model.layer import Changes, Entry, Layer, Part
from composer.store import Store, key_of

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: Bytes of tar stream per zstd frame. Frames are what unpacking does in parallel.
FRAME = 64 << 20
#: Bytes from which an unedited file is a blob: 200 files of the SGLang stack, which are 93 % of its bytes.
BLOB = 8 << 20
#: What the compressed bytes of a layer or blob are called in the store, after their key.
SUFFIX = ".zst"
# Measured at level 3 with 64 MiB frames: matches over all of a frame take libcusparseLt from 259 to 188 MB, cuDNN's
# engines from 307 to 293 MB and libcublasLt from 443 to 419 MB, at no more CPU time; shorter ones gain nothing.
_WINDOW_LOG = 26
_SHORTEST_LONG_MATCH = 32
_BLOB_VERSION = 2

Progress = Callable[[int], None]


def compressor(level: int) -> zstandard.ZstdCompressor:
    """The compressor of a level. It finds long matches in a whole frame, whose window stock decoders accept."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level, enable_ldm=True, window_log=_WINDOW_LOG, ldm_min_match=_SHORTEST_LONG_MATCH, write_checksum=True
    )
    return zstandard.ZstdCompressor(compression_params=parameters)


class _FrameWriter:
    """Bytes in, frames out. A frame ends every FRAME bytes, so the output does not depend on how they come."""

    def __init__(self, out: IO[bytes], level: int) -> None:
        self._out = out
        self._compressor = compressor(level)
        self._begin_part()

    def write(self, data: Buffer) -> None:
        view = memoryview(data)
        while len(view) > FRAME - self._plain:
            room = FRAME - self._plain
            self._feed(view[:room])
            self._end_frame()
            view = view[room:]
        self._feed(view)

    def end_part(self, blob: str | None = None) -> Part | None:
        """End the current frame and describe what was written since the last part; None for nothing."""
        self._end_frame()
        part = Part(digest=self._digest.hexdigest(), frames=self._frames, blob=blob) if self._frames else None
        self._begin_part()
        return part

    def _begin_part(self) -> None:
        self._digest = hashlib.sha256()
        self._frames: list[Frame] = []
        self._begin_frame()

    def _begin_frame(self) -> None:
        self._stream = self._compressor.compressobj()
        self._compressed = self._plain = 0

    def _feed(self, view: memoryview) -> None:
        if view:
            self._emit(self._stream.compress(view))
            self._plain += len(view)

    def _end_frame(self) -> None:
        if self._plain:
            self._emit(self._stream.flush())
            self._frames.append(Frame(self._compressed, self._plain))
            self._begin_frame()

    def _emit(self, data: bytes) -> None:
        if data:
            self._digest.update(data)
            self._out.write(data)
            self._compressed += len(data)


class LayerWriter:
    """Files in, a layer out."""

    def __init__(self, store: Store, out: IO[bytes], *, level: int, mtime: int, progress: Progress) -> None:
        self.entries: list[Entry] = []
        self._store = store
        self._frames = _FrameWriter(out, level)
        self._parts: list[Part] = []
        self._level = level
        self._mtime = mtime
        self._progress = progress

    def file(self, path: str, content: Iterable[Buffer], *, size: int, mode: int = 0o644,
             expected: str | None = None, original: str | None = None) -> None:  # fmt: skip
        """Append a regular file of exactly `size` bytes.

        expected: the sha256 it must have (WheelError). original: sha256 of the upstream file, when it was edited.
        """
        self._frames.write(tar.file_header(path, size=size, mode=mode, mtime=self._mtime))
        if expected and size >= BLOB:
            self._end_part()
            part = stored_blob(self._store, expected, lambda: content, size, self._level, self._progress)
            self._parts.append(part)
            digest = expected
        else:
            digest = _pour(content, size, self._frames.write, path, expected, self._progress)
        self.entries.append(Entry(path=path, mode=mode, size=size, sha256=digest, original=original))

    def data(self, path: str, content: bytes, *, mode: int = 0o644, original: str | None = None) -> None:
        """Append a file whose content is at hand."""
        self.file(path, (content,), size=len(content), mode=mode, original=original)

    def link(self, path: str, target: str) -> None:
        """Append a symbolic link."""
        self._frames.write(tar.link_header(path, target=target, mtime=self._mtime))
        self.entries.append(Entry(path=path, mode=0o777, target=target))

    def finish(self, *, name: str, version: str, artifact: str | None = None, changes: Changes | None = None) -> Layer:
        """End the last part and describe the layer."""
        self._end_part()
        return Layer(name=name, version=version, artifact=artifact, changes=changes or Changes(),
                     entries=self.entries, parts=self._parts)  # fmt: skip

    def _end_part(self) -> None:
        if part := self._frames.end_part():
            self._parts.append(part)


def _pour(content: Iterable[Buffer], size: int, sink: Callable[[Buffer], None], where: str, expected: str | None,
          progress: Progress) -> str:  # fmt: skip
    """Pass `content` and its tar padding to `sink`; returns its sha256. WheelError for another size or digest."""
    digest, written = hashlib.sha256(), 0
    for chunk in content:
        digest.update(chunk)
        sink(chunk)
        length = memoryview(chunk).nbytes
        written += length
        progress(length)
    if written != size:
        raise WheelError(f"{written} bytes instead of {size}", where=where)
    if expected not in (None, digest.hexdigest()):
        raise WheelError("content does not have the digest in RECORD", where=where,
                         why=f"expected sha256 {expected}, got {digest.hexdigest()}")  # fmt: skip
    sink(tar.padding(size))
    return digest.hexdigest()


def _unheard(_count: int) -> None:
    """Progress that nobody follows."""


def stored_blob(store: Store, sha256: str, content: Callable[[], Iterable[Buffer]], size: int, level: int,
                progress: Progress = _unheard) -> Part:  # fmt: skip
    """The frames of a file with this digest: from the store, or compressed from `content` and kept there."""
    key = key_of("blob", _BLOB_VERSION, sha256=sha256, level=level, zstd=list(zstandard.ZSTD_VERSION))
    with store.lock(f"blob-{key}"):
        part = store.load("blob", key, Part)
        if part and _is_whole(store, "blob", key, part.compressed):
            progress(size)
            return part
        with store.writing("blob", key, SUFFIX) as path, host_errors(path), path.open("wb", buffering=1 << 20) as out:
            frames = _FrameWriter(out, level)
            _pour(content(), size, frames.write, f"content {sha256[:12]}", sha256, progress)
            part = frames.end_part(key)
            assert part is not None
        store.save("blob", key, part)
    return part


def stored_layer(store: Store, key: str, fill: Callable[[LayerWriter], Layer], *, level: int, mtime: int,
                 progress: Progress = _unheard) -> Layer:  # fmt: skip
    """The layer with this key: from the store, or made by `fill` and kept there. HostError when the disk is full.

    The compressed bytes are put in place before the value that describes them, so a value vouches for both.
    """
    with store.lock(f"layer-{key}"):
        if layer := find_layer(store, key):
            return layer
        with store.writing("layer", key, SUFFIX) as path, host_errors(path), path.open("wb", buffering=1 << 20) as out:
            layer = fill(LayerWriter(store, out, level=level, mtime=mtime, progress=progress))
        store.save("layer", key, layer)
    return layer


def find_layer(store: Store, key: str) -> Layer | None:
    """The layer if the store has it whole. Its bytes are only compared with their digests when they are copied."""
    layer = store.load("layer", key, Layer)
    if layer is None:
        return None
    own = sum(part.compressed for part in layer.parts if part.blob is None)
    whole = _is_whole(store, "layer", key, own) and all(
        _is_whole(store, "blob", part.blob, part.compressed) for part in layer.parts if part.blob
    )
    return layer if whole else None


def _is_whole(store: Store, kind: str, key: str, size: int) -> bool:
    try:
        return store.path(kind, key, SUFFIX).stat().st_size == size
    except OSError:
        return False
