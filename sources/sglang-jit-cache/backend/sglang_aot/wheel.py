"""Write a wheel (PEP 427) whose bytes depend on its files only."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

# The oldest time that a ZIP archive can hold.
_TIME = (1980, 1, 1, 0, 0, 0)
_CHUNK = 1 << 20


def write_wheel(path: Path, dist_info: str, files: Mapping[str, Path | bytes], executable: str) -> None:
    """A wheel of `files`: by path, their content or the file that has it. Those ending in `executable` are programs."""
    rows = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files, key=lambda name: (name.startswith(f"{dist_info}/"), name)):
            mode = 0o755 if name.endswith(executable) else 0o644
            rows.append(_put(archive, name, files[name], mode))
        record = f"{dist_info}/RECORD"
        _put(archive, record, "".join([*rows, f"{record},,\n"]).encode(), 0o644)


def _put(archive: zipfile.ZipFile, name: str, content: Path | bytes, mode: int) -> str:
    """Add a file; gives back its row of RECORD."""
    info = zipfile.ZipInfo(name, _TIME)
    info.compress_type = zipfile.ZIP_DEFLATED
    info.external_attr = (0o100000 | mode) << 16
    digest, size = hashlib.sha256(), 0
    with archive.open(info, "w", force_zip64=True) as out:
        for piece in _pieces(content):
            digest.update(piece)
            size += out.write(piece)
    return f"{name},sha256={base64.urlsafe_b64encode(digest.digest()).decode().rstrip('=')},{size}\n"


def _pieces(content: Path | bytes) -> list[bytes]:
    if isinstance(content, bytes):
        return [content]
    with content.open("rb") as stream:
        return list(iter(lambda: stream.read(_CHUNK), b""))
