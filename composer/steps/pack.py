"""Join layers into a bundle: a copy of their compressed bytes, then the manifest, the end of the archive, a seek table.

Layout: the layers' frames in order, one frame with the manifest, one with the end-of-archive blocks, and a skippable
frame with the seek table. `tar --zstd -xf` reads it as one archive; `open_bundle` finds the manifest from the end.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec

from composer._direct import CHUNK, read_directly
from composer._fs import atomic_file, write_atomic
from composer.errors import HostError, IntegrityError, VerifyError
from composer.events import Event, Listener
from composer.formats import tar
from composer.formats.seekable import Frame, render_seek_table
from composer.model.layer import Layer
from composer.model.manifest import FINGERPRINT_PATH, MANIFEST_PATH, Manifest
from composer.proofs.floors import FLOORS_PATH, render_floors
from composer.steps.appender import Appender
from composer.steps.bundle import Bundle, open_bundle
from composer.steps.layer import SUFFIX, compressor
from composer.steps.survey import mapped
from composer.store import Store

_MANIFEST_LEVEL = 3
_CHECKSUM = re.compile(r"([0-9a-f]{64})  ([^\n]+)\n?")


def is_packed(output: Path, fingerprint: str) -> bool:
    """Whether `output` already is the bundle with this fingerprint, whole, beside its checksum file."""
    if not read_checksum(output):
        return False
    try:
        return open_bundle(output).manifest.fingerprint == fingerprint
    except VerifyError:
        return False


def checksum_path(output: Path) -> Path:
    """`NAME.tar.zst.sha256`, in the format of sha256sum."""
    return output.with_name(output.name + ".sha256")


def read_checksum(output: Path) -> str:
    """The sha256 that the checksum file of a bundle holds; nothing where there is no such file, or a damaged one."""
    try:
        text = checksum_path(output).read_text("ascii", "replace")
    except FileNotFoundError:
        return ""
    except OSError as fault:
        raise HostError(fault.strerror or str(fault), where=str(checksum_path(output))) from fault
    found = _CHECKSUM.fullmatch(text)
    return found[1] if found and found[2] == output.name else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A layer that can be copied. fresh: made by this very run, so its bytes need no second look."""

    key: str
    layer: Layer
    fresh: bool


def pack(store: Store, layers: Iterable[Ready], manifest_of: Callable[[list[Layer]], Manifest], output: Path, *,
         mtime: int, listener: Listener, accept: Callable[[Bundle], None]) -> tuple[str, Manifest]:  # fmt: skip
    """Write the bundle and its checksum file while layers become ready; returns the bundle's sha256 and its manifest.

    accept: is shown the whole bundle before it takes its place, and raises when it may not.
    IntegrityError for cached bytes that are not those of their digest: they are dropped from the store, so the next
    run makes them again.
    """
    done: list[Layer] = []
    with atomic_file(output) as out, _Copier(out, lambda count: listener(_progress(output, count))) as copier:
        for ready in layers:
            _copy_layer(store, ready.key, ready.layer, copier, check=not ready.fresh)
            done.append(ready.layer)
        manifest = manifest_of(done)
        frames = [frame for layer in done for frame in layer.frames]
        for plain in (_manifest_segment(manifest, mtime), tar.END_OF_ARCHIVE):
            packed = compressor(_MANIFEST_LEVEL).compress(plain)
            copier.write(packed)
            frames.append(Frame(len(packed), len(plain)))
        copier.write(render_seek_table(frames))
        digest = copier.finish()
        accept(open_bundle(Path(out.name)))
        # That of an older bundle, which is about to go. Without one this bundle is not taken for done.
        checksum_path(output).unlink(missing_ok=True)
    write_atomic(checksum_path(output), f"{digest}  {output.name}\n".encode())
    listener(Event(step="pack", subject=output.name, finished=True))
    return digest, manifest


def _copy_layer(store: Store, key: str, layer: Layer, copier: _Copier, *, check: bool) -> None:
    """Append the parts of a layer; its own ones follow each other in one file."""
    own = 0
    for part in layer.parts:
        path = store.path("blob", part.blob, SUFFIX) if part.blob else store.path("layer", key, SUFFIX)
        start = 0 if part.blob else own
        copier.copy(path, start, part.compressed, part.digest if check else None)
        if part.blob is None:
            own += part.compressed


def _progress(output: Path, done: int) -> Event:
    return Event(step="pack", subject=output.name, done=done)


def _manifest_segment(manifest: Manifest, mtime: int) -> bytes:
    """The manifest first, because `open_bundle` reads no further."""
    files = (
        (MANIFEST_PATH, msgspec.json.encode(manifest)), (FINGERPRINT_PATH, manifest.fingerprint.encode()),
        (FLOORS_PATH, render_floors(manifest.name, manifest.floors)),
    )  # fmt: skip
    return b"".join(
        tar.file_header(path, size=len(data), mode=0o644, mtime=mtime) + data + tar.padding(len(data))
        for path, data in files
    )


def _cached(path: Path, start: int, size: int) -> Iterator[memoryview]:
    with mapped(path) as view:
        whole = memoryview(view)
        for offset in range(start, start + size, CHUNK):
            yield whole[offset : min(offset + CHUNK, start + size)]


class _Copier:
    """Copies files into one, and hashes the whole and each part."""

    def __init__(self, out: IO[bytes], progress: Callable[[int], None]) -> None:
        self._appender = Appender(out, progress)
        self._whole = hashlib.sha256()

    def __enter__(self) -> _Copier:
        return self

    def __exit__(self, *_: object) -> None:
        self._appender.__exit__()

    def copy(self, path: Path, start: int, size: int, digest: str | None) -> None:
        """Append bytes of a file; IntegrityError, and the file is gone, when `digest` is given and not their sha256.

        Without a digest they were just written, so they are taken from the page cache.
        """
        part = hashlib.sha256()
        if not digest:
            self._appender.append(_cached(path, start, size), [self._whole])
            return
        self._appender.append(read_directly(path, start, size), [self._whole, part])
        if part.hexdigest() != digest:
            path.unlink(missing_ok=True)
            raise IntegrityError("cached bytes are damaged", where=str(path), why=f"their sha256 is not {digest}",
                                 fix="They were deleted from the store: run the same command again.")  # fmt: skip

    def write(self, data: bytes) -> None:
        """Append bytes at hand."""
        self._appender.append(iter([memoryview(data)]), [self._whole])

    def finish(self) -> str:
        """Write the last bytes; returns the sha256 of all."""
        self._appender.finish()
        return self._whole.hexdigest()
