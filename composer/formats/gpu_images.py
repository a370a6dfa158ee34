"""What GPU code one object holds, container by container: enough to tell on which GPUs it runs, and no more.

Who points at a container, and whether it may move, does not matter here (see `gpu_code`), so only section headers and
the headers of images are read: 30 libraries with 7 GB of code take a second, and an object may stream by.
"""

from __future__ import annotations

import struct
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from composer.errors import ElfError
from composer.formats.cubin import Cubin
from composer.formats.elf import Readable, Reader
from composer.formats.fatbin import CONTAINER_HEADER, CONTAINER_MAGIC, Container, find_containers, read_containers
from composer.formats.gpu_code import FATBIN, RELINKABLE
from composer.formats.references import Source
from composer.formats.sections import PROGBITS, Section, read_sections

_VERSION, _WORD = 1, 8
_ENTRY, _ENTRY_SIZE = struct.Struct("<4xIQ"), 64
_MAGIC, _WINDOW = struct.pack("<I", CONTAINER_MAGIC), 1 << 16
_MOST_HEADER = 0x10000
_MOST_HEADS = 1 << 18


class Image(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A kind of image: `elf`, `ptx`, `lto` or `other`, for one SM; `a` and `f` as in `fatbin.Entry`."""

    kind: str
    sm: int
    variant: str = ""


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """All containers of an object that hold the same kinds of images.

    count: how many. sizes: bytes once decompressed, of all of them together, for each of `images`.
    """

    images: Sequence[Image]
    count: int
    sizes: Sequence[int]


class GpuImages(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The GPU code of one object, without what is only there to be linked again. fault: why it cannot be read."""

    shapes: Sequence[Shape] = ()
    fault: str | None = None


def read_images(buffer: Source, where: str) -> GpuImages:
    """The GPU code of an ELF object, none of it where its section headers are gone.

    Never raises: what cannot be read is the result's `fault`, which is for a proof to judge.
    """
    try:
        if Reader(buffer, where).bits != 64:
            return GpuImages()
        sections = read_sections(buffer, where).sections
        containers = [one for section in sections if _may_hold(section) for one in _in_section(buffer, section, where)]
    except ElfError as fault:
        return GpuImages(fault=fault.what)
    return GpuImages(shapes=_shapes(containers))


class ImageStream:
    """Takes the bytes of one object in order and keeps the headers of what may be containers.

    Where a container turns out to be none behind its first image, another one inside it is not seen.
    """

    def __init__(self, size: int, where: str) -> None:
        self._size = size
        self._where = where
        self._seen = 0
        self._next = 0  # the offset from which on bytes matter
        self._kept = bytearray()  # those that have arrived
        self._container = (0, 0)  # start and end of the one that is being read
        self._found: list[tuple[int, int]] = []
        self._heads: dict[int, bytes] = {}

    def feed(self, chunk: bytes | memoryview) -> None:
        """The next bytes."""
        start = self._seen
        self._seen += len(chunk)
        if self._next < self._seen:
            self._kept += chunk[max(0, self._next - start) :]
            while self._hop() if self._container[1] else self._look():
                pass

    def read(self, table: Readable) -> GpuImages:
        """As `read_images`, once all bytes went by. table: at least the parts of the object that hold its sections."""
        if len(self._heads) > _MOST_HEADS:
            return GpuImages(fault=f"GPU code has more than {_MOST_HEADS} images")
        try:
            if Reader(table, self._where).bits != 64:
                return GpuImages()
            sections = [one for one in read_sections(table, self._where).sections if _may_hold(one)]
        except ElfError as fault:
            return GpuImages(fault=fault.what)
        return GpuImages(shapes=_shapes(
            one for start, end in self._found if any(each.offset <= start and end <= each.end for each in sections)
            for one in self._containers(start, end)
        ))  # fmt: skip

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, wanted: slice) -> bytes:
        return self._heads.get(wanted.start, b"")[: wanted.stop - wanted.start]

    def _containers(self, start: int, end: int) -> Sequence[Container]:
        try:
            return read_containers(self, start, end, self._where)
        except ElfError:
            return ()

    def _look(self) -> bool:
        """Pass over what cannot begin a container; whether there may be more to do with what has arrived."""
        self._advance(self._next + _until_magic(self._kept))
        if len(self._kept) < CONTAINER_HEADER.size:
            return False
        _, version, header, size = CONTAINER_HEADER.unpack_from(self._kept)
        end = self._next + CONTAINER_HEADER.size + size
        if (version, header) == (_VERSION, CONTAINER_HEADER.size) and not size % _WORD and end <= self._size:
            self._container = (self._next, end)
            self._keep_head(CONTAINER_HEADER.size, self._next + CONTAINER_HEADER.size)
        else:
            self._advance(self._next + _WORD)
        return True

    def _hop(self) -> bool:
        """From one image's header to the next, or out of the container."""
        start, end = self._container
        if self._next >= end:
            self._found.append((start, end))
            self._container = (0, 0)
            return True
        if len(self._kept) < _ENTRY_SIZE:
            return False
        header, payload = _ENTRY.unpack_from(self._kept)
        after = self._next + header + payload
        if not _ENTRY_SIZE <= header <= _MOST_HEADER or (header | payload) % _WORD or after > end:
            self._container = (0, 0)
        else:
            self._keep_head(_ENTRY_SIZE, after)
        return True

    def _keep_head(self, size: int, after: int) -> None:
        if len(self._heads) <= _MOST_HEADS:
            self._heads[self._next] = bytes(self._kept[:size])
        self._advance(after)

    def _advance(self, to: int) -> None:
        del self._kept[: to - self._next]
        self._next = to


def cubin_images(cubin: Cubin, size: int) -> GpuImages:
    """A loose cubin as an object with one container. size: bytes of the file."""
    image = Image(kind=cubin.kind, sm=cubin.sm, variant=cubin.variant)
    return GpuImages(shapes=(Shape(images=(image,), count=1, sizes=(size,)),))


def _until_magic(kept: bytearray) -> int:
    """Bytes before the first aligned word that may begin a container; all whole words where there is none.

    In windows, because the next container often begins at once.
    """
    whole = len(kept) // _WORD * _WORD
    if kept.startswith(_MAGIC):
        return 0
    for start in range(0, whole, _WINDOW):
        words = np.frombuffer(kept, "<u4", min(_WINDOW, whole - start) // 4, start)[::2]
        found = np.flatnonzero(words == CONTAINER_MAGIC)
        if len(found):
            return start + int(found[0]) * _WORD
    return whole


def _may_hold(section: Section) -> bool:
    """Data that is loaded. The objects of `__nv_relfatbin` are the parts of code that is in `.nv_fatbin`, linked."""
    loaded = section.kind == PROGBITS and section.allocated and not section.executable
    return loaded and section.size > 0 and section.name != RELINKABLE


def _in_section(buffer: Source, section: Section, where: str) -> Sequence[Container]:
    if section.name == FATBIN:
        try:
            return read_containers(buffer, section.offset, section.end, where)
        except ElfError:
            pass  # it holds something else, too
    return find_containers(buffer, section.offset, section.end, where)


def _shapes(containers: Iterable[Container]) -> Sequence[Shape]:
    counts: Counter[tuple[tuple[str, int, str], ...]] = Counter()
    sizes: defaultdict[tuple[tuple[str, int, str], ...], list[int]] = defaultdict(list)
    for container in containers:
        key = tuple((one.kind, one.sm, one.variant) for one in container.entries)
        counts[key] += 1
        so_far = sizes[key] or [0] * len(key)
        sizes[key] = [total + one.image for total, one in zip(so_far, container.entries, strict=True)]
    return tuple(
        Shape(images=tuple(Image(kind=kind, sm=sm, variant=variant) for kind, sm, variant in key), count=counts[key],
              sizes=tuple(sizes[key]))
        for key in sorted(counts)
    )  # fmt: skip
