"""What an object looks like once loaded, for tests that compare it before and after an edit."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path


def segments(data: bytes) -> list[tuple[int, ...]]:
    """The program headers: type, flags, offset, address, physical address, filesz, memsz, align."""
    (start,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<2H", data, 54)
    return [struct.unpack_from("<2I6Q", data, start + index * size) for index in range(count)]


def sections(data: bytes) -> dict[str, tuple[int, ...]]:
    """The section headers by name: name, type, flags, address, offset, size, link, info, align, entry size."""
    (start,) = struct.unpack_from("<Q", data, 40)
    _, count, names = struct.unpack_from("<3H", data, 58)
    rows = [struct.unpack_from("<2I4Q2I2Q", data, start + index * 64) for index in range(count)]
    texts = data[rows[names][4] :]
    return {texts[row[0] : texts.index(b"\0", row[0])].decode(): row for row in rows}


def memory(data: bytes) -> dict[int, int]:
    """Every address that a segment maps from the file, or fills with zeros, and its byte."""
    found: dict[int, int] = {}
    for kind, _, offset, address, _, filesz, memsz, _ in segments(data):
        if kind == 1:
            content = data[offset : offset + filesz].ljust(memsz, b"\0")
            assert len(content) == memsz
            found |= dict(enumerate(content, address))
    return found


def call(path: Path, function: str = "answer") -> int:
    """Load an object in another process, by the real loader, and call one of its functions without arguments."""
    code = "import ctypes, sys; print(getattr(ctypes.CDLL(sys.argv[1]), sys.argv[2])())"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, path.resolve(), function], check=True, capture_output=True, text=True
    )
    return int(done.stdout)


def readelf(path: Path) -> str:
    """What readelf says of all headers, the dynamic section and the relocations; it must not warn."""
    done = subprocess.run(["readelf", "-hlSdrsW", path], check=True, capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout
