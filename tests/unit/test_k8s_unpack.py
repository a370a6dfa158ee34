"""The init container's program, run by itself. Python 3.14 has as compression.zstd what is backports.zstd here."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import struct
import subprocess
import sys
import tarfile
import threading
from importlib import resources
from pathlib import Path

import backports.zstd
import pytest
import zstandard

PROGRAM = Path(str(resources.files("composer"))) / "deploy" / "kubernetes" / "unpack.py"


@pytest.fixture
def host(tmp_path):
    """A bundle of several frames with a skippable one at its end, and what stands in for Python 3.14."""
    (tmp_path / "compression").mkdir()
    (tmp_path / "compression" / "__init__.py").write_text("from backports import zstd\n")
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        for name, data, mode in (("bin/serve", b"#!/bin/sh\n", 0o755), ("lib/big", bytes(range(256)) * 4096, 0o644)):
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), mode
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("bin/link")
        link.type, link.linkname = tarfile.SYMTYPE, "serve"
        archive.addfile(link)
    data = plain.getvalue()
    frames = [zstandard.compress(data[start : start + 100_000]) for start in range(0, len(data), 100_000)]
    skippable = struct.pack("<II", 0x184D2A5E, 5) + b"table"
    (tmp_path / "b.tar.zst").write_bytes(b"".join(frames) + skippable)
    return tmp_path


def run(host, source, digest=None, folder="out/sglang"):
    digest = digest or hashlib.sha256((host / "b.tar.zst").read_bytes()).hexdigest()
    (host / "out").mkdir(exist_ok=True)
    place = Path(backports.zstd.__file__).parents[2]
    start = (
        f"import sys, runpy; sys.path[:0] = [{str(host)!r}, {str(place)!r}]; sys.argv = sys.argv[1:];"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-I", "-c", start, PROGRAM, str(source), digest, host / folder]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_folder_is_the_bundle(host):
    assert run(host, host / "b.tar.zst").stderr == ""
    folder = host / "out/sglang"
    assert (folder / "bin/serve").stat().st_mode & 0o777 == 0o755
    assert (folder / "bin/link").read_text() == "#!/bin/sh\n"
    assert (folder / "lib/big").stat().st_size == 1 << 20


def test_it_is_unpacked_once(host):
    run(host, host / "b.tar.zst")
    before = (host / "out/sglang/lib/big").stat().st_ino
    assert "unpacked before" in run(host, host / "b.tar.zst").stdout
    assert (host / "out/sglang/lib/big").stat().st_ino == before
    (host / "out/sglang/.unpacked").write_text("another")
    assert ": unpacked" in run(host, host / "b.tar.zst").stdout


def damaged(path, how):
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes({"cut": data[:middle], "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
                      "longer": data + b"x", "empty": b"", "other": b"not a bundle"}[how])  # fmt: skip


@pytest.mark.parametrize("how", ["cut", "flipped", "longer", "empty", "other"])
def test_nothing_is_seen_of_a_damaged_bundle(host, how):
    digest = hashlib.sha256((host / "b.tar.zst").read_bytes()).hexdigest()
    damaged(host / "b.tar.zst", how)
    done = run(host, host / "b.tar.zst", digest)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    assert not (host / "out/sglang").exists()


def test_a_member_that_leaves_the_folder_is_refused(host):
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../escaped"))
    (host / "b.tar.zst").write_bytes(zstandard.compress(plain.getvalue()))
    done = run(host, host / "b.tar.zst")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert not (host / "out/escaped").exists()


def test_from_an_address(host):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(host))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        assert run(host, f"{address}/b.tar.zst").returncode == 0
        missing = run(host, f"{address}/none", folder="out/other")
        server.shutdown()
    assert (missing.returncode, (host / "out/other").exists()) == (1, False)
    assert "404" in missing.stderr


def test_what_a_stopped_container_left_is_replaced(host):
    (host / "out/.sglang.new/bin").mkdir(parents=True)
    (host / "out/.sglang.new/bin/half").write_text("x")
    assert run(host, host / "b.tar.zst").returncode == 0
    assert not (host / "out/sglang/bin/half").exists()
    assert not (host / "out/.sglang.new").exists()
