"""Ask a server on this host whether it serves."""

# ruff: noqa: PTH119, PTH123

import contextlib
import http.client
import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .spec import SERVE, ServiceError

HEALTHY, STARTING, SILENT = "healthy", "not ready", "no answer"
#: SGLang's /health makes one token and gives up after 20 s.
TIMEOUT = 25.0
_DRY_RUN = 60.0  # seconds; it may ask for the host's GPUs
# Where it listens does not depend on the model, which may be in the service's cache alone, nor is the port looked at:
# that would take it for a moment, and the server itself may be about to.
_UNSEEN = {
    "SGLANG_PREFLIGHT": "",
    "HF_HUB_OFFLINE": "",
    "TRANSFORMERS_OFFLINE": "",
    "WHEEL_COMPOSER_MODEL_CHECK": "off",
}
# Where a server listens on every address, this host reaches it on its own.
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104  # nothing is bound here


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """Who a process runs as: credentials(7)."""

    uid: int
    gid: int
    groups: tuple[int, ...]


def credentials(pid: int) -> Credentials | None:
    """Those that a process has in effect; None if it is gone."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as stream:
            found = {name: values.split() for name, _, values in (line.partition(":") for line in stream)}
        # Real, effective, saved and file system's: proc_pid_status(5).
        return Credentials(uid=int(found["Uid"][1]), gid=int(found["Gid"][1]), groups=tuple(map(int, found["Groups"])))
    except (OSError, KeyError):
        return None


def address(
    environ: Mapping[str, str], command: Sequence[str] = (), run_as: Credentials | None = None
) -> tuple[str, int]:
    """Where a server listens that is started by `command` with these variables; ServiceError for a port that is none.

    `sglang-serve` is asked: a profile and arguments may say it too. Of another program only the variables are known.
    run_as: who it is asked as, if not as this process's user.
    """
    told = _told(environ, command, run_as) if command and os.path.basename(command[0]) == SERVE else None
    host, port = told or _said(environ)
    return _ANY.get(host, host), port


def _told(environ: Mapping[str, str], command: Sequence[str], run_as: Credentials | None) -> tuple[str, int] | None:
    """What `sglang-serve` would listen on; None where it does not say, as for a folder that is no model."""
    program, *arguments = command
    words = [program, "--dry-run", "--json", *(one for one in arguments if one != "--preflight")]
    # In a session of its own it has no terminal that it could type on for root.
    other: dict[str, Any] = {} if run_as is None else {
        "user": run_as.uid, "group": run_as.gid, "extra_groups": run_as.groups, "cwd": "/", "start_new_session": True,
    }  # fmt: skip
    try:
        done = subprocess.run(words, env={**environ, **_UNSEEN}, capture_output=True, check=False,
                              stdin=subprocess.DEVNULL, timeout=_DRY_RUN, **other)  # fmt: skip
        place = json.loads(done.stdout)["port"]
        host, port = str(place["host"]), int(place["port"])
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError, OverflowError):
        return None
    return (host, port) if 0 < port < 1 << 16 else None


def _said(environ: Mapping[str, str]) -> tuple[str, int]:
    host, port = environ.get("SGLANG_HOST", ""), environ.get("SGLANG_PORT") or "30000"
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise ServiceError(f"SGLANG_PORT is no port: {port!r}", "Use a number from 1 to 65535.")
    return host, int(port)


def ask(host: str, port: int, timeout: float = TIMEOUT) -> str:
    """`healthy`, `not ready` (it answers, but not with 200) or `no answer`."""
    try:
        with contextlib.closing(http.client.HTTPConnection(host, port, timeout=timeout)) as connection:
            connection.request("GET", "/health")
            return HEALTHY if connection.getresponse().status == http.client.OK else STARTING
    except (OSError, http.client.HTTPException, UnicodeError):  # the last for a host like a..b
        return SILENT


def wait(host: str, port: int, seconds: float, gone: Callable[[], bool], every: float = 1.0) -> bool:
    """Whether the server is healthy before `seconds` are over, and before it is `gone`."""
    end = time.monotonic() + seconds
    while not gone():
        if ask(host, port) == HEALTHY:
            return not gone()  # else another server has the port
        if time.monotonic() >= end:
            break
        time.sleep(every)
    return False
