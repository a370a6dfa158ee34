"""Pack a model into one archive for hosts without a network, and put such an archive into a bundle's folder.

The format is `composer.runtime.model.archive`'s. Its bytes are a function of the model's files alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import zstandard

from composer._fs import atomic_file, host_errors
from composer.errors import HostError, RecipeError, VerifyError
from composer.events import Event, Listener
from composer.formats import tar
from composer.model.manifest import FINGERPRINT_PATH
from composer.runtime.model.archive import HUB, Added, ArchiveError, cache_folder, repository
from composer.runtime.model.archive import add as add_stream
from composer.runtime.model.hub import main_revision
from composer.runtime.model.place import Place
from composer.runtime.model.snapshot import SUMS, blob_digest, faults, model_files

_CHUNK = 8 << 20
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
# Measured on normally distributed weights: BF16 shrinks to 78 % at level 1 (590 MB/s on a core) and at 3, FP8 to 82 %,
# F16 to 92 %, packed INT4 not at all.
_LEVEL = 1
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(?:/[A-Za-z0-9_][A-Za-z0-9._-]*)?\Z")
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model's folder. name: ORG/NAME; revision: its commit. Both are empty where the folder does not tell."""

    folder: Path
    name: str = ""
    revision: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A model bundle that was made. size: bytes of its files."""

    name: str
    revision: str
    files: int
    size: int


def find_model(asked: str, environ: Mapping[str, str]) -> Source:
    """A folder (a snapshot, a `models--ORG--NAME` of a cache, any other) or ORG/NAME[@REVISION] of the local cache.

    RecipeError for a name that cannot be meant, HostError for a model that is not here: nothing is downloaded.
    """
    folder = Path(asked).absolute()
    if folder.is_dir():
        return _in_folder(folder)
    name, _, revision = asked.partition("@")
    if not _NAME.match(name):
        raise RecipeError("is neither a folder nor a model's name", where=asked, fix="Give a folder, or ORG/NAME.")
    cache = Place(prefix=Path(), cache=None, environ=environ).hub_cache / cache_folder(name)
    found = cache / "snapshots" / (revision or main_revision(cache) or "absent")
    if not found.is_dir():
        raise HostError("is not in the Hugging Face cache", where=asked, why=f"there is no {found}",
                        fix=f"Run `hf download {name}{f' --revision {revision}' if revision else ''}`, where there is "
                            "a network, and copy its folder.")  # fmt: skip
    return Source(folder=found, name=name, revision=found.name)


def _in_folder(folder: Path) -> Source:
    if folder.name.startswith("models--"):
        revision = main_revision(folder)
        if not (folder / "snapshots" / revision).is_dir() or not revision:
            raise HostError("its refs/main leads to no snapshot", where=str(folder), fix="Give one of its snapshots.")
        folder = folder / "snapshots" / revision
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return Source(folder=folder, name=repository(folder.parent.parent.name), revision=folder.name)
    return Source(folder=folder)


def bundle_model(source: Source, output: Path, *, name: str, jobs: int, listener: Listener) -> Packed:
    """Check a model and write its archive: compressed when `output` ends in .zst.

    name: ORG/NAME, for a folder that does not tell; RecipeError without any. VerifyError for a model that is not whole,
    or that changes meanwhile; HostError for what cannot be read or written, or a folder that is not there.
    """
    if not output.parent.is_dir():
        raise HostError("there is no such folder", where=str(output.parent), fix="Make it, or name another with -o.")
    called = name or source.name
    if not _NAME.match(called):
        raise RecipeError("the model has no name" if not called else f"{called!r} is no name of a model",
                          where=str(source.folder), fix="Give one with --name ORG/NAME.")  # fmt: skip
    files = model_files(source.folder)
    files.pop(SUMS, None)
    with host_errors(source.folder):
        _require_whole(source.folder)
        sums = _digests(files, jobs)
        listing = "".join(f"{digest}  {path}\n" for path, digest in sums.items()).encode()
        revision = source.revision if _COMMIT.match(source.revision) else hashlib.sha256(listing).hexdigest()[:40]
        total = sum(path.stat().st_size for path in files.values())
        root = f"{HUB}/{cache_folder(called)}"
        with atomic_file(output) as out, _compressing(out, output, jobs) as sink:
            done = _Progress(listener, output.name, total)
            _append(sink, f"{root}/snapshots/{revision}/{SUMS}", listing)
            for path, place in files.items():
                _copy(sink, f"{root}/snapshots/{revision}/{path}", place, sums[path], done)
            _append(sink, f"{root}/refs/main", revision.encode())
            sink.write(tar.END_OF_ARCHIVE)
    listener(Event(step="model", subject=output.name, finished=True))
    return Packed(name=called, revision=revision, files=len(files), size=total)


def _require_whole(folder: Path) -> None:
    """VerifyError with all that is wrong; contents are compared with the digests that are known."""
    VerifyError.collect([
        VerifyError(one["evidence"], where=f"{folder}: {one['subject']}", fix=one["fix"])
        for one in faults(str(folder), deep=True)
        if one["severity"] == "error"
    ])  # fmt: skip


def _digests(files: Mapping[str, Path], jobs: int) -> dict[str, str]:
    """The sha256 of every file, by its path, in order. Those that a cache names its blobs by were just compared."""
    for path in files:
        if not path.isprintable():
            raise VerifyError("a file's name has a control character", where=repr(path), fix="Rename it.")
    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(files, pool.map(_sha256, files.values()), strict=True))


def _sha256(path: Path) -> str:
    known = blob_digest(path)
    if len(known) == 64:
        return known
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def _compressing(out: IO[bytes], output: Path, jobs: int) -> Iterator[IO[bytes]]:
    """Where the archive's plain bytes are written. The number of threads does not change what comes out."""
    if output.suffix != ".zst":
        yield out
        return
    compressor = zstandard.ZstdCompressor(level=_LEVEL, threads=jobs, write_checksum=True)
    with compressor.stream_writer(out, closefd=False) as sink:
        yield cast("IO[bytes]", sink)


@dataclass(slots=True)
class _Progress:
    listener: Listener
    subject: str
    total: int
    done: int = 0

    def __call__(self, count: int) -> None:
        self.done += count
        self.listener(Event(step="model", subject=self.subject, done=self.done, total=self.total))


def _append(sink: IO[bytes], path: str, data: bytes) -> None:
    header = tar.file_header(path, size=len(data), mode=0o644, mtime=tar.DEFAULT_MTIME)
    sink.write(header + data + tar.padding(len(data)))


def _copy(sink: IO[bytes], path: str, place: Path, expected: str, progress: Callable[[int], None]) -> None:
    digest, left = hashlib.sha256(), place.stat().st_size
    sink.write(tar.file_header(path, size=left, mode=0o644, mtime=tar.DEFAULT_MTIME))
    padding = tar.padding(left)
    with place.open("rb") as stream:
        while left and (chunk := stream.read(min(_CHUNK, left))):
            digest.update(chunk)
            sink.write(chunk)
            left -= len(chunk)
            progress(len(chunk))
    if digest.hexdigest() != expected:
        raise VerifyError("changed while it was read", where=str(place), fix="Run the same command again.")
    sink.write(padding)


def add_model(archive: Path, hub: Path, *, listener: Listener) -> Added:
    """Put a model bundle below `hub`, whole or not at all.

    VerifyError for an archive that is no model bundle or damaged, HostError for a place that cannot be written.
    """
    with host_errors(hub), archive.open("rb") as stream:
        size = archive.stat().st_size

        def progress(_count: int) -> None:
            listener(Event(step="model-add", subject=archive.name, done=stream.tell(), total=size))

        try:
            return add_stream(_plain(stream), hub, progress=progress)
        except (ArchiveError, zstandard.ZstdError) as fault:
            raise VerifyError("no model bundle, or a damaged one", where=str(archive), why=str(fault),
                              fix="Copy the archive again, or bundle the model again.") from fault  # fmt: skip


def _plain(stream: IO[bytes]) -> IO[bytes]:
    compressed = stream.read(len(_ZSTD_MAGIC)) == _ZSTD_MAGIC
    stream.seek(0)
    if not compressed:
        return stream
    return cast("IO[bytes]", zstandard.ZstdDecompressor().stream_reader(stream, read_size=_CHUNK,
                                                                        read_across_frames=True))  # fmt: skip


def hub_of(prefix: Path) -> Path:
    """Where the models of an unpacked bundle are; HostError for a folder that is none."""
    if not os.access(prefix / FINGERPRINT_PATH, os.R_OK):
        raise HostError("is no unpacked bundle", where=str(prefix),
                        fix="Give the folder that a bundle was unpacked into, or any other with --hub.")  # fmt: skip
    return prefix / HUB
