"""Perform steps on this machine: as many at a time as its cores and its memory allow, each in a process.

Processes, because planning is Python code, which threads would run one after another. concurrent.futures gives up all
its processes when one is killed; here that costs one step, and it can be started again.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from composer.errors import HostError
from composer.events import Event, Listener, silent
from composer.farm.graph import Cost, Node
from composer.farm.pool import Done, Perform, Timed, timed

#: Seconds between two events of one subject that are worth a message.
_PAUSE = 0.25
#: Seconds that a process has to clean up after itself.
_GRACE = 5.0


class LocalPool:
    """Processes that are started when they are needed and then serve one step after another.

    cores, memory: what all steps under way may take together; memory in bytes.
    """

    def __init__(self, perform: Perform, results: SimpleQueue[Done], *, cores: int, memory: int,
                 listener: Listener = silent) -> None:  # fmt: skip
        self._perform = perform
        self._results = results
        self._room = Cost(cores=cores, memory=memory)
        self._listener = listener
        self._lock = threading.Lock()
        self._idle: list[_Child] = []
        self._busy: dict[str, tuple[_Child, Cost]] = {}
        self._closed = False

    def fits(self, cost: Cost) -> bool:
        """Whether cores and memory are left; a step that is larger than the machine runs alone."""
        with self._lock:
            taken = [one for _, one in self._busy.values()]
        cores = cost.cores + sum(one.cores for one in taken)
        memory = cost.memory + sum(one.memory for one in taken)
        return not taken or (cores <= self._room.cores and memory <= self._room.memory)

    def start(self, node: Node) -> None:
        """Begin a step in a process of its own. HostError when none can be started."""
        with self._lock:
            child = self._idle.pop() if self._idle else None
        child = child or _Child(self._perform)
        with self._lock:
            self._busy[node.key] = (child, node.cost)
        threading.Thread(target=self._attend, args=(child, node), daemon=True).start()

    def watch(self) -> Sequence[str]:
        """Nothing: a process that dies is told with the step that it had."""
        return ()

    def close(self) -> None:
        """End all processes. They remove their scratch folders; who takes too long for that is killed."""
        with self._lock:
            self._closed = True
            children = [*self._idle, *(child for child, _ in self._busy.values())]
        for child in children:
            child.terminate()
        deadline = time.monotonic() + _GRACE
        for child in children:
            child.end(max(0.0, deadline - time.monotonic()))

    def _attend(self, child: _Child, node: Node) -> None:
        """Wait for the end of one step."""
        result = child.ask(node.work, self._listener)
        with self._lock:
            del self._busy[node.key]
            if result is not None:
                self._idle.append(child)
        if self._closed:
            return
        if result is None:
            self._results.put(Done(key=node.key, lost=f"its process was ended ({child.ending()})"))
        else:
            self._results.put(result.done(node.key))


class _Child:
    """A process at the other end of a pipe."""

    def __init__(self, perform: Perform) -> None:
        # A forked process would hold the locks that other threads had at that moment.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, perform), daemon=True)
        # Until it ignores ^C, which this process answers for it, it must not see any; masks are inherited.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        except OSError as fault:
            raise HostError("no process can be started", why=fault.strerror or str(fault)) from fault
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()

    def ask(self, work: Any, listener: Listener) -> Timed | None:  # noqa: ANN401
        """What came of the work; None when the process is gone."""
        with contextlib.suppress(OSError, EOFError):
            self._pipe.send(work)
            while isinstance(message := self._pipe.recv(), Event):
                listener(message)
            assert isinstance(message, Timed)
            return message
        return None

    def ending(self) -> str:
        """How the process ended."""
        self._process.join(_GRACE)
        code = self._process.exitcode
        return f"signal {-code}" if code and code < 0 else f"exit {code}"

    def terminate(self) -> None:
        """Ask the process to end."""
        self._process.terminate()

    def end(self, grace: float) -> None:
        """Wait `grace` seconds for its end, and then make it."""
        self._process.join(grace)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()


def _serve(pipe: Connection, perform: Perform) -> None:
    """Perform what comes, until the other end is gone. ^C is the business of who started this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with contextlib.suppress(EOFError, OSError):
        while True:
            pipe.send(timed(perform, pipe.recv(), _Paced(pipe)))


class _Paced:
    """Events through a pipe, and of those that only say how far a subject is not more than anybody can read."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._told: dict[str, float] = {}
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        with self._lock:
            now = time.monotonic()
            if event.note or event.finished or now - self._told.get(event.subject, 0.0) > _PAUSE:
                self._told[event.subject] = now
                self._pipe.send(event)
