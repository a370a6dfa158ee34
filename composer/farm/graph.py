"""A graph of steps that may grow while it runs: pure bookkeeping of what may start, what is done and what cannot be.

A step is known by its key. Whoever adds a key that is there already shares the step, which so runs once.
"""

from __future__ import annotations

from collections.abc import Iterable
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
    """One step. blocks: what needs it. cause: the key of the step whose failure ended this one, maybe its own."""

    node: Node
    needs: set[str] = field(default_factory=set)
    follows: set[str] = field(default_factory=set)
    state: State = "waiting"
    starts: int = 0
    blocks: set[str] = field(default_factory=set)
    cause: str | None = None


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
        self._entries[node.key] = _Entry(node)
        self.require(node.key, needs)
        return True

    def require(self, key: str, needs: Iterable[str]) -> None:
        """Let a step that has not ended wait for more, and never run where one of them failed, now or before.

        ValueError for a circle, which would wait for ever.
        """
        for need in needs:
            self._refuse_circle(key, need)
            self._entries[key].needs.add(need)
            self._entries[need].blocks.add(key)
        self._skip_if_hopeless(key)

    def follow(self, key: str, others: Iterable[str]) -> None:
        """Let a step that has not ended wait until these have, done or not. ValueError as of `require`."""
        for other in others:
            self._refuse_circle(key, other)
            self._entries[key].follows.add(other)

    def again(self, key: str, *, anew: bool = False) -> None:
        """A running step waits again: for what it turned out to need (`anew`), or because its worker was lost."""
        entry = self._entries[key]
        entry.state, entry.starts = "waiting", 0 if anew else entry.starts
        self._skip_if_hopeless(key)

    def work(self, key: str) -> Any:  # noqa: ANN401
        """What a step does."""
        return self._entries[key].node.work

    def change(self, key: str, work: Any) -> None:  # noqa: ANN401
        """Let a step that has not ended do this instead, when it starts again."""
        entry = self._entries[key]
        entry.node = replace(entry.node, work=work)

    def ready(self) -> list[Node]:
        """The steps that may start, in the order in which they should."""
        found = [entry.node for entry in self._entries.values() if self._may_start(entry)]
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

    def fail(self, key: str) -> None:
        """A step failed, so what needs it is skipped."""
        entry = self._entries[key]
        entry.state, entry.cause = "failed", key
        self._skip_blocked(entry)

    def state(self, key: str) -> State:
        """How far a step is."""
        return self._entries[key].state

    def cause(self, key: str) -> str | None:
        """The key of the step that failed, and so ended this one, if it failed or was skipped."""
        return self._entries[key].cause

    @property
    def running(self) -> list[str]:
        """The keys of the steps under way."""
        return [key for key, entry in self._entries.items() if entry.state == "running"]

    @property
    def ended(self) -> bool:
        """Whether no step can run any more."""
        return all(entry.state in _ENDED for entry in self._entries.values())

    def _may_start(self, entry: _Entry) -> bool:
        return (
            entry.state == "waiting"
            and all(self._entries[need].state == "done" for need in entry.needs)
            and all(self._entries[other].state in _ENDED for other in entry.follows)
        )

    def _skip_if_hopeless(self, key: str) -> None:
        """Skip a step that needs one that failed, or was skipped itself; one that runs is, when it is to wait again."""
        entry = self._entries[key]
        cause = next((found for need in sorted(entry.needs) if (found := self._entries[need].cause)), None)
        if cause and entry.state == "waiting":
            entry.state, entry.cause = "skipped", cause
            self._skip_blocked(entry)

    def _skip_blocked(self, entry: _Entry) -> None:
        for blocked in sorted(entry.blocks):
            self._skip_if_hopeless(blocked)

    def _refuse_circle(self, key: str, need: str) -> None:
        seen, todo = {need}, [need]
        while todo:
            one = todo.pop()
            if one == key:
                raise ValueError(f"{key} needs {need}, which needs it")
            entry = self._entries[one]
            todo += (entry.needs | entry.follows) - seen
            seen |= entry.needs | entry.follows
