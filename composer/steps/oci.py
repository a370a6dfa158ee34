"""Bundles in OCI registries. An image's layers, one after another, are the bundle file, byte by byte.

Each layer of a bundle is a tar segment in zstd frames, and so a layer of an image; the last one holds the manifest, the
end of the archive and the seek table. So bundles share in a registry what they share in the store, whoever pulls needs
no more than to join the blobs, and the same image is one that container runtimes mount, with the prefix at its root.

Formats: OCI Image Specification 1.1 (layers `tar+zstd`, diff_ids of the plain tar).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, Literal, TypeVar, cast

import msgspec
import zstandard

from composer._fs import atomic_file, host_errors, write_atomic
from composer.errors import HostError, IntegrityError, RecipeError, VerifyError
from composer.events import Event, Listener
from composer.model.layer import Layer
from composer.steps.bundle import Bundle, open_bundle
from composer.steps.pack import checksum_path
from composer.steps.registry import Limits, Reference, Registry, parse_reference
from composer.store import Store, key_of

T = TypeVar("T")

LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+zstd"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
_TITLE = "org.opencontainers.image.title"
_VERSION = "org.opencontainers.image.version"
#: Annotations of ours: the sha256 of the bundle file, and what `compose select` chooses by.
_SHA256, _FACTS = "wheel-composer.sha256", "wheel-composer.index"
#: Docker's names of machines (GOARCH).
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_DIFF_IDS, _PLACES = "oci-diff-id", "oci-places"
_CHUNK = 1 << 20
_TRANSFERS = 4
#: Layers of an image at most: Docker takes no more (`maxLayerDepth` of moby's layer store).
_MOST_LAYERS = 125
_NAME = r"\A[A-Za-z0-9][A-Za-z0-9._+-]*\.tar\.zst\Z"
_FIX = "Copy the bundle again and compare its .sha256."

_Digest = Annotated[str, msgspec.Meta(pattern=r"\Asha256:[0-9a-f]{64}\Z")]
_Size = Annotated[int, msgspec.Meta(ge=0)]
#: Layers of a bundle that are one of an image; none for what follows the last.
_Group = tuple[Layer, ...]


class Descriptor(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """What a manifest refers to."""

    media_type: str
    digest: _Digest
    size: _Size
    annotations: Mapping[str, str] = {}


class Image(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """An image manifest."""

    schema_version: Literal[2] = 2
    media_type: Literal["application/vnd.oci.image.manifest.v1+json"] = "application/vnd.oci.image.manifest.v1+json"
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """An image that is in the registry now. sizes: bytes of its blobs that were uploaded, were there before, or came
    from another repository of the registry."""

    reference: Reference
    digest: str
    uploaded: tuple[int, ...]
    present: tuple[int, ...]
    mounted: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """A bundle that is here now. sha256: of the file; fresh: it was not here before."""

    path: Path
    sha256: str
    fresh: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A bundle in a registry, and the index that `compose select` reads, as JSON."""

    reference: str
    index: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slice:
    """A part of a file, as what can be uploaded again and again."""

    path: Path
    start: int
    size: int

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[bytes]:
        with host_errors(self.path), self.path.open("rb") as stream:
            stream.seek(self.start)
            left = self.size
            while left and (piece := stream.read(min(_CHUNK, left))):
                left -= len(piece)
                yield piece


@dataclass(frozen=True, slots=True, kw_only=True)
class _Blob:
    """A blob to push: its descriptor and bytes."""

    descriptor: Descriptor
    body: _Slice | bytes


def push(path: Path, address: str, store: Store, *, index_of: Callable[[str], str], jobs: int, listener: Listener,
         plain_http: bool = False, limits: Limits | None = None) -> Pushed:  # fmt: skip
    """Put a bundle into a registry; what it has of it already, in this or another known repository, is not sent again.

    index_of: gives the index of this one bundle, whose sha256 it is told, as JSON. Without a tag the bundle's name is
    one. The tag is set last, so nobody sees an image that is not whole.

    Raises RecipeError for an address that cannot be meant, VerifyError for a damaged bundle, FetchError for a registry
    that does not take it; what it took stays there for the next try.
    """
    reference, bundle = parse_reference(address), open_bundle(path)
    if reference.digest:
        raise RecipeError("a digest cannot be chosen", where=address, fix="Give a tag.")
    reference = parse_reference(str(reference) if reference.tag else f"{reference}:{bundle.manifest.name}")
    registry = Registry(reference, plain_http=plain_http, limits=limits)
    blobs, data = _image(bundle, store, index_of, jobs, listener)
    found = _send(registry, blobs, store, listener, bundle.path.name)
    assert reference.tag
    digest = registry.put_manifest(reference.tag, data)
    sizes = {how: tuple(size for one, size in found if one == how) for how in ("uploaded", "present", "mounted")}
    return Pushed(reference=reference, digest=digest, **sizes)


def pull(address: str, folder: Path, *, listener: Listener, plain_http: bool = False,
         limits: Limits | None = None) -> Pulled:  # fmt: skip
    """Get a bundle out of a registry into a folder, with its checksum file; every blob and the file are checked.

    Raises RecipeError for an address that cannot be meant, FetchError for a registry that does not give it,
    IntegrityError for other bytes than it lists, VerifyError for an image that is no bundle, HostError for the folder.
    """
    registry, image = _found(address, plain_http=plain_http, limits=limits)
    where = str(registry.reference)
    name, sha256 = (image.annotations.get(key, "") for key in (_TITLE, _SHA256))
    if not re.match(_NAME, name) or not re.match(r"\A[0-9a-f]{64}\Z", sha256):
        raise VerifyError("this image is no bundle", where=where, fix="Give one that `compose push` made.")
    output = folder / name
    size = sum(one.size for one in image.layers)
    fresh = _sha256_of(output, size) != sha256
    if fresh:
        with atomic_file(output) as out:
            _receive(registry, image, out, listener, name)
            out.flush()
            if _sha256_of(Path(out.name), size) != sha256:
                raise IntegrityError("not the bundle that it says it is", where=where)
            open_bundle(Path(out.name))
    write_atomic(checksum_path(output), f"{sha256}  {name}\n".encode())
    return Pulled(path=output, sha256=sha256, fresh=fresh)


def published(address: str, *, plain_http: bool = False, limits: Limits | None = None) -> list[Published]:
    """The bundles in a repository, or the one with a tag or digest. Nothing but manifests is read.

    RecipeError for an address that cannot be meant, FetchError for a registry that does not answer.
    """
    reference = parse_reference(address)
    if reference.tag or reference.digest:
        references = [reference]
    else:
        tags = Registry(reference, plain_http=plain_http, limits=limits).tags()
        references = [parse_reference(f"{reference}:{tag}") for tag in sorted(tags)]
    with ThreadPoolExecutor(_TRANSFERS) as pool:
        found = pool.map(lambda one: _annotated(str(one), plain_http=plain_http, limits=limits), references)
        return [one for one in found if one]


def _annotated(address: str, *, plain_http: bool, limits: Limits | None) -> Published | None:
    """What is said of one image; None for one that is no bundle."""
    try:
        _, image = _found(address, plain_http=plain_http, limits=limits)
    except VerifyError:
        return None
    index = image.annotations.get(_FACTS)
    return Published(reference=address, index=index) if index else None


def _found(address: str, *, plain_http: bool, limits: Limits | None) -> tuple[Registry, Image]:
    reference = parse_reference(address)
    registry = Registry(reference, plain_http=plain_http, limits=limits)
    name = reference.digest or reference.tag
    if name is None:
        tags = ", ".join(registry.tags()) or "it has none"
        raise RecipeError("which bundle?", where=address, why=f"tags: {tags}", fix="Add one: oci://.../NAME:TAG.")
    try:
        return registry, msgspec.json.decode(registry.manifest(name), type=Image)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as fault:
        raise VerifyError("not the manifest of an image", where=address, why=str(fault)) from fault


# --- a bundle as an image ---


def _image(bundle: Bundle, store: Store, index_of: Callable[[str], str], jobs: int,
           listener: Listener) -> tuple[list[_Blob], bytes]:  # fmt: skip
    """The blobs of a bundle, in order, its config the last; and its manifest. VerifyError when bytes are damaged."""
    groups = [*_grouped(bundle.manifest.layers, _MOST_LAYERS - 1), ()]
    parts = _slices(bundle, groups)
    with ThreadPoolExecutor(jobs) as pool:
        whole = pool.submit(_sha256_of, bundle.path, sum(part.size for part in parts))
        digests = list(pool.map(functools.partial(_digest, bundle), groups, parts))
        listener(Event(step="push", subject=bundle.path.name))
        diff_ids = list(pool.map(functools.partial(_diff_id, bundle, store), groups, parts, digests))
        sha256 = whole.result()
    if sha256 is None:
        raise VerifyError("changed while it was read", where=str(bundle.path), fix="Push again when it is finished.")
    blobs = [_layer_blob(f"{number:03}-{_called(group)}.tar.zst", part, digest)
             for number, (group, part, digest) in enumerate(zip(groups, parts, digests, strict=True))]  # fmt: skip
    config = _config(bundle, groups, diff_ids)
    described = Descriptor(media_type=CONFIG_TYPE, digest=f"sha256:{hashlib.sha256(config).hexdigest()}",
                           size=len(config))  # fmt: skip
    image = Image(config=described, layers=tuple(one.descriptor for one in blobs), annotations={
        _TITLE: bundle.path.name, _VERSION: bundle.manifest.recipe.get("version", ""), _SHA256: sha256,
        _FACTS: index_of(sha256),
    })  # fmt: skip
    return [*blobs, _Blob(descriptor=described, body=config)], msgspec.json.encode(image)


def _grouped(layers: Sequence[Layer], most: int) -> list[_Group]:
    """The layers, in order, in at most so many groups of neighbours.

    Where there are too many the two neighbours that are smallest together become one, until there are not: the large
    ones stay by themselves, and bundles that share layers share the groups of those that are next to no other.
    """
    groups: list[_Group] = [(layer,) for layer in layers]
    sizes = [layer.compressed for layer in layers]
    while len(groups) > most:
        at = min(range(len(groups) - 1), key=lambda index: sizes[index] + sizes[index + 1])
        groups[at : at + 2] = [groups[at] + groups[at + 1]]
        sizes[at : at + 2] = [sizes[at] + sizes[at + 1]]
    return groups


def _called(group: _Group) -> str:
    """What a blob is called: by its distribution, by the first of several, or the manifest."""
    if not group:
        return "manifest"
    return group[0].name if len(group) == 1 else f"{group[0].name}+{len(group) - 1}"


def _slices(bundle: Bundle, groups: Sequence[_Group]) -> list[_Slice]:
    """Where the bytes of each group are; those of the last one, which has no layers, are all that follow."""
    with host_errors(bundle.path):
        size = bundle.path.stat().st_size
    sizes = [sum(layer.compressed for layer in group) for group in groups]
    sizes[-1] = size - sum(sizes)
    starts = itertools.accumulate(sizes, initial=0)
    return [_Slice(path=bundle.path, start=start, size=size) for start, size in zip(starts, sizes, strict=False)]


def _digest(bundle: Bundle, group: _Group, part: _Slice) -> str:
    """sha256 of a slice, whose parts have the digests that the manifest lists."""
    digest, start = hashlib.sha256(), part.start
    for layer, listed in [(one, listed) for one in group for listed in one.parts]:
        own = hashlib.sha256()
        for chunk in _Slice(path=part.path, start=start, size=listed.compressed):
            own.update(chunk)
            digest.update(chunk)
        if own.hexdigest() != listed.digest:
            raise VerifyError("damaged compressed data", where=f"{bundle.path.name}: {layer.name}", fix=_FIX)
        start += listed.compressed
    for chunk in part if not group else ():
        digest.update(chunk)
    return digest.hexdigest()


def _diff_id(bundle: Bundle, store: Store, group: _Group, part: _Slice, digest: str) -> str:
    """sha256 of a slice's plain tar, which the store keeps by the sha256 of its compressed bytes."""
    key = key_of(_DIFF_IDS, 1, blob=digest)
    known = store.load(_DIFF_IDS, key, str)
    if known is not None:
        return known
    plain = hashlib.sha256()
    source = cast("IO[bytes]", _Stream(iter(part)))
    try:
        reader = zstandard.ZstdDecompressor().stream_reader(source, read_size=_CHUNK, read_across_frames=True)
        while piece := reader.read(_CHUNK):
            plain.update(piece)
    except zstandard.ZstdError as fault:
        raise VerifyError("damaged compressed data", where=f"{bundle.path.name}: {_called(group)}", why=str(fault),
                          fix=_FIX) from fault  # fmt: skip
    store.save(_DIFF_IDS, key, plain.hexdigest())
    return plain.hexdigest()


class _Stream:
    """What zstandard reads from: chunks, as they are."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks

    def read(self, _size: int = -1) -> bytes:
        """The next chunk; none at the end."""
        return next(self._chunks, b"")


def _layer_blob(title: str, part: _Slice, digest: str) -> _Blob:
    """A layer; `oras pull` calls its file by the title, and in their order the files make the bundle."""
    descriptor = Descriptor(media_type=LAYER_TYPE, digest=f"sha256:{digest}", size=part.size,
                            annotations={_TITLE: title})  # fmt: skip
    return _Blob(descriptor=descriptor, body=part)


def _config(bundle: Bundle, groups: Sequence[_Group], diff_ids: Sequence[str]) -> bytes:
    """An image's config: deterministic, so without a time. Nothing is set to be started: there is no libc in it."""
    machine = bundle.manifest.target.get("machine", "")
    names = [", ".join(layer.name for layer in group) or "manifest" for group in groups]
    return msgspec.json.encode({
        "architecture": _ARCHITECTURES.get(machine, machine), "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{one}" for one in diff_ids]},
        "history": [{"created_by": f"compose: {name}"} for name in names],
    })  # fmt: skip


# --- transfers ---


def _send(registry: Registry, blobs: Sequence[_Blob], store: Store, listener: Listener,
          subject: str) -> list[tuple[str, int]]:  # fmt: skip
    """Bring blobs into the registry, the large ones first: for each, how it came there and its size."""
    key = key_of(_PLACES, 1, registry=registry.reference.host)
    places = store.load(_PLACES, key, dict[str, str]) or {}
    progress = _Progress(listener, "push", subject, sum(one.descriptor.size for one in blobs))

    def send(blob: _Blob) -> tuple[str, int]:
        how = _sent(registry, blob, places.get(blob.descriptor.digest), progress)
        return how, blob.descriptor.size

    distinct = {one.descriptor.digest: one for one in blobs}
    found = _in_parallel(send, sorted(distinct.values(), key=lambda one: -one.descriptor.size), progress.stop)
    with store.lock(f"{_PLACES}-{key}"):
        known = store.load(_PLACES, key, dict[str, str]) or {}
        store.save(_PLACES, key, known | dict.fromkeys(distinct, registry.reference.repository))
    return found


def _sent(registry: Registry, blob: _Blob, known_at: str | None, progress: _Progress) -> str:
    size = blob.descriptor.size
    if registry.has(blob.descriptor):
        progress.add(size)
        return "present"
    elsewhere = known_at if known_at != registry.reference.repository else None
    if registry.upload(blob.descriptor, _Watched(blob.body, progress), mount_from=elsewhere):
        progress.add(size)
        return "mounted"
    return "uploaded"


@dataclass(frozen=True, slots=True)
class _Watched:
    """A body whose progress is told, and which ends the transfer when another one failed."""

    body: _Slice | bytes
    progress: _Progress

    def __len__(self) -> int:
        return len(self.body)

    def __iter__(self) -> Iterator[bytes]:
        for piece in (self.body,) if isinstance(self.body, bytes) else self.body:
            self.progress.add(len(piece))
            yield piece


def _receive(registry: Registry, image: Image, out: IO[bytes], listener: Listener, subject: str) -> None:
    """Write an image's layers, one after another, into a file; each is checked."""
    starts = itertools.accumulate((one.size for one in image.layers), initial=0)
    total = sum(one.size for one in image.layers)
    handle = out.fileno()
    if total:
        os.posix_fallocate(handle, 0, total)
    progress = _Progress(listener, "pull", subject, total)

    def receive(item: tuple[int, Descriptor]) -> None:
        start, blob = item

        def write(offset: int, piece: bytes) -> None:
            progress.add(len(piece))
            with host_errors(Path(out.name)):
                _write_at(handle, piece, start + offset)

        registry.download(blob, write)

    ordered = sorted(zip(starts, image.layers, strict=False), key=lambda one: -one[1].size)
    _in_parallel(receive, ordered, progress.stop)


def _write_at(handle: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(handle, view, offset)
        view, offset = view[done:], offset + done


class _StoppedError(Exception):
    """Another transfer failed, or the user interrupted."""


class _Progress:
    """Bytes done by several threads; raises in them once `stop` is set."""

    def __init__(self, listener: Listener, step: str, subject: str, total: int) -> None:
        self.stop = threading.Event()
        self._listener = listener
        self._event = Event(step=step, subject=subject, total=total)
        self._done = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Count bytes. Those of a transfer that is tried again count twice, but never beyond the total."""
        if self.stop.is_set():
            raise _StoppedError
        with self._lock:
            self._done = min(self._done + count, self._event.total)
            event = Event(step=self._event.step, subject=self._event.subject, done=self._done, total=self._event.total)
        self._listener(event)


def _in_parallel(work: Callable[[Any], T], items: Iterable[Any], stop: threading.Event) -> list[T]:
    """What `work` makes of each item. The first fault, and an interruption, stop the others."""
    with ThreadPoolExecutor(_TRANSFERS) as pool:
        try:
            return [job.result() for job in as_completed([pool.submit(work, one) for one in items])]
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _sha256_of(path: Path, size: int) -> str | None:
    """sha256 of a file; None when it is not there, or not of this size."""
    try:
        with path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size != size:
                return None
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        return None
    except OSError as fault:
        raise HostError(fault.strerror or str(fault), where=str(path)) from fault
