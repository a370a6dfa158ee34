"""The log of a source build: followed while it grows, and what it says when the build fails."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from composer._fs import host_errors
from composer.errors import BuildError, ComposerError, HostError
from composer.events import Event, Listener

_POLL = 0.2
#: Seconds between two lines about the progress of a build.
_NOTE_EVERY = 30.0
_LAST_LINES = 15
_TAIL = 1 << 20
_NINJA = re.compile(rb"^\s*\[(\d+)/(\d+)\]", re.MULTILINE)
# Not `-Werror`, nor a file that is called so; front ends indent what a build says.
_FAULT = re.compile(r"(?i)\berror:|^\s*FAILED:|undefined reference")
_LONGEST_LINE = 300
_MISSING = re.compile(r"Some build dependencies for .*? (?:are missing|conflict with the backend dependencies): (.*)")


@contextlib.contextmanager
def followed(log: Path, subject: str, listener: Listener) -> Iterator[None]:
    """Tell the listener how far ninja is, for the time of the block."""
    stop = threading.Event()
    follower = threading.Thread(target=_Follower(log, subject, listener).follow, args=(stop,), daemon=True)
    follower.start()
    try:
        yield
    finally:
        stop.set()
        follower.join()
        listener(Event(step="source", subject=subject, finished=True, steps=True))


class _Follower:
    def __init__(self, log: Path, subject: str, listener: Listener) -> None:
        self._log, self._subject, self._listener = log, subject, listener
        self._position = log.stat().st_size if log.is_file() else 0
        self._begun = self._noted = time.monotonic()
        self._first: int | None = None
        self._last = (0, 0)

    def follow(self, stop: threading.Event) -> None:
        while not stop.wait(_POLL):
            with contextlib.suppress(OSError):  # a log that cannot be read must not end a build
                self._look()
        with contextlib.suppress(OSError):
            self._look()

    def _look(self) -> None:
        with self._log.open("rb") as stream:
            stream.seek(self._position)
            text = stream.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._position += len(whole)
        for found in _NINJA.finditer(whole):
            self._tell(int(found[1]), int(found[2]))

    def _tell(self, done: int, total: int) -> None:
        if (done, total) == self._last:
            return
        if self._first is None or total != self._last[1]:  # another call of ninja
            self._first, self._begun = done - 1, time.monotonic()
        self._last = (done, total)
        now = time.monotonic()
        note = ""
        if now - self._noted >= _NOTE_EVERY:
            self._noted = now
            note = progress_note(done, total, now - self._begun, done - self._first)
        self._listener(Event(step="source", subject=self._subject, done=done, total=total, steps=True, note=note))


def progress_note(done: int, total: int, elapsed: float, here: int) -> str:
    """`[12/87] after 40 s, about 200 s left`. here: how many of those done were done in these seconds."""
    left = (total - done) * elapsed / here if here else 0
    return f"[{done}/{total}] after {elapsed:.0f} s, about {left:.0f} s left"


def failure(log: Path, start: int, subject: str, ending: str) -> ComposerError:
    """Why a build failed, by its log from byte `start`: the first faults and the last lines."""
    with host_errors(log), log.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(max(start, size - _TAIL))
        text = stream.read().decode("utf-8", "replace")
    lines = [line.rstrip()[:_LONGEST_LINE] for line in text.splitlines() if line.strip()]
    told = "\n".join(_telling(lines)) or ending
    if missing := _MISSING.search(text):
        return BuildError("the build requirements are not complete", where=subject, why=missing[1].strip(),
                          fix="Add them to build.requires of the component.")  # fmt: skip
    if "No space left on device" in text:
        return HostError("No space left on device", where=subject, why=told,
                         fix="Free some space and run it again: it goes on from there.")  # fmt: skip
    return BuildError(f"the build failed: {ending}", where=subject, why=told, fix=_fix(text, log))


def _telling(lines: list[str]) -> list[str]:
    last = lines[-_LAST_LINES:]
    faults = [line for line in lines[:-_LAST_LINES] if _FAULT.search(line)][:5]
    return [*faults, "...", *last] if faults else last


def _fix(text: str, log: Path) -> str:
    whole = f"All of it is in {log}; what was compiled is kept for the next run."
    if re.search(r"(?i)killed signal|signal 9\b|Killed\b|out of memory", text):
        return f"Give fewer jobs (MAX_JOBS): a compiler was killed, probably for want of memory. {whole}"
    return whole
