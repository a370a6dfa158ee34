"""Read fat binaries: containers of GPU code images, one image per architecture and form.

NVIDIA documents no format. What is read here was measured on every container of the CUDA 12.8 and 13 libraries that
PyTorch and SGLang load, with the flags for arch-specific (`a`) and family-specific (`f`) images found by compiling for
each of nvcc 13.0's targets; `cuobjdump -lelf` agrees. All fields are little-endian:

    container  u32 magic 0xBA55ED50, u16 version 1, u16 header size 16, u64 bytes of entries
    entry      +0 u16 kind, +2 u16 version 0x0101, +4 u32 header size, +8 u64 payload size, a multiple of 8
               +16 u32 compressed size (0: raw), +28 u32 SM, +40 u64 flags, +56 u64 size once decompressed (0: raw)

Every offset inside an entry is relative to the entry, so entries move freely. Payloads are never read.
"""

from __future__ import annotations

import contextlib
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from composer.errors import ElfError
from composer.formats.elf import Readable

EntryKind = Literal["ptx", "elf", "lto", "other"]
Variant = Literal["", "a", "f"]
Compression = Literal["none", "lz4", "zstd"]

CONTAINER_MAGIC = 0xBA55ED50
CONTAINER_HEADER = struct.Struct("<IHHQ")

_VERSION = 1
_ENTRY = struct.Struct("<HHIQI8xI8xQ8xQ")
_ENTRY_VERSION = 0x0101
_KINDS: dict[int, EntryKind] = {1: "ptx", 2: "elf", 8: "lto"}
_LZ4, _ZSTD, _ARCH_SPECIFIC, _FAMILY_SPECIFIC = 0x2000, 0x8000, 0x100000, 0x200000
_ALIGN = 8
#: An image's name is in its header; the longest header seen is 128 bytes.
_MOST_HEADER = 0x10000
#: A linker aligns what it joins; more zeros than this are no padding.
_MOST_PADDING = 4096
#: The most seen in one section is 47,000 (cuFFT); a hostile file must not fill memory with empty ones.
_MOST_HEADERS = 1 << 17
_SCAN = 1 << 23


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One image in a container.

    Attributes
    ----------
    kind: PTX text, an ELF cubin, LTO-IR, or anything else.
    sm: architecture as in the header, ten times the compute capability (90).
    variant: `a` runs on exactly `sm`, `f` on its family, neither on every later minor version.
    start, end: file offsets of the header's first byte and behind the padded payload.
    image: bytes of the image once decompressed.
    """

    kind: EntryKind
    sm: int
    variant: Variant
    compression: Compression
    start: int
    end: int
    image: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """A fat binary: `start` is the file offset of its 16-byte header, `end` that of the first byte behind it."""

    start: int
    end: int
    entries: tuple[Entry, ...]


def read_containers(buffer: Readable, start: int, end: int, where: str) -> tuple[Container, ...]:
    """The containers that fill file offsets `start` to `end` back to back, with zeros between them for alignment only.

    Raises ElfError for anything else: another magic or version, sizes that do not add up, bytes between containers.
    An image of unknown kind is no fault, since it can be kept as it is.
    """
    reader = _Reader(buffer, min(end, len(buffer)), where)
    if end > reader.end:
        raise reader.fault("truncated", start)
    return tuple(_containers(reader, start))


def find_containers(buffer: bytes | memoryview | mmap.mmap, start: int, end: int, where: str) -> tuple[Container, ...]:
    """The containers that lie among other data at file offsets `start` to `end`, a section's.

    What begins like a container and is none is passed over. ElfError where there are more than can be real.
    """
    reader = _Reader(buffer, end, where)
    found: list[Container] = []
    for offset in _magics(buffer, start, end):
        if found and offset < found[-1].end:
            continue
        with contextlib.suppress(_NoContainerError):
            found.append(_container(reader, offset))
    return tuple(found)


def _magics(buffer: bytes | memoryview | mmap.mmap, start: int, end: int) -> Iterator[int]:
    """The aligned offsets at which the magic number stands."""
    start += -start % _ALIGN
    for first in range(start, end - _ALIGN + 1, _SCAN):
        words = np.frombuffer(buffer, "<u4", min(_SCAN, end - first) // _ALIGN * 2, first)[::2]
        yield from (first + np.flatnonzero(words == CONTAINER_MAGIC) * _ALIGN).tolist()


class _NoContainerError(ElfError):
    """Bytes that are no container, told from a limit that was reached."""


class _Reader:
    """Bounds-checked reads below `end`, of a bounded number of headers."""

    __slots__ = ("buffer", "end", "headers", "where")

    def __init__(self, buffer: Readable, end: int, where: str) -> None:
        self.buffer = buffer
        self.end = end
        self.where = where
        self.headers = 0

    def fault(self, what: str, offset: int, why: str | None = None) -> ElfError:
        return _NoContainerError(
            f"GPU code at offset {offset:#x}: {what}", where=self.where, why=why,
            fix="Fetch the file again; if it stays so, its GPU code is of a form that is not known here.",
        )  # fmt: skip

    def unpack(self, layout: struct.Struct, offset: int, end: int) -> tuple[int, ...]:
        self.headers += 1
        if self.headers > _MOST_HEADERS:
            raise ElfError(f"GPU code has more than {_MOST_HEADERS} images", where=self.where)
        if offset + layout.size > end:
            raise self.fault("a header is truncated", offset)
        return layout.unpack(self.buffer[offset : offset + layout.size])

    def padding(self, offset: int) -> int:
        """How many zeros come next, at most as many as alignment may need."""
        if any(self.buffer[offset : min(offset + _ALIGN, self.end)]):
            return 0
        ahead = bytes(self.buffer[offset : min(offset + _MOST_PADDING, self.end)])
        return len(ahead) - len(ahead.lstrip(b"\0"))


def _containers(reader: _Reader, offset: int) -> Iterator[Container]:
    while True:
        offset += reader.padding(offset)
        if offset >= reader.end:
            return
        container = _container(reader, offset)
        yield container
        offset = container.end


def _container(reader: _Reader, offset: int) -> Container:
    magic, version, header, size = reader.unpack(CONTAINER_HEADER, offset, reader.end)
    if magic != CONTAINER_MAGIC or offset % _ALIGN:
        raise reader.fault("not a container", offset, f"magic {magic:#010x}")
    if (version, header) != (_VERSION, CONTAINER_HEADER.size):
        raise reader.fault("a container of an unknown version", offset, f"version {version}, header {header} bytes")
    start, end = offset + header, offset + header + size
    if end > reader.end:
        raise reader.fault("a container ends outside its section", offset, f"{size} bytes")
    entries = []
    while start < end:
        entries.append(_entry(reader, start, end))
        start = entries[-1].end
    return Container(start=offset, end=end, entries=tuple(entries))


def _entry(reader: _Reader, offset: int, end: int) -> Entry:
    kind, version, header, payload, packed, sm, flags, plain = reader.unpack(_ENTRY, offset, end)
    if version != _ENTRY_VERSION or not _ENTRY.size <= header <= _MOST_HEADER or (header | payload) % _ALIGN:
        raise reader.fault("an image of an unknown version", offset, f"version {version:#x}, header {header} bytes")
    if offset + header + payload > end:
        raise reader.fault("an image ends outside its container", offset, f"{payload} bytes")
    compression = _compression(flags)
    if (compression == "none") != (packed == 0) or (packed and packed + -packed % _ALIGN != payload):
        raise reader.fault("the sizes of an image disagree", offset, f"{packed} of {payload} bytes, {compression}")
    return Entry(
        kind=_KINDS.get(kind, "other"), sm=sm, variant=_variant(reader, flags, offset), compression=compression,
        start=offset, end=offset + header + payload, image=plain if packed else payload,
    )  # fmt: skip


def _compression(flags: int) -> Compression:
    return "lz4" if flags & _LZ4 else "zstd" if flags & _ZSTD else "none"


def _variant(reader: _Reader, flags: int, offset: int) -> Variant:
    if flags & _ARCH_SPECIFIC and flags & _FAMILY_SPECIFIC:
        raise reader.fault("an image is both arch-specific and family-specific", offset)
    return "a" if flags & _ARCH_SPECIFIC else "f" if flags & _FAMILY_SPECIFIC else ""
