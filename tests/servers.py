"""A real package index on 127.0.0.1, which can be told to misbehave in one way per file."""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import re
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

Fault = Callable[["Request", bytes], None]


@dataclass(kw_only=True)
class File:
    """One file of a project page; `uploaded` is an ISO time or None."""

    filename: str
    data: bytes
    uploaded: str | None = "2026-01-01T00:00:00Z"
    metadata: bytes | None = None
    hashes: dict[str, str] | None = None
    size: bool = True
    requires_python: str | None = None

    def __post_init__(self) -> None:
        if self.hashes is None:
            self.hashes = {"sha256": hashlib.sha256(self.data).hexdigest()}


class Request(BaseHTTPRequestHandler):
    """One request; a fault writes its own answer with `send`."""

    server: _Server
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        index = self.server.index
        index.requests.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
        kind, _, rest = self.path.strip("/").partition("/")
        if kind == "simple" and not index.down:
            self._page(rest)
        elif kind == "files" and not index.down:
            self._file(rest)
        else:
            self.send(503 if index.down else 404)

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            if value:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def start(self) -> int:
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return int(found[1]) if found else 0

    def whole(self, data: bytes, **headers: str) -> None:
        """The honest answer, with ranges."""
        first, last = 0, len(data) - 1
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if found is None:
            self.send(200, data, Accept_Ranges="bytes", **headers)
            return
        if found[1]:
            first, last = int(found[1]), min(last, int(found[2] or last))
        else:
            first = max(0, len(data) - int(found[2]))
        if first > last:
            self.send(416)
            return
        self.send(206, data[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(data)}", **headers)

    def cut(self) -> None:
        self.wfile.flush()
        self.close_connection = True

    def _page(self, name: str) -> None:
        index = self.server.index
        if name not in index.projects:
            self.send(404)
        elif index.html:
            self.send(200, _html(index.projects[name], index).encode(), Content_Type="text/html")
        else:
            body = json.dumps(_json(name, index.projects[name], index)).encode()
            self.send(200, body, Content_Type="application/vnd.pypi.simple.v1+json")

    def _file(self, name: str) -> None:
        index = self.server.index
        files = {file.filename: file for group in index.projects.values() for file in group}
        if name.endswith(".metadata") and (found := files.get(name.removesuffix(".metadata"))) and found.metadata:
            self.whole(found.metadata)
        elif name not in files:
            self.send(404)
        elif name in index.faults:
            index.faults[name](self, files[name].data)
        else:
            self.whole(files[name].data)

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    index: Index

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that goes away is what some tests are about


@dataclass(kw_only=True)
class Index:
    """A package index (PEP 503 as `html`, else PEP 691). `requests` holds (method, path, headers) in order."""

    html: bool = False
    down: bool = False
    tls: Path | None = None
    projects: dict[str, list[File]] = field(default_factory=dict)
    faults: dict[str, Fault] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._server = _Server(("127.0.0.1", 0), Request)
        self._server.index = self
        if self.tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.tls)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def root(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self._server.server_address[1]}"

    @property
    def url(self) -> str:
        return f"{self.root}/simple/"

    def file_url(self, filename: str) -> str:
        return f"{self.root}/files/{filename}"

    def add(self, project: str, file: File) -> File:
        self.projects.setdefault(project, []).append(file)
        return file

    def gets(self, path: str) -> list[dict[str, str]]:
        """Headers of the GET requests for `path`."""
        return [headers for method, found, headers in self.requests if method == "GET" and found == path]


def _json(name: str, files: list[File], index: Index) -> dict[str, object]:
    rows = []
    for file in files:
        row: dict[str, object] = {
            "filename": file.filename,
            "url": index.file_url(file.filename),
            "hashes": file.hashes,
        }
        if file.size:
            row["size"] = len(file.data)
        if file.uploaded:
            row["upload-time"] = file.uploaded
        if file.requires_python:
            row["requires-python"] = file.requires_python
        if file.metadata is not None:
            row["core-metadata"] = {"sha256": hashlib.sha256(file.metadata).hexdigest()}
        rows.append(row)
    return {"meta": {"api-version": "1.1"}, "name": name, "files": rows}


def _html(files: list[File], index: Index) -> str:
    rows = []
    for file in files:
        fragment = "".join(f"#{name}={value}" for name, value in (file.hashes or {}).items())
        more = f' data-upload-time="{file.uploaded}"' if file.uploaded else ""
        if file.requires_python:
            more += f' data-requires-python="{html.escape(file.requires_python)}"'
        if file.metadata is not None:
            more += f' data-core-metadata="sha256={hashlib.sha256(file.metadata).hexdigest()}"'
        rows.append(f'<a href="{index.file_url(file.filename)}{fragment}"{more}>{file.filename}</a>')
    return "<!DOCTYPE html><html><body>" + "<br>".join(rows) + "</body></html>"


def make_certificate(folder: Path) -> Path:
    """A self-signed certificate for 127.0.0.1 and its key, in one PEM file."""
    key, certificate, both = folder / "key.pem", folder / "certificate.pem", folder / "both.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    both.write_bytes(key.read_bytes() + certificate.read_bytes())
    return both


# --- faults ----------------------------------------------------------------------------------------------------------


def stops_every(step: int) -> Fault:
    """Cuts the line after each `step` bytes, but honours ranges."""

    def fault(request: Request, data: bytes) -> None:
        rest = data[request.start :]
        status, more = (206, {"Content_Range": _range(request.start, data)}) if request.start else (200, {})
        request.send(status, rest[:step], **{**more, "Content_Length": str(len(rest))})
        request.cut()

    return fault


def resumes_wrongly(shift: int, *, honest: bool) -> Fault:
    """Cuts the first answer in half; resumes `shift` bytes off, saying so (`honest`) or not."""

    def fault(request: Request, data: bytes) -> None:
        if not request.start:
            first = sum("range" not in headers for headers in request.server.index.gets(request.path)) == 1
            request.send(200, data[: len(data) // 2] if first else data, Content_Length=str(len(data)))
            request.cut()
            return
        said = request.start + shift if honest else request.start
        body = (data[request.start + shift :] + b"\0" * shift)[: len(data) - said]
        request.send(206, body, Content_Range=_range(said, data))

    return fault


def ignores_range(request: Request, data: bytes) -> None:
    """Cuts the first answer in half, then always sends everything."""
    first = len(request.server.index.gets(request.path)) == 1
    request.send(200, data[: len(data) // 2] if first else data, Content_Length=str(len(data)))
    request.cut()


def sends(other: bytes) -> Fault:
    """Other bytes."""
    return lambda request, _: request.send(200, other)


def endless(request: Request, data: bytes) -> None:
    """The right bytes and then more, without an end or a length."""
    request.send(200, Content_Length="", Connection="close")
    request.wfile.write(data)
    request.close_connection = True
    for _ in range(200):
        request.wfile.write(b"\0" * 65536)


def drips(pause: float) -> Fault:
    """One byte at a time, with `pause` seconds between them."""

    def fault(request: Request, data: bytes) -> None:
        rest = data[request.start :]
        status, more = (206, {"Content_Range": _range(request.start, data)}) if request.start else (200, {})
        request.send(status, **{**more, "Content_Length": str(len(rest))})
        for byte in rest:
            request.wfile.write(bytes([byte]))
            time.sleep(pause)

    return fault


def stalls(seconds: float) -> Fault:
    """Half, and then silence; what is asked for after that comes at once."""

    def fault(request: Request, data: bytes) -> None:
        if request.start:
            request.whole(data)
            return
        request.send(200, data[: len(data) // 2], Content_Length=str(len(data)))
        time.sleep(seconds)
        request.cut()

    return fault


def breaks_down(request: Request, data: bytes) -> None:
    """Half, and from then on 503."""
    if request.start:
        request.send(503)
    else:
        request.send(200, data[: len(data) // 2], Content_Length=str(len(data)))
        request.cut()


def redirects(to: str) -> Fault:
    return lambda request, _: request.send(302, Location=to)


def with_headers(**headers: str) -> Fault:
    """The honest answer with additional headers."""
    return lambda request, data: request.whole(data, **headers)


def gzipped(request: Request, data: bytes) -> None:
    """Compresses whatever was asked for, unless identity was."""
    if request.headers.get("Accept-Encoding") == "identity":
        request.whole(data)
    else:
        request.send(200, gzip.compress(data), Content_Encoding="gzip")


def answers(*statuses: int, **headers: str) -> Fault:
    """These statuses first, then the file."""
    left = list(statuses)

    def fault(request: Request, data: bytes) -> None:
        if left:
            request.send(left.pop(0), **headers)
        else:
            request.whole(data)

    return fault


def _range(start: int, data: bytes) -> str:
    return f"bytes {start}-{len(data) - 1}/{len(data)}"
