"""Unpack a bundle in an init container: python3 -I unpack.py SOURCE SHA256 FOLDER.

SOURCE is a URL or a file. FOLDER appears whole, and only if the file had that sha256; a FOLDER that was made from such
a file is left as it is. Exit status: 0, or 1 with the reason on standard error; the container is then started again.
"""

import hashlib
import shutil
import sys
import tarfile
import urllib.request
from pathlib import Path
from typing import IO, Any, cast

from compression import zstd  # type: ignore[import-not-found]  # of Python 3.14

_TIMEOUT = 60  # seconds without a byte
_MARK = ".unpacked"


class _Hashed:
    """A stream that knows the sha256 of what was read from it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self.digest = stream, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.digest.update(data)
        return data


def _opened(source: str) -> Any:  # noqa: ANN401
    if source.startswith(("http://", "https://")):
        return urllib.request.urlopen(source, timeout=_TIMEOUT)  # noqa: S310  # it is one of these two
    return Path(source).open("rb")


def unpack(source: str, sha256: str, folder: Path) -> str:
    """Make FOLDER what SOURCE holds; what was done. ValueError for another digest."""
    mark = folder / _MARK
    if mark.is_file() and mark.read_text() == sha256:
        return "was unpacked before"
    staging = folder.with_name(f".{folder.name}.new")
    for left in (staging, folder):
        shutil.rmtree(left, ignore_errors=True)
    with _opened(source) as stream:
        whole = _Hashed(stream)
        with zstd.open(whole, "rb") as plain, tarfile.open(fileobj=cast("IO[bytes]", plain), mode="r|") as archive:
            archive.extractall(staging, filter="data")  # and nothing outside of it
        # The seek table comes after the archive's end.
        while whole.read(1 << 20):
            pass
    found = whole.digest.hexdigest()
    if found != sha256:
        shutil.rmtree(staging)
        raise ValueError(f"has the sha256 {found}, not {sha256}")
    (staging / _MARK).write_text(sha256)
    staging.rename(folder)
    return "unpacked"


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{sys.argv[3]}: {unpack(sys.argv[1], sys.argv[2], Path(sys.argv[3]))}\n")
    except (OSError, EOFError, ValueError, tarfile.TarError, zstd.ZstdError) as fault:
        sys.exit(f"{sys.argv[1]}: {fault}")
