"""Runs under this tool's interpreter: REPORT LOG PROGRAM ARGUMENT..., becomes PROGRAM in a world without a network.

A new network namespace holds nothing but a loopback interface that is down. Who may not make one is allowed it inside
a user namespace of their own, if the kernel is so configured; ids are mapped to themselves there. Where neither is
granted, proxies are set that refuse every connection. REPORT's first line says what became of it: `["network", ERROR]`
with ERROR empty if the network is cut. Standard output and error go to LOG: nothing that PROGRAM leaves running can
then hold a pipe open. Standard library only.
"""

import contextlib
import ctypes
import json
import os
import sys
from pathlib import Path

_NEW_USER, _NEW_NETWORK = 0x1000_0000, 0x4000_0000  # CLONE_* of <sched.h>; os.unshare came with Python 3.12
_REFUSING = "http://127.0.0.1:1"


def main() -> None:
    """Cut, report, redirect, become."""
    report, log, *argv = sys.argv[1:]
    fault = cut()
    if fault:
        os.environ |= dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), _REFUSING)
    with Path(report).open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(["network", fault]) + "\n")
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.execv(argv[0], argv)  # noqa: S606 - no new process: this one was started by composer/_proc.py


def cut() -> str:
    """Leave the network; the kernel's objection, or nothing."""
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_NETWORK) == 0:
        return ""
    if libc.unshare(_NEW_USER | _NEW_NETWORK) != 0:
        return os.strerror(ctypes.get_errno())
    map_ids(user, group)
    return ""


def map_ids(user: int, group: int) -> None:
    """Keep the ids that the caller had; user_namespaces(7) wants `deny` before a group is mapped."""
    maps = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
    # A security module may forbid it. Imports seldom ask who runs them, and the network is cut all the same.
    with contextlib.suppress(OSError):
        for name, text in maps.items():
            Path("/proc/self", name).write_text(text, encoding="ascii")


if __name__ == "__main__":
    main()
