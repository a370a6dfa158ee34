"""Look into wheels once and keep what planning needs to know: their files, requirements and shared objects.

A survey is cached by the wheel's digest, so a plan for another target, or after an edit of the recipe, opens no wheel.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import mmap
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from composer._fs import host_errors
from composer.errors import ElfError, IntegrityError, WheelError
from composer.events import Event, Listener
from composer.formats.cubin import HEAD, Cubin, read_cubin
from composer.formats.elf import Elf, is_elf, read_elf
from composer.formats.elf_stream import HEADS, ElfStream, NotKeptError
from composer.formats.gpu_images import GpuImages, ImageStream, cubin_images, read_images
from composer.formats.linkage import Linkage, read_linkage
from composer.formats.metadata import requires_dist
from composer.formats.notes import minimum_kernel
from composer.formats.wheel import entry_points, install_path, read_wheel
from composer.formats.zip import Member, read, stream
from composer.proofs.closure import HOST_LIBRARIES, LOADED_AT_START, matches
from composer.steps.layer import BLOB, stored_blob
from composer.store import Store, key_of

if TYPE_CHECKING:
    from typing_extensions import Buffer

_VERSION = 2
_OBJECTS_VERSION = 4
#: Endings of files that are never looked at as objects.
TEXT = (".py", ".h", ".hpp", ".cuh", ".txt", ".json")


class SurveyedFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a wheel: where it is in the archive, its path below the prefix, and the sha256 that RECORD gives.

    is_elf: an ELF object; cubin: one of GPU code, which no loader of the host ever sees.
    """

    member: Member
    path: str
    digest: str | None
    is_elf: bool
    cubin: Cubin | None = None


class Script(msgspec.Struct, frozen=True, kw_only=True):
    """A console script: `bin/NAME` calls `attribute` of `module`."""

    name: str
    module: str
    attribute: str


class Survey(msgspec.Struct, frozen=True, kw_only=True):
    """What a wheel holds. requires: its Requires-Dist lines."""

    name: str
    version: str
    files: Sequence[SurveyedFile]
    requires: Sequence[str]
    scripts: Sequence[Script]
    warnings: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelFile:
    """A wheel in the store and the sha256 it has."""

    path: Path
    sha256: str


@contextlib.contextmanager
def mapped(path: Path) -> Iterator[mmap.mmap]:
    """The file's bytes as a read-only map."""
    with host_errors(path), path.open("rb") as handle:
        view = _map(handle.fileno(), path)
    try:
        yield view
    finally:
        # An exception on its way out holds frames that hold slices of the map: it is unmapped with the last of them.
        with contextlib.suppress(BufferError):
            view.close()


@contextlib.contextmanager
def mapped_wheel(path: Path, sha256: str) -> Iterator[mmap.mmap]:
    """A fetched wheel's bytes. When they turn out unsound and are not the locked ones, that is the fault to report.

    IntegrityError then, and the file is gone from the store, so that the next run fetches it again.
    """
    try:
        with mapped(path) as view:
            yield view
    except (WheelError, ElfError) as fault:
        with host_errors(path), path.open("rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
        if found == sha256:
            raise
        path.unlink(missing_ok=True)
        raise IntegrityError(
            "cached bytes are damaged", where=str(path), why=f"their sha256 is not {sha256}",
            fix="They were deleted from the store: run the same command again.",
        ) from fault  # fmt: skip


def _map(handle: int, path: Path) -> mmap.mmap:
    try:
        return mmap.mmap(handle, 0, access=mmap.ACCESS_READ)
    except ValueError as fault:
        raise IntegrityError("empty file", where=str(path), fix="Delete it and fetch again.") from fault


def survey_key(sha256: str, python: str) -> str:
    """The store's key of the survey of a wheel, for one minor version of Python."""
    return key_of("survey", _VERSION, artifact=sha256, python=python)


def survey_wheels(store: Store, wheels: Mapping[str, WheelFile], python: str, *, jobs: int,
                  listener: Listener) -> dict[str, Survey]:  # fmt: skip
    """The survey of each wheel, by name. WheelError for one that is unsound."""

    def one(name: str) -> Survey:
        wheel = wheels[name]
        key = survey_key(wheel.sha256, python)
        known = store.load("survey", key, Survey)
        if known is None:
            with mapped_wheel(wheel.path, wheel.sha256) as view:
                known = _look(view, wheel.path.name, python)
            store.save("survey", key, known)
        listener(Event(step="survey", subject=name, finished=True))
        return known

    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(wheels, pool.map(one, wheels), strict=True))


def _look(view: mmap.mmap, filename: str, python: str) -> Survey:
    wheel = read_wheel(view, filename)
    rows = wheel.record
    return Survey(
        name=wheel.name.name, version=str(wheel.name.version), warnings=wheel.warnings,
        files=[
            SurveyedFile(
                member=member, path=install_path(wheel, path, python), is_elf=is_elf(head),
                cubin=_cubin(head, path), digest=_hex(rows[path].sha256) if path in rows else None,
            )
            for path, member in wheel.members.items() for head in [_head(view, member, f"{filename}: {path}")]
        ],
        requires=[str(one) for one in requires_dist(wheel.metadata)],
        scripts=[
            Script(name=one.name, module=one.module, attribute=one.attribute)
            for one in entry_points(wheel) if one.group in ("console_scripts", "gui_scripts")
        ],
    )  # fmt: skip


def _hex(digest: bytes | None) -> str | None:
    return digest.hex() if digest else None


def _head(view: Buffer, member: Member, where: str | None = None) -> bytes:
    """The first bytes of what may be an object."""
    if member.size < HEAD or member.path.endswith(TEXT):
        return b""
    return bytes(next(stream(view, member, HEAD, where=where)))


def _cubin(head: bytes, where: str) -> Cubin | None:
    return read_cubin(head, where) if is_elf(head) and len(head) == HEAD else None


def loose_cubin(view: Buffer, member: Member, where: str | None = None) -> Cubin | None:
    """The architecture of a file of a wheel that is a loose cubin; None for any other file.

    `where` names the file in errors (default: its path).
    """
    return _cubin(_head(view, member, where), where or member.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The shared objects of one wheel that a bundle will hold.

    stays: no byte of them may change. slimmed: paths of those that are made smaller if they can be.
    """

    wheel: WheelFile
    files: Sequence[SurveyedFile]
    stays: bool
    slimmed: frozenset[str] = frozenset()


class ObjectFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What planning knows of an object: what the loader reads of it, its GPU code, and its symbols.

    kernel: the oldest Linux by its ABI note, if it has one.
    """

    elf: Elf
    gpu: GpuImages
    linkage: Linkage
    kernel: tuple[int, int, int] | None = None


def object_facts(content: bytes | memoryview, where: str) -> ObjectFacts:
    """The facts of an object that is at hand. ElfError when it is not well-formed."""
    head = bytes(content[:HEAD])
    cubin = _cubin(head, where)
    gpu = cubin_images(cubin, len(content)) if cubin else read_images(content, where)
    return ObjectFacts(elf=read_elf(content, where), gpu=gpu, linkage=read_linkage(content, where),
                       kernel=minimum_kernel(content, where))  # fmt: skip


def read_objects(store: Store, wanted: Mapping[str, Wanted], level: int, *, jobs: int,
                 listener: Listener) -> dict[str, ObjectFacts]:  # fmt: skip
    """The facts of every wanted object, by path below the prefix.

    A large object is inflated for this, so one that will hardly be edited is compressed on the occasion.
    """
    found: dict[str, ObjectFacts] = {}
    todo: list[tuple[str, SurveyedFile]] = []
    keys = {name: objects_key(one) for name, one in wanted.items()}
    for name, one in wanted.items():
        known = store.load("objects", keys[name], dict[str, ObjectFacts])
        if known is not None:
            found |= known
        else:
            todo += [(name, file) for file in one.files]
    fresh: dict[str, ObjectFacts] = {}

    def read_one(name: str, file: SurveyedFile, *, blob: bool) -> ObjectFacts:
        wheel = wanted[name].wheel
        with mapped_wheel(wheel.path, wheel.sha256) as view:
            elf = _read_object(store, view, file, blob=blob, level=level)
        listener(Event(step="objects", subject=file.path.rpartition("/")[2], finished=True))
        return elf

    with ThreadPoolExecutor(jobs) as pool:
        # The small ones first: a wheel whose small objects have no RPATH leaves its large ones without, too.
        for large in (False, True):
            batch = [(name, file) for name, file in todo if (file.member.size >= BLOB) == large]
            batch.sort(key=lambda item: -item[1].member.size)
            edited = {name for name, file in todo if file.path in fresh and not _finds_its_own(fresh[file.path].elf)}
            futures = [
                pool.submit(
                    read_one, name, file,
                    blob=file.path not in wanted[name].slimmed and (wanted[name].stays or name not in edited),
                )
                for name, file in batch
            ]  # fmt: skip
            fresh |= {file.path: job.result() for (_, file), job in zip(batch, futures, strict=True)}
    for name in {name for name, _ in todo}:
        store.save("objects", keys[name], {file.path: fresh[file.path] for file in wanted[name].files})
    return found | fresh


def objects_key(wanted: Wanted) -> str:
    """The store's key of the facts of a wheel's objects."""
    paths = sorted(file.path for file in wanted.files)
    return key_of("objects", _OBJECTS_VERSION, artifact=wanted.wheel.sha256, paths=paths)


def _read_object(store: Store, view: Buffer, file: SurveyedFile, *, blob: bool, level: int) -> ObjectFacts:
    size = file.member.size
    for head in HEADS:
        passing = _Passing(ElfStream(size, file.path, head), ImageStream(size, file.path), file.path)
        if blob and file.digest and size >= BLOB:
            stored_blob(store, file.digest, functools.partial(_watched, view, file, passing), size, level)
        if not passing.elf.complete:
            for _ in _watched(view, file, passing):
                pass
        with contextlib.suppress(NotKeptError):
            return passing.read()
    return object_facts(read(view, file.member, where=file.path), file.path)


class _Passing(NamedTuple):
    """The readers of one object that streams by."""

    elf: ElfStream
    gpu: ImageStream
    where: str

    def feed(self, piece: bytes | memoryview) -> None:
        self.elf.feed(piece)
        self.gpu.feed(piece)

    def read(self) -> ObjectFacts:
        return ObjectFacts(elf=self.elf.read(), gpu=self.gpu.read(self.elf),
                           linkage=read_linkage(self.elf, self.where),
                           kernel=minimum_kernel(self.elf, self.where))  # fmt: skip


def _watched(view: Buffer, file: SurveyedFile, passing: _Passing) -> Iterator[bytes | memoryview]:
    """The content of a file, of which `passing` sees every piece."""
    for piece in stream(view, file.member, where=file.path):
        passing.feed(piece)
        yield piece


def _finds_its_own(elf: Elf) -> bool:
    """Whether an object says where the libraries are that the host does not have, or needs none."""
    return bool(elf.rpath) or all(matches(name, HOST_LIBRARIES | set(LOADED_AT_START)) for name in elf.needed)
