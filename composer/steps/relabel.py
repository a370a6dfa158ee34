"""Write a built wheel again: with a local version label, what it was built from, and a RECORD that is right."""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING

from packaging.version import Version

from composer._fs import atomic_file
from composer.formats.record import RecordRow, render_record
from composer.formats.wheel import Wheel, read_wheel, verified_stream
from composer.steps.survey import mapped

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: Beside METADATA: what the wheel was built from.
LEDGER = "compose-source.json"
_DROPPED = ("RECORD", "RECORD.jws", "RECORD.p7s", LEDGER)
# The oldest time that a ZIP archive can hold: the same files give the same bytes.
_TIME = (1980, 1, 1, 0, 0, 0)


def relabel_wheel(path: Path, target: Path, version: Version, ledger: bytes) -> None:
    """Write the wheel `path` as `target` with another version; its files stay as they are.

    `ledger` becomes a file of its `.dist-info`. WheelError for a wheel that breaks its specification, HostError if it
    cannot be written.
    """
    with mapped(path) as view, atomic_file(target, mode=0o444) as out:
        _Copy(view, read_wheel(view, path.name), version).write(out, ledger)


def labelled(filename: str, version: Version) -> str:
    """The file name of a wheel with another version."""
    name, _, *rest = filename.split("-")
    return "-".join([name, str(version), *rest])


class _Copy:
    def __init__(self, view: Buffer, wheel: Wheel, version: Version) -> None:
        self._view, self._wheel, self._version = view, wheel, version
        self._old = wheel.dist_info.removesuffix(".dist-info")
        self._new = f"{self._old.rpartition('-')[0]}-{version}"
        self._rows: dict[str, RecordRow] = {}

    def write(self, out: IO[bytes], ledger: bytes) -> None:
        info = f"{self._wheel.dist_info}/"
        kept = self._wheel.members.keys() - {info + name for name in _DROPPED}
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(kept, key=lambda path: (path.startswith(info), path)):
                member = self._wheel.members[path]
                is_metadata = path == f"{info}METADATA"
                content = [self._metadata()] if is_metadata else verified_stream(self._view, self._wheel, member)
                self._put(archive, self._renamed(path), member.mode, content)
            self._put(archive, f"{self._new}.dist-info/{LEDGER}", 0o644, [ledger])
            record = f"{self._new}.dist-info/RECORD"
            self._put(archive, record, 0o644, [render_record({**self._rows, record: RecordRow()})])

    def _put(self, archive: zipfile.ZipFile, path: str, mode: int, pieces: Iterable[bytes | memoryview]) -> None:
        info = zipfile.ZipInfo(path, _TIME)
        info.compress_type = zipfile.ZIP_DEFLATED
        info.external_attr = (0o100000 | mode) << 16
        digest, size = hashlib.sha256(), 0
        with archive.open(info, "w", force_zip64=True) as out:
            for piece in pieces:
                digest.update(piece)
                out.write(piece)
                size += len(piece)
        self._rows[path] = RecordRow(sha256=digest.digest(), size=size)

    def _renamed(self, path: str) -> str:
        """The folders of a wheel that carry its version."""
        for ending in (".dist-info/", ".data/"):
            if path.startswith(self._old + ending):
                return self._new + path.removeprefix(self._old)
        return path

    def _metadata(self) -> bytes:
        line = f"Version: {self._version}".encode()
        return re.sub(rb"^version:[^\r\n]*", line, self._wheel.metadata, count=1, flags=re.IGNORECASE | re.MULTILINE)
