"""Draw events: one live view on a terminal, plain lines in a pipe."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, Task, TaskID, TextColumn
from rich.text import Text

from composer.events import Event, Listener

_TITLES = {
    "apply": "applying", "delta": "comparing", "fetch": "fetching", "import": "importing modules", "layer": "composing",
    "model": "packing the model", "model-add": "adding the model", "objects": "reading shared objects",
    "pack": "packing", "pull": "pulling", "push": "pushing", "remote": "sharing", "slim": "slimming",
    "source": "building from source", "store": "writing", "survey": "looking through wheels",
    "toolchain": "making the toolkit", "unpack": "unpacking", "verify": "verifying",
}  # fmt: skip


@contextlib.contextmanager
def drawn(*, quiet: bool = False) -> Iterator[Listener]:
    """A listener for the time of one command; everything goes to standard error."""
    console = Console(stderr=True)
    if quiet:
        yield lambda _event: None
    elif console.is_terminal:
        with _Live(console) as live:
            yield live.show
    else:
        yield _Lines().show


class _Lines:
    """One line when a step begins and one for everything worth a note."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._lock = threading.Lock()

    def show(self, event: Event) -> None:
        """Print the event if it says something new."""
        with self._lock:
            if event.step not in self._seen:
                self._seen.add(event.step)
                print(_TITLES.get(event.step, event.step), file=sys.stderr, flush=True)  # noqa: T201
            if event.note:
                print(f"  {event.subject}: {event.note}", file=sys.stderr, flush=True)  # noqa: T201


class _Amount(DownloadColumn):
    """Bytes, or the commands of a build."""

    def render(self, task: Task) -> Text:
        """What is done of how much."""
        return Text(f"{task.completed:.0f}/{task.total:.0f}") if task.fields["steps"] else super().render(task)


class _Live:
    """A bar for everything under way that has a size."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(TextColumn("{task.description:<44.44}"), BarColumn(), _Amount(), console=console,
                              transient=True)  # fmt: skip
        self._tasks: dict[tuple[str, str], TaskID] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> _Live:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, event: Event) -> None:
        """Update the bar of the event's subject; it disappears when it is done."""
        key = (event.step, event.subject)
        with self._lock:
            if event.note:
                self._bars.console.print(f"{event.subject}: {event.note}", highlight=False)
            if event.finished:
                if key in self._tasks:
                    self._bars.remove_task(self._tasks.pop(key))
            elif event.total:
                title = f"{_TITLES.get(event.step, event.step)} {event.subject}"
                task = self._tasks.get(key)
                if task is None:
                    task = self._tasks[key] = self._bars.add_task(title, total=event.total, steps=event.steps)
                self._bars.update(task, completed=event.done, total=event.total)
