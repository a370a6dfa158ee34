"""A graph of steps that may grow while it runs: pure bookkeeping of what may start, what is done and what cannot be.

A step is known by its key. Whoever adds a key that is there already shares the step, which so runs once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

State = Literal["waiting", "running", "done", "failed", "skipped"]
_ENDED: tuple[State, ...] = ("done", "failed", "skipped")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a step takes while it runs. memory: bytes, an estimate."""

    cores: int = 1
    memory: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One step. name: what people call it. work: the value that a worker performs.

    rank: of the steps that may start, the least starts first. here: it runs on the machine that drives the graph,
    wherever all others run.
    """

    key: str
    name: str
    work: Any
    cost: Cost = Cost()
    rank: tuple[float, ...] = ()
    here: bool = False


@dataclass(slots=True)
class _Entry:
    node: Node
    needs: set[str]
    state: State = "waiting"
    starts: int = 0
    blocks: set[str] = field(default_factory=set)


class Graph:
    """Steps, what each needs, and how far they are."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def add(self, node: Node, needs: Iterable[str] = ()) -> bool:
        """Add a step, which is not there yet; returns whether it was new. KeyError for a need that is not there."""
        if node.key in self._entries:
            return False
        self._entries[node.key] = _Entry(node, set())
        self.require(node.key, needs)
        return True

    def require(self, key: str, needs: Iterable[str]) -> None:
        """Let a step that has not ended wait for more. ValueError for a circle, which would wait for ever."""
        entry = self._entries[key]
        for need in needs:
            if self._leads_to(need, key):
                raise ValueError(f"{key} needs {need}, which needs it")
            other = self._entries[need]
            entry.needs.add(need)
            other.blocks.add(key)
            if other.state in ("failed", "skipped"):
                self._skip(key)

    def again(self, key: str, *, anew: bool = False) -> None:
        """A running step waits again: for what it turned out to need (`anew`), or because its worker was lost."""
        entry = self._entries[key]
        entry.state, entry.starts = "waiting", 0 if anew else entry.starts

    def change(self, key: str, work: Any) -> None:  # noqa: ANN401
        """Let a step that has not ended do this instead, when it starts again."""
        entry = self._entries[key]
        entry.node = replace(entry.node, work=work)

    def ready(self) -> list[Node]:
        """The steps that may start, in the order in which they should."""
        found = [
            entry.node for entry in self._entries.values()
            if entry.state == "waiting" and all(self._entries[need].state == "done" for need in entry.needs)
        ]  # fmt: skip
        return sorted(found, key=lambda node: node.rank)

    def start(self, key: str) -> None:
        """A step runs."""
        entry = self._entries[key]
        entry.state, entry.starts = "running", entry.starts + 1

    def starts(self, key: str) -> int:
        """How often a step was started."""
        return self._entries[key].starts

    def finish(self, key: str) -> None:
        """A step is done."""
        self._entries[key].state = "done"

    def fail(self, key: str) -> Sequence[str]:
        """A step failed; returns the keys of those that will now never run."""
        self._entries[key].state = "failed"
        return [found for blocked in sorted(self._entries[key].blocks) for found in self._skip(blocked)]

    def state(self, key: str) -> State:
        """How far a step is."""
        return self._entries[key].state

    @property
    def running(self) -> list[str]:
        """The keys of the steps under way."""
        return [key for key, entry in self._entries.items() if entry.state == "running"]

    @property
    def ended(self) -> bool:
        """Whether no step can run any more."""
        return all(entry.state in _ENDED for entry in self._entries.values())

    def _skip(self, key: str) -> list[str]:
        entry = self._entries[key]
        if entry.state != "waiting":
            return []
        entry.state = "skipped"
        return [key, *(found for blocked in sorted(entry.blocks) for found in self._skip(blocked))]

    def _leads_to(self, start: str, end: str) -> bool:
        """Whether `start` is `end`, or needs it, however indirectly."""
        seen, todo = {start}, [start]
        while todo:
            key = todo.pop()
            if key == end:
                return True
            todo += self._entries[key].needs - seen
            seen |= self._entries[key].needs
        return False
