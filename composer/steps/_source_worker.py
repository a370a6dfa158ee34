"""Runs under this tool's interpreter: LOCK PROGRAM ARGUMENT..., run so that nothing of it outlives who asked for it.

A build system starts hundreds of compilers; ninja gives each a process group of its own, so no signal to a group
reaches them all, and one that lives on would write into a folder that the next run continues. All of them are in one
session, though. Its leader gets a signal from the kernel when this process dies, whatever killed it, and ends the
session; until that is done it holds a lock on the file LOCK, for which the next run waits. When the program ends, LOCK
gets a line of JSON with what it took: seconds of CPU, and bytes of memory of its largest process, which is 0 when it
was ended. Linux and the standard library only.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # <linux/prctl.h>


def main() -> None:
    """Become the parent of a session's leader; end as it ends."""
    parent = os.getppid()
    _die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel was told
        sys.exit(1)
    watched, leader = os.getpid(), os.fork()
    if not leader:
        lead(watched, sys.argv[1], sys.argv[2:])
    _, status = os.waitpid(leader, 0)
    sys.exit(_code(status))


def lead(parent: int, lock: str, argv: list[str]) -> None:
    """Run the program in a session of its own, to its end or the parent's."""
    held = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    fcntl.flock(held, fcntl.LOCK_EX)
    os.setsid()
    # A process that puts itself into a session of its own, as daemons do, becomes a child of this one.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, lambda *_: end_session(held))
    _die_with_parent(signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(1)
    program = os.posix_spawn(argv[0], argv, os.environ)
    _, status = os.waitpid(program, 0)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    _tell(held, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)
    kill_all()
    sys.exit(_code(status))


def _tell(held: int, seconds: float, memory: int) -> None:
    os.write(held, f"{json.dumps({'cpu_seconds': round(seconds, 1), 'memory': memory})}\n".encode())


def end_session(held: int) -> None:
    """Kill what runs below this process, and then this one."""
    _tell(held, kill_all() / os.sysconf("SC_CLK_TCK"), 0)
    os._exit(1)


def kill_all() -> int:
    """Kill every process of this session, and every child; the clock ticks that they and their children have used."""
    used, running = dict[int, int](), True
    while running:  # one that was just being started, or has just become a child, is found by the next look
        running = False
        for process in (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()):
            if process != os.getpid() and (ticks := _ticks_of(process)) is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
                used[process], running = ticks, True
    return sum(used.values())


def _ticks_of(process: int) -> int | None:
    """Clock ticks of a live process of the session, or child, and of its ended children (proc(5)); None for others."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text("ascii", "replace").rpartition(")")[2].split()
    except OSError:
        return None
    ours = int(stat[1]) == os.getpid() or int(stat[3]) == os.getsid(0)
    return sum(map(int, stat[11:15])) if ours and stat[0] not in "ZX" else None


def _die_with_parent(number: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))


def _code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    main()
