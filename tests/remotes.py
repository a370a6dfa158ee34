"""Real servers for remote stores and registries, as processes, and a relay before them that can fail on purpose."""

from __future__ import annotations

import base64
import contextlib
import http.client
import http.server
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

_REGISTRY = """
version: 0.1
log: {{level: error}}
storage: {{filesystem: {{rootdirectory: {root}}}, delete: {{enabled: true}}}}
http: {{addr: "127.0.0.1:{port}"}}
{auth}
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextlib.contextmanager
def process(words: list[str], port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server that listens on `port` of the loopback; it is killed at the end."""
    with log.open("wb") as out, subprocess.Popen(words, stdout=out, stderr=out) as child:
        try:
            _wait(port, child, log)
            yield child
        finally:
            child.kill()


def _wait(port: int, child: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(300):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        assert child.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(log.read_text())


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[int]:
    """moto's S3; its port."""
    port = free_port()
    with process([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port, folder / "moto.log"):
        yield port


@contextlib.contextmanager
def registry(folder: Path, auth: str = "") -> Iterator[int]:
    """Debian's docker-registry, which stores its blobs below `folder`; its port. auth: that part of its config."""
    program = shutil.which("docker-registry")
    assert program, "these tests take docker-registry: apt-get install docker-registry"
    port, config = free_port(), folder / "registry.yml"
    config.write_text(_REGISTRY.format(root=folder / "registry", port=port, auth=auth))
    with process([program, "serve", str(config)], port, folder / "registry.log"):
        yield port


@dataclass(kw_only=True)
class TokenServer:
    """Gives tokens to who logs in as `user:secret`, as docker-registry takes them. scopes: what was asked for."""

    folder: Path
    scopes: list[str] = field(default_factory=list)

    def __enter__(self) -> TokenServer:
        self.key, self.certificate = self.folder / "token.key", self.folder / "token.pem"
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=tests",
                        "-keyout", self.key, "-out", self.certificate], check=True, capture_output=True)  # fmt: skip
        tokens = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                known = self.headers.get("Authorization") == f"Basic {base64.b64encode(b'user:secret').decode()}"
                scope = parse_qs(urlsplit(self.path).query).get("scope", [""])[0]
                tokens.scopes.append(scope)
                body = json.dumps({"token": tokens.token(scope)} if known else {}).encode()
                self.send_response(200 if known else 401)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def config(self) -> str:
        realm = f"http://127.0.0.1:{self.server.server_address[1]}/token"
        return (f"auth: {{token: {{realm: '{realm}', service: tests, issuer: tests, "
                f"rootcertbundle: {self.certificate}}}}}")  # fmt: skip

    def token(self, scope: str) -> str:
        """A JSON web token (RS256) that allows what was asked for."""
        access = [dict(zip(("type", "name", "actions"), one.split(":"), strict=True)) for one in scope.split()]
        now = int(time.time())
        certificate = "".join(self.certificate.read_text().splitlines()[1:-1])
        parts = (
            {"typ": "JWT", "alg": "RS256", "x5c": [certificate]},
            {"iss": "tests", "sub": "user", "aud": "tests", "exp": now + 60, "nbf": now - 60, "iat": now, "jti": "1",
             "access": [{**one, "actions": one["actions"].split(",")} for one in access]},
        )  # fmt: skip
        text = ".".join(_base64url(json.dumps(part).encode()) for part in parts)
        words = ["openssl", "dgst", "-sha256", "-sign", str(self.key)]
        signature = subprocess.run(words, input=text.encode(), check=True, capture_output=True).stdout
        return f"{text}.{_base64url(signature)}"


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One request and what was answered; sent, got: bytes of the bodies."""

    method: str
    path: str
    status: int
    sent: int
    got: int


#: What to do with a request: None to pass it on, a status to answer, "hang", or how many bytes of an answer to give.
Rule = Callable[[str, str], int | str | tuple[str, int] | None]


@dataclass(kw_only=True)
class Relay:
    """Passes requests on to a server of this machine, notes them, and fails where `rule` says so."""

    upstream: int
    rule: Rule = lambda _method, _path: None
    seen: list[Seen] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Relay:
        relay = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                with contextlib.suppress(ConnectionError):
                    super().handle_one_request()

            def __getattr__(self, name: str) -> Callable[[], None]:
                if name.startswith("do_"):
                    return lambda: relay.answer(self)
                raise AttributeError(name)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = int(self.server.server_address[1])
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        action = self.rule(handler.command, handler.path)
        if action == "hang":
            self.released.wait(30)
            handler.close_connection = True
            return
        if action == "drop":
            handler.rfile.read(min(1000, int(handler.headers.get("Content-Length", 0))))
            handler.close_connection = True
            return
        body = self._body(handler)
        if isinstance(action, int):
            self._note(handler, action, len(body), 0)
            handler.send_response(action)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        self._pass(handler, body, action[1] if isinstance(action, tuple) else None)

    def _body(self, handler: http.server.BaseHTTPRequestHandler) -> bytes:
        if handler.headers.get("Transfer-Encoding", "").lower() == "chunked":
            found = b""
            while size := int(handler.rfile.readline().split(b";")[0], 16):
                found += handler.rfile.read(size)
                handler.rfile.readline()
            while handler.rfile.readline().strip():
                pass
            return found
        return handler.rfile.read(int(handler.headers.get("Content-Length", 0)))

    def _pass(self, handler: http.server.BaseHTTPRequestHandler, body: bytes, most: int | None) -> None:
        line = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=30)
        left_out = ("transfer-encoding", "content-length", "expect", "connection")
        headers = {name: value for name, value in handler.headers.items() if name.lower() not in left_out}
        line.request(handler.command, handler.path, body=body, headers={**headers, "Content-Length": str(len(body))})
        found = line.getresponse()
        data = found.read()
        self._note(handler, found.status, len(body), len(data))
        handler.send_response(found.status)
        for name, value in found.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection", "server", "date"):
                handler.send_header(name, value)
        size = found.headers.get("Content-Length", "0") if handler.command == "HEAD" else str(len(data))
        handler.send_header("Content-Length", size)
        handler.end_headers()
        handler.wfile.write(data if most is None else data[:most])
        handler.close_connection = handler.close_connection or most is not None
        line.close()

    def _note(self, handler: http.server.BaseHTTPRequestHandler, status: int, sent: int, got: int) -> None:
        self.seen.append(Seen(method=handler.command, path=handler.path, status=status, sent=sent, got=got))

    def uploads(self) -> list[Seen]:
        """Requests that brought bytes and were accepted."""
        return [one for one in self.seen if one.sent and one.status < 300]
