"""The ABI note of a program: the oldest Linux that its C library's start-up code was built for.

glibc's linker script puts a note of type 1 (NT_GNU_ABI_TAG), named `GNU`, into every program: four words, the system (0
is Linux) and a version. Kernels do not read it; glibc before 2.37 refuses an object whose version is above the
kernel's. Sources: LSB 5.0 (ABI note tag), gABI (note sections), glibc's `elf/dl-load.c`.
"""

from __future__ import annotations

from collections.abc import Iterator

from composer.formats.elf import Readable, Reader, open_elf

_PT_NOTE, _ABI_TAG, _LINUX = 4, 1, 0
_HEADER = 12
_MOST_NOTES = 256


def minimum_kernel(buffer: Readable, where: str) -> tuple[int, int, int] | None:
    """The oldest Linux by an object's ABI note; None where there is none.

    Raises ElfError for what is no ELF object. A malformed note is as good as none: the loader passes over it.
    """
    opened = open_elf(buffer, where)
    found = [
        version for segment in opened.segments if segment.kind == _PT_NOTE
        for version in _tags(opened.reader, segment.load.offset, segment.load.filesz, max(segment.load.align, 4))
    ]  # fmt: skip
    return max(found, default=None)


def _tags(reader: Reader, offset: int, size: int, align: int) -> Iterator[tuple[int, int, int]]:
    """Names and descriptors are padded to the segment's alignment, which is 4, or 8 in some objects of 64 bits."""
    end = min(offset + size, reader.size)
    for _ in range(_MOST_NOTES):
        if offset + _HEADER > end or align not in (4, 8):
            return
        name_size, size, kind = reader.unpack("3I", offset)
        start = offset + _padded(_HEADER + name_size, align)
        if start + size > end:
            return
        if kind == _ABI_TAG and size >= 16 and reader.take(offset + _HEADER, min(name_size, 4)) == b"GNU\0":
            system, major, minor, patch = reader.unpack("4I", start)
            if system == _LINUX:
                yield major, minor, patch
        offset = start + _padded(size, align)


def _padded(size: int, align: int) -> int:
    return size + -size % align
