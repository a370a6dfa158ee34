"""The only place that starts a process."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from composer.errors import BuildError, ComposerError, HostError

# Seconds after which a wait looks whether it is to stop.
_GLANCE = 0.2
# What a child needs to find its libraries and a scratch folder, and nothing that changes what it computes.
_PASSED_ON = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH")


def clean_environ(**extra: str) -> dict[str, str]:
    """A small environment for a child: four inherited names, the C.UTF-8 locale, and `extra`."""
    kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return {**kept, "LC_ALL": "C.UTF-8", **extra}


def run(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    timeout: float,
    stdin: bytes = b"",
    cwd: Path | None = None,
    error: type[ComposerError] = BuildError,
    fix: str | None = None,
    stop: threading.Event | None = None,
) -> bytes:
    """Run `argv` to its end without a shell and return its standard output.

    `env` replaces the environment (default: `clean_environ()`); `timeout` is in seconds. A missing program, a timeout
    or a non-zero exit is raised as `error` with the tail of standard error as its evidence; a full disk as HostError.
    stop: when another thread sets it, the process is killed, which is raised as `error`, too.
    """
    words = [os.fspath(word) for word in argv]
    name = Path(words[0]).name
    try:
        with subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=cwd,
            env=dict(env) if env is not None else clean_environ(),
        ) as child:  # fmt: skip
            out, err = _communicate(child, stdin, timeout, stop)
    except FileNotFoundError as fault:
        raise error("program not found", where=words[0], fix=fix) from fault
    except subprocess.TimeoutExpired as fault:
        raise error(f"no end after {timeout:g} s", where=name, why=" ".join(words), fix=fix) from fault
    except OSError as fault:
        raise error("cannot be started", where=words[0], why=str(fault), fix=fix) from fault
    if child.returncode:
        tail = err.decode(errors="replace").strip().splitlines()[-12:]
        if any(os.strerror(errno.ENOSPC) in line for line in tail):
            raise HostError(os.strerror(errno.ENOSPC), where=name, why="\n".join(tail),
                            fix="Free some space, or choose another folder.")  # fmt: skip
        raise error(_ending(child.returncode), where=name, why="\n".join(tail) or " ".join(words), fix=fix)
    return out


def _communicate(child: subprocess.Popen[bytes], stdin: bytes, timeout: float,
                 stop: threading.Event | None) -> tuple[bytes, bytes]:  # fmt: skip
    """What the process says until its end; it does not outlive a time-out, an interrupt or `stop`."""
    deadline, unsent = time.monotonic() + timeout, stdin or None
    try:
        while stop is not None and not stop.is_set() and time.monotonic() < deadline:
            try:
                return child.communicate(unsent, timeout=_GLANCE)
            except subprocess.TimeoutExpired:
                unsent = None  # it goes on by itself
        if stop is not None and stop.is_set():
            child.kill()
        return child.communicate(unsent, timeout=max(0.0, deadline - time.monotonic()))
    except BaseException:
        child.kill()
        raise


def _ending(status: int) -> str:
    if status > 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:  # a real-time signal has no name
        return f"killed by signal {-status}"
