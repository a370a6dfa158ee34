"""Ask a server on this host whether it serves."""

import http.client
import time
from collections.abc import Mapping

from .service_spec import ServiceError

HEALTHY, STARTING, SILENT = "healthy", "not ready", "no answer"
#: SGLang's /health makes one token and gives up after 20 s.
TIMEOUT = 25.0
# Where a server listens on every address, this host reaches it on its own.
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104  # nothing is bound here


def address(environ: Mapping[str, str]) -> tuple[str, int]:
    """Where a server with these variables listens; ServiceError for a port that is none."""
    host, port = environ.get("SGLANG_HOST", ""), environ.get("SGLANG_PORT") or "30000"
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise ServiceError(f"SGLANG_PORT is no port: {port!r}", "Use a number from 1 to 65535.")
    return _ANY.get(host, host), int(port)


def ask(host: str, port: int, timeout: float = TIMEOUT) -> str:
    """`healthy`, `not ready` (it answers, but not with 200) or `no answer`."""
    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    try:
        connection.request("GET", "/health")
        return HEALTHY if connection.getresponse().status == http.client.OK else STARTING
    except (OSError, http.client.HTTPException):
        return SILENT
    finally:
        connection.close()


def wait(host: str, port: int, seconds: float, every: float = 1.0) -> bool:
    """Whether the server is healthy before `seconds` are over."""
    end = time.monotonic() + seconds
    while ask(host, port) != HEALTHY:
        if time.monotonic() >= end:
            return False
        time.sleep(every)
    return True
