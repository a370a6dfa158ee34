"""Run one command and measure it: wall clock, CPU time, and the memory of it and everything that it starts.

Linux only. Memory is read from /proc/PID/status of the whole process tree at intervals, so a shorter peak is missed,
but for VmHWM, the kernel's own high-water mark of each process. `resource.getrusage` is not used for memory: after an
exec its ru_maxrss starts at the size of the process that forked, here this benchmark itself.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import platform
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from composer._fs import host_errors
from composer.errors import BuildError, HostError
from composer.store import Store

#: `compose`, for `python -c`: the console script may belong to another environment.
COMPOSE = "from composer.cli.main import main; main()"
_SAMPLE_MS = 50
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes. resident: all pages, of mapped files too, shared ones once per process. anonymous: without file pages.

    The kernel can drop file pages at any time, so `anonymous` is what a machine must have.
    """

    resident: int = 0
    anonymous: int = 0

    def highest(self, other: Memory) -> Memory:
        """The larger of each figure."""
        return Memory(resident=max(self.resident, other.resident), anonymous=max(self.anonymous, other.anonymous))


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one command took. seconds: wall clock; user, system: CPU seconds of the tree; peak: of the tree.

    flush: seconds that the disk needed afterwards for what the command had written and not flushed itself.
    """

    seconds: float
    user: float
    system: float
    flush: float
    peak: Memory

    def then(self, other: Usage) -> Usage:
        """Both commands, one after the other."""
        return Usage(
            seconds=self.seconds + other.seconds, user=self.user + other.user, system=self.system + other.system,
            flush=self.flush + other.flush, peak=self.peak.highest(other.peak),
        )  # fmt: skip

    def as_dict(self) -> dict[str, object]:
        """Rounded, for JSON."""
        times = {name: round(getattr(self, name), 3) for name in ("seconds", "user", "system", "flush")}
        return {**times, "peak": asdict(self.peak)}


def read_into_page_cache(paths: Iterable[Path]) -> None:
    """Read files from end to end, so that no contestant waits for a disk that another one has warmed."""
    buffer = bytearray(_CHUNK)
    for path in paths:
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def today() -> str:
    """The date of a result."""
    return dt.datetime.now(tz=dt.UTC).date().isoformat()


def machine_facts() -> dict[str, Any]:
    """What a figure in seconds belongs to."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(), "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "kernel": platform.release(), "load_before": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def environ(**extra: str) -> dict[str, str]:
    """This environment without settings that would change what a contestant does."""
    tuned = ("UV_", "PIP_", "PYTHON", "ZSTD_", "TAR_", "WHEEL_COMPOSER_", "VIRTUAL_ENV", "SOURCE_DATE_EPOCH")
    return {name: value for name, value in os.environ.items() if not name.startswith(tuned)} | extra


@contextlib.contextmanager
def scratch_folder(work: Path | None) -> Iterator[Path]:
    """A folder of this run alone in `work`, or else beside the store's; it goes in any case."""
    parent = work.absolute() if work else Store().root
    with host_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix="bench-", dir=parent)
    with folder as name:
        yield Path(name)


def link_files(origin: Path, store: Path, files: Iterable[Path]) -> None:
    """Files of one store, and nothing else, in another: by hard links, or copies on another file system."""
    for path in files:
        target = store / path.relative_to(origin)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.hardlink_to(path)
        except OSError:
            shutil.copy2(path, target)


def measured(argv: Sequence[str | Path], *, env: Mapping[str, str], log: Path, every_ms: int = _SAMPLE_MS) -> Usage:
    """Run `argv` to its end; standard output goes to `log`, standard error to `log`.err. Memory is read `every_ms`.

    What earlier commands left to write is flushed before the clock starts. BuildError for a command that fails,
    HostError for one that is missing; an interrupt kills everything that was started.
    """
    os.sync()
    errors = log.with_name(f"{log.name}.err")
    started = time.monotonic()
    with log.open("wb") as out, errors.open("wb") as err:
        try:
            child = subprocess.Popen(argv, env=dict(env), stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                                     start_new_session=True)  # fmt: skip
        except OSError as fault:
            raise HostError("cannot be started", where=str(argv[0]), why=str(fault)) from fault
    try:
        peak = _watch(child.pid, every_ms)
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        raise
    seconds = time.monotonic() - started
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        tail = errors.read_text(errors="replace").strip().splitlines()[-12:]
        raise BuildError(f"exit status {child.returncode}", where=Path(argv[0]).name, why="\n".join(tail))
    return Usage(seconds=seconds, user=used.ru_utime, system=used.ru_stime, flush=_flush(), peak=peak)


def _flush() -> float:
    started = time.monotonic()
    os.sync()
    return time.monotonic() - started


def _watch(pid: int, every_ms: int) -> Memory:
    """The peak of a process and its descendants, when it has ended; it is left to be waited for."""
    handle = os.pidfd_open(pid)
    try:
        peak = _sample(pid)
        poller = select.poll()
        poller.register(handle, select.POLLIN)
        while not poller.poll(every_ms):
            peak = peak.highest(_sample(pid))
    finally:
        os.close(handle)
    return peak


def _sample(root: int) -> Memory:
    now = largest = anonymous = 0
    for pid in _tree(root):
        status = _status(pid)
        now += status.get("VmRSS", 0)
        largest = max(largest, status.get("VmHWM", 0))
        anonymous += status.get("RssAnon", 0) + status.get("RssShmem", 0)
    return Memory(resident=max(now, largest), anonymous=anonymous)


def _tree(root: int) -> list[int]:
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        found.append(pid)
        with contextlib.suppress(OSError):  # it ended while it was looked at
            for task in Path(f"/proc/{pid}/task").iterdir():
                todo += map(int, (task / "children").read_text().split())
    return found


def _status(pid: int) -> dict[str, int]:
    """The sizes in /proc/PID/status, in bytes; nothing for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    rows = (line.split() for line in lines if line.endswith(" kB"))
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows}
