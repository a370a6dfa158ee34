"""The only place that starts a process."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from composer.errors import BuildError, ComposerError, HostError

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
) -> bytes:
    """Run `argv` to its end without a shell and return its standard output.

    `env` replaces the environment (default: `clean_environ()`); `timeout` is in seconds. A missing program, a timeout
    or a non-zero exit is raised as `error` with the tail of standard error as its evidence; a full disk as HostError.
    """
    words = [os.fspath(word) for word in argv]
    name = Path(words[0]).name
    try:
        done = subprocess.run(
            words, input=stdin, capture_output=True, timeout=timeout, cwd=cwd, check=False,
            env=dict(env) if env is not None else clean_environ(),
        )  # fmt: skip
    except FileNotFoundError as fault:
        raise error("program not found", where=words[0], fix=fix) from fault
    except subprocess.TimeoutExpired as fault:
        raise error(f"no end after {timeout:g} s", where=name, why=" ".join(words), fix=fix) from fault
    except OSError as fault:
        raise error("cannot be started", where=words[0], why=str(fault), fix=fix) from fault
    if done.returncode:
        tail = done.stderr.decode(errors="replace").strip().splitlines()[-12:]
        if any(os.strerror(errno.ENOSPC) in line for line in tail):
            raise HostError(os.strerror(errno.ENOSPC), where=name, why="\n".join(tail),
                            fix="Free some space, or choose another folder.")  # fmt: skip
        raise error(_ending(done.returncode), where=name, why="\n".join(tail) or " ".join(words), fix=fix)
    return done.stdout


def _ending(status: int) -> str:
    if status > 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:  # a real-time signal has no name
        return f"killed by signal {-status}"
