"""Write a wheel again under another version: what is kept, what is new, and a RECORD that is right."""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Iterable, Iterator
from typing import IO, TYPE_CHECKING, Self

from composer.formats.record import RecordRow, render_record
from composer.formats.wheel import Wheel, verified_stream
from composer.formats.zip import Member

if TYPE_CHECKING:
    from packaging.version import Version
    from typing_extensions import Buffer

#: They are about the original's bytes.
_DROPPED = ("RECORD", "RECORD.jws", "RECORD.p7s")
# The oldest time that a ZIP archive can hold: the same files give the same bytes.
_TIME = (1980, 1, 1, 0, 0, 0)


class WheelWriter:
    """A copy of `wheel`, whose bytes are `view`, on its way into `out`: whole after `finish` and the end of a block."""

    def __init__(self, view: Buffer, wheel: Wheel, version: Version, out: IO[bytes]) -> None:
        self._view, self._wheel, self._version = view, wheel, version
        self._archive = zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED)
        self._old = wheel.dist_info.removesuffix(".dist-info")
        # The project as its folders spell it: the name of the wheel has no hyphen, theirs may.
        self._new = f"{self._old.rpartition('-')[0]}-{version}"
        self._rows: dict[str, RecordRow] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_fault: object) -> None:
        self._archive.close()

    def members(self) -> Iterator[Member]:
        """The files to copy, those of `.dist-info` at the end; of the old RECORD nothing is."""
        info = f"{self._wheel.dist_info}/"
        for path in sorted(self._wheel.members, key=lambda path: (path.startswith(info), path)):
            if path.removeprefix(info) not in _DROPPED:
                yield self._wheel.members[path]

    def copy(self, member: Member) -> None:
        """A file as it is, but for METADATA's version. WheelError for one that is not what the wheel says of it."""
        is_metadata = member.path == f"{self._wheel.dist_info}/METADATA"
        self.put(member, [self._metadata()] if is_metadata else verified_stream(self._view, self._wheel, member))

    def put(self, member: Member, pieces: Iterable[bytes | memoryview]) -> tuple[str, RecordRow]:
        """Other content in the place of a file's; where it is in the new wheel, and its row of RECORD."""
        path = self._renamed(member.path)
        return path, self._write(path, member.mode, pieces)

    def finish(self, name: str, data: bytes) -> None:
        """Add a file of this name to `.dist-info`, and RECORD as the last."""
        info = f"{self._new}.dist-info"
        self._write(f"{info}/{name}", 0o644, [data])
        self._write(f"{info}/RECORD", 0o644, [render_record({**self._rows, f"{info}/RECORD": RecordRow()})])

    def _write(self, path: str, mode: int, pieces: Iterable[bytes | memoryview]) -> RecordRow:
        info = zipfile.ZipInfo(path, _TIME)
        info.compress_type = zipfile.ZIP_DEFLATED
        info.external_attr = (0o100000 | mode) << 16
        digest, size = hashlib.sha256(), 0
        with self._archive.open(info, "w", force_zip64=True) as out:
            for piece in pieces:
                digest.update(piece)
                out.write(piece)
                size += len(piece)
        row = self._rows[path] = RecordRow(sha256=digest.digest(), size=size)
        return row

    def _renamed(self, path: str) -> str:
        """The folders of a wheel that carry its version."""
        for ending in (".dist-info/", ".data/"):
            if path.startswith(self._old + ending):
                return self._new + path.removeprefix(self._old)
        return path

    def _metadata(self) -> bytes:
        line = f"Version: {self._version}".encode()
        return re.sub(rb"^version:[^\r\n]*", line, self._wheel.metadata, count=1, flags=re.IGNORECASE | re.MULTILINE)
