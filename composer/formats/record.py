"""RECORD, the list of a distribution's files with digests and sizes, read strictly and written deterministically.

Source: the binary distribution format and "Recording installed projects" (PEP 376, PEP 427, PEP 627).
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from composer.errors import WheelError

__all__ = ["RecordRow", "parse_record", "render_record", "row_of"]

_DIGEST_SIZES = {"sha256": 32, "sha384": 48, "sha512": 64}
_MAX_ROWS = 100_001  # as many as a wheel may have members, and one
_MAX_FAULTS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordRow:
    """Digest (raw bytes) and size (bytes) of one file, either of which a row may leave out.

    `sha256` is what we write and nearly every wheel has; `stronger` keeps a digest by another permitted algorithm
    with its name.
    """

    sha256: bytes | None = None
    size: int | None = None
    stronger: tuple[str, bytes] | None = None

    @property
    def digest(self) -> tuple[str, bytes] | None:
        """Name of the algorithm and raw digest, whichever it is."""
        return self.stronger or (("sha256", self.sha256) if self.sha256 is not None else None)


def row_of(content: bytes) -> RecordRow:
    """The row for a file with this content."""
    return RecordRow(sha256=hashlib.sha256(content).digest(), size=len(content))


def parse_record(data: bytes) -> dict[str, RecordRow]:
    """The rows of a RECORD by path, in its order.

    Raises `WheelError` for what is not UTF-8 CSV of three columns, a path listed twice, a size that is no number, or a
    digest that is malformed or weaker than SHA-256.
    """
    rows: dict[str, RecordRow] = {}
    faults: list[str] = []
    for number, cells in enumerate(_cells(data)):
        if number == _MAX_ROWS or len(faults) == _MAX_FAULTS:
            faults.append(f"given up at row {number + 1}")
            break
        try:
            path, row = _row(cells)
        except ValueError as fault:
            faults.append(str(fault))
            continue
        if path in rows:
            faults.append(f"{path!r:.200} is listed twice")
        rows[path] = row
    if faults:
        raise WheelError("; ".join(faults), where="RECORD")
    return rows


def render_record(rows: Mapping[str, RecordRow]) -> bytes:
    """RECORD as bytes that depend on `rows` alone: sorted by path, LF, unpadded urlsafe base64."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for path, row in sorted(rows.items()):
        writer.writerow((path, _render_digest(row), "" if row.size is None else row.size))
    return text.getvalue().encode()


def _cells(data: bytes) -> Iterator[list[str]]:
    try:
        yield from csv.reader(io.StringIO(data.decode("utf-8"), newline=""), strict=True)
    except UnicodeDecodeError as fault:
        raise WheelError("not UTF-8", where="RECORD", why=str(fault)) from fault
    except csv.Error as fault:
        raise WheelError("not CSV", where="RECORD", why=str(fault)) from fault


def _row(cells: list[str]) -> tuple[str, RecordRow]:
    if len(cells) != 3:
        raise ValueError(f"a row has {len(cells)} columns instead of 3: {cells!r:.200}")
    path, digest, size = cells
    if not re.fullmatch(r"[0-9]{0,19}", size):
        raise ValueError(f"{path!r:.200} has the size {size!r:.80}")
    algorithm, raw = _parse_digest(path, digest)
    return path, RecordRow(
        sha256=raw if algorithm == "sha256" else None,
        size=int(size) if size else None,
        stronger=(algorithm, raw) if raw is not None and algorithm != "sha256" else None,
    )


def _parse_digest(path: str, text: str) -> tuple[str, bytes | None]:
    if not text:
        return "sha256", None
    algorithm, _, encoded = text.partition("=")
    if algorithm not in _DIGEST_SIZES:
        raise ValueError(f"{path!r:.200} has a digest by {algorithm!r:.80}, not by {', '.join(_DIGEST_SIZES)}")
    try:
        raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as fault:
        raise ValueError(f"{path!r:.200} has a malformed digest") from fault
    if len(raw) != _DIGEST_SIZES[algorithm] or _encode(raw) != encoded:
        raise ValueError(f"{path!r:.200} has a malformed digest")
    return algorithm, raw


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _render_digest(row: RecordRow) -> str:
    if row.digest is None:
        return ""
    algorithm, raw = row.digest
    return f"{algorithm}={_encode(raw)}"
