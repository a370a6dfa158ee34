"""What a source build finds on this machine: cores, memory, disk and compilers."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

from composer._fs import host_errors
from composer._proc import run
from composer.errors import HostError
from composer.model.source import Build, jobs_for

_SECONDS = 30.0
# An unpacked source with its objects and tools, as a multiple of its archive; a recipe may ask for more.
_GROWTH = 10
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def jobs_here(build: Build, wanted: int | None, environ: Mapping[str, str] = os.environ) -> int:
    """Compilers at a time: from this machine's cores and memory; `wanted` or else MAX_JOBS lowers it."""
    text = environ.get("MAX_JOBS", "")
    if wanted is None and text:
        if not (text.isdecimal() and int(text)):
            raise HostError(f"{text!r} is not a number of jobs", where="MAX_JOBS", fix="Give a number from 1 up.")
        wanted = int(text)
    return jobs_for(build, cores=len(os.sched_getaffinity(0)), memory=memory_here(), wanted=wanted)


def memory_here() -> int:
    """Bytes of memory that this process may use at most: the machine's, or its control group's."""
    with host_errors(Path("/proc/meminfo")):
        total = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text("ascii"))
    assert total is not None  # proc(5)
    found = [int(total[1]) * 1024]
    for path in _LIMITS:
        text = path.read_text("ascii").strip() if path.is_file() else ""
        found += [int(text)] if text.isdecimal() else []
    return min(found)


def check_room(build: Build, where: str, folder: Path, unfinished: Path, size: int) -> None:
    """HostError when the disk of `folder` or the memory cannot hold a build. size: bytes of the source's archive.

    unfinished: the folder of an earlier run of this build, which needs what it holds no second time.
    """
    faults = []
    with host_errors(folder):
        free = shutil.disk_usage(folder).free + used(unfinished)
    if free < (need := max(build.disk, _GROWTH * size)):
        faults.append(HostError("too little disk to build it", where=where,
                                why=f"{need / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free in {folder}",
                                fix="Free some space, or set WHEEL_COMPOSER_STORE to another disk."))  # fmt: skip
    if (memory := memory_here()) < build.memory:
        faults.append(HostError("too little memory to build it", where=where,
                                why=f"{build.memory / 1e9:.1f} GB are needed, this machine has {memory / 1e9:.1f} GB",
                                fix="Build it on a larger machine and copy the wheel."))  # fmt: skip
    HostError.collect(faults)


def compilers(environ: Mapping[str, str]) -> dict[str, str]:
    """What the compilers that a build would call say to `--version`, by the variable that names them.

    Those that are not there are left out: not every source needs one. HostError for one that does not answer.
    """
    found = {}
    for name, standard in (("CC", "cc"), ("CXX", "c++")):
        words = shlex.split(environ.get(name, standard)) or [standard]
        program = shutil.which(words[0], path=environ.get("PATH"))
        if program:
            answer = run([program, "--version"], env=environ, timeout=_SECONDS, error=HostError)
            found[name] = next(iter(answer.decode(errors="replace").strip().splitlines()), "")
    return found


def used(folder: Path) -> int:
    """Bytes below a folder; what another process removes meanwhile counts as nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += Path(parent, name).lstat().st_blocks * 512
    return total
