"""What a running step tells whoever listens. The library never prints; the command line draws these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Progress of one subject within one step.

    done and total are bytes when total is not 0, or, with `steps`, commands of a build; an event with `note` says
    something worth a line of its own.
    """

    step: str
    subject: str
    done: int = 0
    total: int = 0
    note: str = ""
    finished: bool = False
    steps: bool = False


Listener = Callable[[Event], None]


def silent(_event: Event) -> None:
    """A listener that ignores everything."""
