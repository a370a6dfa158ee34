"""Drive a graph of steps through pools of workers until nothing is left that could run."""

from __future__ import annotations

from queue import Empty, SimpleQueue
from typing import Protocol

from composer.errors import BuildError, ComposerError, HostError
from composer.farm.graph import Graph, Node
from composer.farm.pool import Done, Pool

#: How often a step is started whose worker is lost each time: it may be what ends them, for want of memory.
STARTS = 3
#: Seconds without a result after which the workers are looked at.
_LOOK = 1.0


class Owner(Protocol):
    """Who the steps belong to: is told what happens to them, and may let the graph grow."""

    def started(self, node: Node) -> None:
        """A step begins, maybe again."""

    def finished(self, node: Node, done: Done) -> bool:
        """A step returned a value. False: it is to wait, for what was just required of the graph, and run again.

        Raises ComposerError for a value that makes the step one that failed.
        """

    def failed(self, node: Node, fault: ComposerError) -> None:
        """A step failed; what needs it was skipped in the graph."""

    def settled(self) -> None:
        """The graph knows of everything that was told."""

    def noted(self, text: str) -> None:
        """Something happened to workers."""

    def idle(self) -> None:
        """Nothing happened for a second."""


def drive(graph: Graph, owner: Owner, results: SimpleQueue[Done], *, here: Pool, there: Pool,
          keep_going: bool) -> None:  # fmt: skip
    """Run every step that can run. The pools are closed at the end, whatever it is.

    here: where steps run that must run on this machine. there: where all others do. results: what both were made with.
    keep_going: also start what does not depend on a step that failed; else only what is under way ends.

    HostError when nobody is left who could work.
    """
    try:
        _Drive(graph, owner, results, here, there).run(keep_going=keep_going)
    finally:
        here.close()
        if there is not here:
            there.close()


class _Drive:
    def __init__(self, graph: Graph, owner: Owner, results: SimpleQueue[Done], here: Pool, there: Pool) -> None:
        self._graph = graph
        self._owner = owner
        self._results = results
        self._here = here
        self._there = there
        self._failed = False
        self._nodes: dict[str, Node] = {}

    def run(self, *, keep_going: bool) -> None:
        while True:
            if keep_going or not self._failed:
                self._start_ready()
            if not self._graph.running:
                return
            self._take(self._next())

    def _start_ready(self) -> None:
        full: list[Pool] = []
        for node in self._graph.ready():
            pool = self._here if node.here else self._there
            if pool in full:
                continue
            if not pool.fits(node.cost):
                full.append(pool)  # nothing smaller may overtake a large step for ever
                continue
            self._nodes[node.key] = node
            self._graph.start(node.key)
            self._owner.started(node)
            pool.start(node)

    def _next(self) -> Done:
        while True:
            try:
                return self._results.get(timeout=_LOOK)
            except Empty:
                for text in (*self._here.watch(), *self._there.watch()):
                    self._owner.noted(text)
                self._owner.idle()

    def _take(self, done: Done) -> None:
        node = self._nodes[done.key]
        if done.lost:
            self._lose(node, done.lost)
        elif done.fault:
            self._fail(node, done.fault)
        else:
            self._finish(node, done)
        self._owner.settled()

    def _finish(self, node: Node, done: Done) -> None:
        try:
            ended = self._owner.finished(node, done)
        except ComposerError as fault:
            self._fail(node, fault)
            return
        if ended:
            self._graph.finish(node.key)
        else:
            self._graph.again(node.key, anew=True)

    def _lose(self, node: Node, reason: str) -> None:
        if self._graph.starts(node.key) < STARTS:
            self._owner.noted(f"{node.name}: {reason}; it is started again")
            self._graph.again(node.key)
            return
        self._fail(node, BuildError("lost its worker each time", where=node.name, why=reason,
                                    fix="It may need more memory than there is: see the kernel's log."))  # fmt: skip

    def _fail(self, node: Node, fault: ComposerError) -> None:
        self._failed = True
        self._graph.fail(node.key)
        self._owner.failed(node, fault)


def no_workers(address: str, seconds: float) -> HostError:
    """Nobody works on a cluster."""
    return HostError("has no workers", where=address, why=f"none came within {seconds:g} s",
                     fix="Start workers, and run the same command again: what is done stays done.")  # fmt: skip
