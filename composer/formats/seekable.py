"""The seek table at the end of a bundle (Zstandard Seekable Format 0.1.0).

A bundle is a run of independent zstd frames, then one skippable frame that lists the compressed and the plain size of
each. Every zstd decoder skips it; ours uses it to find a layer without reading what comes before.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import msgspec

from composer.errors import VerifyError

_SKIPPABLE = 0x184D2A5E
_SEEKABLE = 0x8F92EAB1
_HEADER = struct.Struct("<II")
_ENTRY = struct.Struct("<II")
_FOOTER = struct.Struct("<IBI")
#: Bytes that hold the footer of the table at the very end of a file.
FOOTER_SIZE = _FOOTER.size
#: A limit of ours on the number of frames, far above any real bundle (64 MiB each would be 64 TiB).
_MAX_FRAMES = 1 << 20


class Frame(msgspec.Struct, frozen=True, array_like=True):
    """One zstd frame: its bytes in the file and the bytes it decompresses to."""

    compressed: int
    size: int


def render_seek_table(frames: Sequence[Frame]) -> bytes:
    """The skippable frame that ends a file made of `frames`; sizes must fit in 32 bits."""
    body = b"".join(_ENTRY.pack(frame.compressed, frame.size) for frame in frames)
    footer = _FOOTER.pack(len(frames), 0, _SEEKABLE)
    return _HEADER.pack(_SKIPPABLE, len(body) + len(footer)) + body + footer


def seek_table_size(footer: bytes, where: str) -> int:
    """Size in bytes of the whole skippable frame, from the last FOOTER_SIZE bytes of a file."""
    if len(footer) == FOOTER_SIZE:
        count: int
        count, descriptor, magic = _FOOTER.unpack(footer)
        if magic == _SEEKABLE and descriptor == 0 and 0 < count <= _MAX_FRAMES:
            return _HEADER.size + count * _ENTRY.size + FOOTER_SIZE
    raise VerifyError("no seek table at its end, so it is not a bundle or is cut short", where=where,
                      fix="Copy the bundle again and compare its .sha256.")  # fmt: skip


def parse_seek_table(data: bytes, where: str) -> tuple[Frame, ...]:
    """The frames listed by a whole skippable frame."""
    count = (len(data) - _HEADER.size - FOOTER_SIZE) // _ENTRY.size
    if seek_table_size(data[-FOOTER_SIZE:], where) != len(data) or _HEADER.unpack_from(data) != (
        _SKIPPABLE,
        len(data) - _HEADER.size,
    ):
        raise VerifyError("damaged seek table", where=where, fix="Copy the bundle again and compare its .sha256.")
    return tuple(Frame(*_ENTRY.unpack_from(data, _HEADER.size + index * _ENTRY.size)) for index in range(count))
