"""Wheels from values: good ones that pip installs, and every hostile one that a ZIP can express.

A good wheel is `build_wheel(...)`. A hostile one is a list of `Entry` values with something wrong in it, written by
`write_zip`, which writes what it is told: local header, directory row and payload of an entry may all disagree.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import io
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

STORED, DEFLATED = 0, 8
REGULAR, LINK, FIFO, DEVICE = 0o100644, 0o120777, 0o010644, 0o060644
_DATE = 0x21  # 1980-01-01


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One ZIP member. What is None is computed from `data`; `local` overrides fields of the local header only."""

    name: str | bytes
    data: bytes = b""
    mode: int = REGULAR
    method: int = DEFLATED
    flags: int | None = None
    payload: bytes | None = None
    crc32: int | None = None
    size: int | None = None
    compressed_size: int | None = None
    offset: int | None = None
    extra: bytes = b""
    descriptor: bytes | None = None
    local: Mapping[str, object] = field(default_factory=dict)

    @property
    def raw_name(self) -> bytes:
        return self.name if isinstance(self.name, bytes) else self.name.encode()

    def packed(self) -> bytes:
        if self.payload is not None:
            return self.payload
        return self.data if self.method == STORED else deflate(self.data)

    def header(self) -> dict[str, object]:
        """The fields that the local header and the directory row share."""
        payload = self.packed()
        flags = 0 if self.raw_name.isascii() else 0x800
        return {
            "flags": flags if self.flags is None else self.flags,
            "method": self.method,
            "crc32": binascii.crc32(self.data) if self.crc32 is None else self.crc32,
            "compressed_size": len(payload) if self.compressed_size is None else self.compressed_size,
            "size": len(self.data) if self.size is None else self.size,
            "name": self.raw_name,
            "extra": self.extra,
        }


def deflate(data: bytes) -> bytes:
    """`data` as a raw deflate stream."""
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


def write_zip(
    entries: Iterable[Entry], *, zip64: bool = False, comment: bytes = b"", count: int | None = None
) -> bytes:
    """An archive of `entries`; `count` is what the end record claims."""
    out = bytearray()
    rows = bytearray()
    written = list(entries)
    for entry in written:
        here = entry.header()
        rows += _row(here, entry.mode << 16, len(out) if entry.offset is None else entry.offset)
        out += _local({**here, **entry.local}) + entry.packed() + (entry.descriptor or b"")
    claimed = len(written) if count is None else count
    start, position = len(out), len(out) + len(rows)
    out += rows
    if zip64:
        out += struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, claimed, claimed, len(rows), start)
        out += struct.pack("<4sLQL", b"PK\6\7", 0, position, 1)
        out += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, len(comment))
    else:
        out += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, claimed, claimed, len(rows), start, len(comment))
    return bytes(out + comment)


def _local(here: Mapping[str, object]) -> bytes:
    name, extra = here["name"], here["extra"]
    assert isinstance(name, bytes)
    assert isinstance(extra, bytes)
    return struct.pack(
        "<4s5H3L2H", b"PK\3\4", 20, here["flags"], here["method"], 0, _DATE,
        here["crc32"], here["compressed_size"], here["size"], len(name), len(extra),
    ) + name + extra  # fmt: skip


def _row(here: Mapping[str, object], attributes: int, offset: int) -> bytes:
    name, extra = here["name"], here["extra"]
    assert isinstance(name, bytes)
    assert isinstance(extra, bytes)
    return struct.pack(
        "<4s6H3L5H2L", b"PK\1\2", 3 << 8 | 20, 20, here["flags"], here["method"], 0, _DATE,
        here["crc32"], here["compressed_size"], here["size"], len(name), len(extra), 0, 0, 0, attributes, offset,
    ) + name + extra  # fmt: skip


def wheel_filename(name: str, version: str, tag: str = "py3-none-any") -> str:
    """The file name that belongs to `build_wheel` with the same arguments."""
    return f"{escape(name)}-{version}-{tag}.whl"


def escape(name: str) -> str:
    """A project name as it stands in the names of files and folders."""
    return name.lower().replace("-", "_").replace(".", "_")


def metadata_text(name: str, version: str, requires: Iterable[str] = ()) -> bytes:
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    return "\n".join([*lines, "", ""]).encode()


def wheel_text(tag: str = "py3-none-any", version: str = "1.0") -> bytes:
    pythons, abis, platforms = (part.split(".") for part in tag.split("-"))
    tags = [f"Tag: {p}-{a}-{m}" for p in pythons for a in abis for m in platforms]
    pure = "true" if platforms == ["any"] else "false"
    return "\n".join([f"Wheel-Version: {version}", "Generator: tests", f"Root-Is-Purelib: {pure}", *tags, ""]).encode()


def record_rows(entries: Iterable[Entry], record: str) -> list[tuple[str, str, str]]:
    """The rows that RECORD at the path `record` has for `entries`."""
    rows = []
    for entry in entries:
        if not entry.raw_name.endswith(b"/"):
            digest = base64.urlsafe_b64encode(hashlib.sha256(entry.data).digest()).rstrip(b"=").decode()
            rows.append((entry.raw_name.decode(errors="backslashreplace"), f"sha256={digest}", str(len(entry.data))))
    return [*rows, (record, "", "")]


def record_entry(record: str, rows: Iterable[tuple[str, ...]]) -> Entry:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return Entry(name=record, data=text.getvalue().encode())


def wheel_entries(
    name: str,
    version: str,
    files: Mapping[str, bytes],
    *,
    requires: Iterable[str] = (),
    entry_points: Mapping[str, Mapping[str, str]] | bytes = b"",
    tag: str = "py3-none-any",
    executable: Iterable[str] = (),
    dist_info: Mapping[str, bytes] | None = None,
    extra: Iterable[Entry] = (),
) -> list[Entry]:
    """The entries of a wheel without its RECORD.

    `files` are paths in the archive, `executable` names those with execute bits, `dist_info` replaces or adds files of
    that folder by their name, `extra` is appended as it is.
    """
    folder = f"{escape(name)}-{version}.dist-info"
    texts = {"METADATA": metadata_text(name, version, requires), "WHEEL": wheel_text(tag)}
    points = entry_points if isinstance(entry_points, bytes) else _entry_points_text(entry_points)
    if points:
        texts["entry_points.txt"] = points
    texts |= dist_info or {}
    marked = set(executable)
    return [
        *(Entry(name=p, data=d, mode=0o100755 if p in marked else REGULAR) for p, d in files.items()),
        *extra,
        *(Entry(name=f"{folder}/{text}", data=data) for text, data in texts.items()),
    ]


def _entry_points_text(groups: Mapping[str, Mapping[str, str]]) -> bytes:
    parts = ["".join([f"[{g}]\n", *(f"{n} = {v}\n" for n, v in items.items())]) for g, items in groups.items()]
    return "\n".join(parts).encode()


def build_wheel(
    name: str,
    version: str,
    files: Mapping[str, bytes],
    *,
    requires: Iterable[str] = (),
    entry_points: Mapping[str, Mapping[str, str]] | bytes = b"",
    tag: str = "py3-none-any",
    executable: Iterable[str] = (),
    dist_info: Mapping[str, bytes] | None = None,
    extra: Iterable[Entry] = (),
    zip64: bool = False,
) -> bytes:
    """A whole wheel with a RECORD that is right for what it holds; for the parameters see `wheel_entries`."""
    entries = wheel_entries(
        name, version, files, requires=requires, entry_points=entry_points, tag=tag,
        executable=executable, dist_info=dist_info, extra=extra,
    )  # fmt: skip
    record = f"{escape(name)}-{version}.dist-info/RECORD"
    return write_zip([*entries, record_entry(record, record_rows(entries, record))], zip64=zip64)
