"""What performs steps, seen from who sends them there."""

from __future__ import annotations

import os
import resource
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from composer.errors import BuildError, ComposerError
from composer.events import Listener
from composer.farm.graph import Cost, Node

#: Performs the work of one step; it must be importable by its name, and the work and its result be picklable.
Perform = Callable[[Any, Listener], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """How a step ended: with a value, a fault, or because its worker was lost, and with it what it did.

    seconds: of work. cpu: seconds of its worker's process and programs in that time. memory: the most that the process
    ever held, in bytes; 0 when unknown.
    """

    key: str
    value: Any = None
    fault: ComposerError | None = None
    lost: str = ""
    seconds: float = 0.0
    cpu: float = 0.0
    memory: int = 0


class Pool(Protocol):
    """Something that performs steps. Each that was started ends up in the queue that the pool was made with."""

    def fits(self, cost: Cost) -> bool:
        """Whether a step of this cost may start now."""

    def start(self, node: Node) -> None:
        """Begin a step."""

    def watch(self) -> Sequence[str]:
        """What happened to workers since the last look. Raises HostError when nobody is left who could work."""

    def close(self) -> None:
        """End everything at once; what is under way is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """What a step returned, and what it took; fields as of `Done`."""

    value: Any
    fault: ComposerError | None
    seconds: float
    cpu: float
    memory: int

    def done(self, key: str) -> Done:
        """The same as the end of a step."""
        return Done(key=key, value=self.value, fault=self.fault, seconds=self.seconds, cpu=self.cpu, memory=self.memory)


def timed(perform: Perform, work: Any, listener: Listener) -> Timed:  # noqa: ANN401
    """Perform the work. A fault is a value: it must survive the way back, whatever it was."""
    started, cpu = time.monotonic(), _cpu()
    value, fault = None, None
    try:
        value = perform(work, listener)
    except ComposerError as known:
        fault = known
    except Exception as unknown:  # noqa: BLE001  (a worker serves others after a step that has a bug)
        fault = BuildError(f"{type(unknown).__name__}: {unknown}", why=traceback.format_exc(limit=-3),
                           fix="This is a fault of composer itself: please report it.")  # fmt: skip
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Timed(value=value, fault=fault, seconds=time.monotonic() - started, cpu=_cpu() - cpu, memory=memory)


def _cpu() -> float:
    """CPU seconds of this process and of its children that ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system
