"""Keep one program running where there is no systemd: restarts, a log of limited size, and an orderly end.

    python -I supervisor.py FOLDER

`compose-service start` runs this file as a process of its own, in a session of its own, so that it outlives the
terminal. FOLDER/service.json says what to run (`Plan`); the program gets this process's environment. What goes on is in
FOLDER/state.json, which is replaced whole. A lock on FOLDER/lock is held for life: there is one supervisor to a folder.

SIGTERM and SIGINT end the program: SIGTERM to it alone, so that a server can drain and end its own children in order,
and after the grace time SIGKILL to all that is left, as systemd does with `KillMode=mixed`. This process adopts
orphans, so children that left the process group are found too. Should it be killed itself, what it left is known by
COMPOSE_SERVICE_RUN in its environment.

Exit status: 0 when the program ended well or was stopped, 1 when it was given up or is supervised already, 2 for a
FOLDER that holds no plan. The first line on standard output is `ok`, or the reason.
"""

# The folder is named by one string and pathlib would double the start of a process that should be small.
# ruff: noqa: PTH105, PTH108, PTH110, PTH118, PTH123, PTH208

import collections
import contextlib
import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

#: Statuses that another start cannot change: wrong arguments, and the floors and GPU checks of the bundle.
FINAL = frozenset((2, 6, *range(10, 17)))
_MARK = "COMPOSE_SERVICE_RUN"
_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_UNLIMITED = resource.RLIM_INFINITY
_GONE = 5.0  # seconds for the kernel to end what was killed


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run and how.

    grace: seconds between SIGTERM and SIGKILL. settle: for how many a start is watched, as a program that refuses its
    settings or its host ends at once. failures: how many within `window` seconds are one too many. first and
    longest: seconds before the first start again, doubled each time, and at most. log_size: bytes; log_keep: old logs.
    """

    argv: Sequence[str]
    log: str
    grace: float = 120
    settle: float = 3
    first: float = 1
    longest: float = 60
    failures: int = 5
    window: float = 3600
    log_size: int = 64 << 20
    log_keep: int = 5


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A process, and never another one with the same number: when it started, in ticks since which boot."""

    pid: int
    start: int
    boot: str


def _boot() -> str:
    with open("/proc/sys/kernel/random/boot_id") as stream:
        return stream.read().strip()


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on (proc_pid_stat(5)); the second may hold anything."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stream:
            return stream.read().rpartition(b") ")[2].decode().split()
    except OSError:
        return []


def identify(pid: int) -> Identity | None:
    """Who has this number now; None for no one, or one that has ended."""
    fields = _stat(pid)
    return Identity(pid=pid, start=int(fields[19]), boot=_boot()) if fields and fields[0] not in "ZX" else None


def lives(who: Identity | None) -> bool:
    """Whether that very process still runs."""
    return who is not None and identify(who.pid) == who


def send(who: Identity, number: int) -> bool:
    """Signal that very process; whether it was there. A file descriptor holds it while it is looked at."""
    try:
        handle = os.pidfd_open(who.pid)
    except OSError:
        return False
    try:
        if not lives(who):
            return False
        signal.pidfd_send_signal(handle, number)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)


def marked(mark: str) -> list[Identity]:
    """Every process that a supervisor of this mark started, and those that they did."""
    return [who for who, _ in _processes() if f"{_MARK}={mark}".encode() in _environ(who.pid)]


def _environ(pid: int) -> list[bytes]:
    try:
        with open(f"/proc/{pid}/environ", "rb") as stream:
            return stream.read().split(b"\0")
    except OSError:
        return []


def _processes() -> Iterator[tuple[Identity, list[str]]]:
    boot = _boot()
    for name in os.listdir("/proc"):
        fields = _stat(int(name)) if name.isdigit() else []
        if fields and fields[0] not in "ZX":
            yield Identity(pid=int(name), start=int(fields[19]), boot=boot), fields


def _descendants(root: int) -> list[Identity]:
    children = collections.defaultdict(list)
    for who, fields in _processes():
        children[int(fields[1])].append(who)
    found, parents = [], [root]
    while parents:
        young = children[parents.pop()]
        found += young
        parents += [who.pid for who in young]
    return found


def read_state(folder: str) -> dict[str, Any] | None:
    """What FOLDER/state.json says; None for none, or one that is damaged."""
    try:
        with open(os.path.join(folder, "state.json")) as stream:
            state = json.load(stream)
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None


def identity_in(state: dict[str, Any] | None, role: str) -> Identity | None:
    """`supervisor` or `program` of a state."""
    try:
        return Identity(**(state or {})[role])
    except (KeyError, TypeError):
        return None


def _write(path: str, text: str) -> None:
    with open(f"{path}.new", "w") as stream:
        stream.write(text)
    os.replace(f"{path}.new", path)


class Log:
    """A file that is put aside for a new one when it has grown to its limit: `log`, `log.1` (newest), `log.2`, ..."""

    def __init__(self, path: str, size: int, keep: int) -> None:
        self._path, self._limit, self._keep = path, size, keep
        self._open()

    def _open(self) -> None:
        self._handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._handle).st_size

    def write(self, data: bytes) -> None:
        """Append. A full disk loses lines, but must not end what is logged."""
        with contextlib.suppress(OSError):
            if self._size and self._size + len(data) > self._limit:
                # What belongs to the last line stays in its file, if that line is not endless.
                end = data.find(b"\n") + 1
                if end or self._size > 2 * self._limit:
                    self._append(data[:end])
                    data = data[end:]
                    self._rotate()
            self._append(data)

    def _append(self, data: bytes) -> None:
        while data:
            count = os.write(self._handle, data)
            self._size += count
            data = data[count:]

    def _rotate(self) -> None:
        os.close(self._handle)
        with contextlib.suppress(OSError):
            for number in range(self._keep, 0, -1):
                older = f"{self._path}.{number - 1}" if number > 1 else self._path
                if os.path.exists(older):
                    os.replace(older, f"{self._path}.{number}")
            if not self._keep:
                os.unlink(self._path)
        self._open()


class Supervisor:
    """One program under supervision, until it ends well, fails too often, or is stopped."""

    def __init__(self, folder: str, plan: Plan) -> None:
        self._folder, self._plan = folder, plan
        self._log = Log(plan.log, plan.log_size, plan.log_keep)
        self._program: subprocess.Popen[bytes] | None = None
        self._status, self._ended = 0, ""
        self._mark = os.urandom(8).hex()
        self._failures: collections.deque[float] = collections.deque()
        self._deadline: float | None = None
        self._stopping = False
        self._output, self._input = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(self._input, True)
        self._wakes, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)

    def stop(self, *_: object) -> None:
        """Ask for the end; a handler of signals."""
        self._stopping = True

    def run(self) -> int:
        """Until the end; the exit status."""
        status = None
        while status is None:
            self._wait()
            status = self._judge()
        self._drain()
        return status

    def start(self) -> None:
        """Start the program; what hinders it counts as a failure of it."""
        self._deadline = None
        try:
            self._program = subprocess.Popen(
                self._plan.argv, stdin=subprocess.DEVNULL, stdout=self._input, stderr=self._input, cwd="/",
                start_new_session=True, env={**os.environ, _MARK: self._mark},
            )  # fmt: skip
        except OSError as fault:
            self._status, self._ended = 127, f"cannot be started: {fault.strerror}"
            self._note(self._ended)
            return
        self._note(f"started process {self._program.pid}: {' '.join(self._plan.argv)}")
        self._save("running")

    def _wait(self) -> None:
        patience = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        if self._program is None and self._deadline is None:
            patience = 0.0
        readable, _, _ = select.select([self._output, self._wakes], [], [], patience)
        if self._wakes in readable:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wakes, 4096)
        self._drain()

    def _drain(self) -> None:
        # A bounded number of reads: a program that writes without end must not keep signals waiting.
        with contextlib.suppress(BlockingIOError):
            for _ in range(16):
                self._log.write(os.read(self._output, 1 << 16))

    def _judge(self) -> int | None:
        """What to do next; the exit status when there is nothing more to do."""
        self._reap()
        if self._program is None:
            return self._after()
        if self._stopping and self._deadline is None:
            self._note(f"stopping process {self._program.pid}: SIGTERM, and SIGKILL after {self._plan.grace:g} s")
            self._deadline = time.monotonic() + self._plan.grace
            self._save("stopping")
            self._program.send_signal(signal.SIGTERM)
        elif self._deadline is not None and time.monotonic() >= self._deadline:
            self._note("the grace time is over: SIGKILL")
            self._kill()
        return None

    def _after(self) -> int | None:
        """The program is not running: the end, a pause, or the next start."""
        if self._stopping or not self._ended:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self._folder, "state.json"))
            return 0
        if self._deadline is None:
            return self._pause()
        if time.monotonic() >= self._deadline:
            self.start()
        return None

    def _pause(self) -> int | None:
        now = time.monotonic()
        self._failures.append(now)
        while now - self._failures[0] > self._plan.window:
            self._failures.popleft()
        count = len(self._failures)
        if count >= self._plan.failures or self._status in FINAL:
            self._note(f"given up: {self._ended}")
            self._save("failed")
            return 1
        delay = min(self._plan.first * 2 ** (count - 1), self._plan.longest)
        self._note(f"starting again in {delay:g} s")
        self._deadline = now + delay
        self._save("waiting")
        return None

    def _reap(self) -> None:
        """Take the status of the program and of adopted orphans. What the program leaves behind ends with it."""
        program = self._program
        with contextlib.suppress(ChildProcessError):
            how = os.WEXITED | os.WNOHANG | os.WNOWAIT
            while (gone := os.waitid(os.P_ALL, 0, how)) and (program is None or gone.si_pid != program.pid):
                os.waitpid(gone.si_pid, 0)
        if program is not None and program.poll() is not None:
            self._program, self._deadline = None, None
            self._status, self._ended = program.returncode, _ending(program.returncode)
            self._note(f"process {program.pid}: {self._ended or 'ended'}")
            self._kill()

    def _kill(self) -> None:
        """SIGKILL to everything below this process, until nothing is left."""
        end = time.monotonic() + _GONE
        while (left := _descendants(os.getpid())) and time.monotonic() < end:
            for who in left:
                send(who, signal.SIGKILL)
            time.sleep(0.02)
            self._drain()
        for who in left:
            self._note(f"process {who.pid} does not end")

    def _save(self, state: str) -> None:
        program = self._program and identify(self._program.pid)
        supervisor = identify(os.getpid())
        text = json.dumps({
            "state": state, "since": int(time.time()), "failures": len(self._failures), "ended": self._ended or None,
            "supervisor": supervisor and asdict(supervisor), "program": program and asdict(program), "mark": self._mark,
        })  # fmt: skip
        with contextlib.suppress(OSError):
            _write(os.path.join(self._folder, "state.json"), text)

    def _note(self, text: str) -> None:
        self._log.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} compose-service: {text}\n".encode())


def _ending(status: int) -> str:
    """What is wrong with a way to end; nothing for a good one. To end by SIGTERM is good, as it is to systemd."""
    if status in (0, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP, -signal.SIGPIPE):
        return ""
    if status > 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:  # a real-time signal has no name
        return f"killed by signal {-status}"


def load_plan(folder: str) -> Plan:
    """FOLDER/service.json as a plan; ValueError for what is none."""
    try:
        with open(os.path.join(folder, "service.json")) as stream:
            return Plan(**json.load(stream)["plan"])
    except (OSError, KeyError, TypeError) as fault:
        raise ValueError(f"no plan in {folder}: {fault}") from fault


def locked(folder: str) -> int | None:
    """Take the folder's lock for the life of this process; None when another holds it."""
    handle = os.open(os.path.join(folder, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _say(text: str) -> None:
    """Tell who started this, and let go of its terminal."""
    with contextlib.suppress(OSError):
        os.write(1, f"{text}\n".encode())
    nothing = os.open(os.devnull, os.O_RDWR)
    for handle in (0, 1, 2):
        os.dup2(nothing, handle)
    os.close(nothing)


def _raise_limits() -> None:
    """As far as this user may: pinned memory, a large stack, a file for each connection and shard."""
    wanted = {resource.RLIMIT_MEMLOCK: _UNLIMITED, resource.RLIMIT_STACK: 64 << 20, resource.RLIMIT_NOFILE: 1 << 20}
    for limit, value in wanted.items():
        soft, hard = resource.getrlimit(limit)
        possible = value if hard == _UNLIMITED else hard if value == _UNLIMITED else min(value, hard)
        if soft != _UNLIMITED and (possible == _UNLIMITED or possible > soft):
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(limit, (possible, hard))


def main(arguments: Sequence[str] | None = None) -> int:
    """The program."""
    (folder,) = sys.argv[1:] if arguments is None else arguments
    try:
        plan = load_plan(folder)
        if locked(folder) is None:
            _say("it is supervised already")
            return 1
        supervisor = Supervisor(folder, plan)
    except (ValueError, OSError) as fault:
        _say(str(fault))
        return 2
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # Handlers, as the program would inherit what is ignored.
    for number in (signal.SIGCHLD, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, supervisor.stop)
    os.umask(0o077)
    _raise_limits()
    supervisor.start()
    _say("ok")
    return supervisor.run()


if __name__ == "__main__":
    sys.exit(main())
