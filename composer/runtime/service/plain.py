"""A service without systemd: a supervisor process, and a folder with its plan, state and log."""

# ruff: noqa: PTH108, PTH110, PTH118, PTH123

import collections
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import IO, Any

from . import files, supervisor
from .spec import PLAIN, Places, Service, ServiceError, places

_MORE = 10.0  # seconds that a stop may take beyond the grace time
_TURN = 0.05


class Plain:
    """The services of this user that a supervisor each keeps running."""

    scope = PLAIN

    def __init__(self, found: Places | None = None) -> None:
        self._places = found or places(PLAIN, os.environ)

    def _folder(self, name: str) -> str:
        return os.path.join(self._places.state, name)

    def installed(self, name: str) -> bool:
        """Whether there is a plan."""
        return os.path.exists(os.path.join(self._folder(name), "service.json"))

    def texts(self, service: Service, variables: Mapping[str, str]) -> dict[str, str]:
        """The files of a service by path: the settings, then the plan."""
        settings, folder = self._places.settings_file(service.name), self._folder(service.name)
        plan = supervisor.Plan(argv=[service.program, *service.arguments], log=os.path.join(folder, "log"),
                               grace=service.stop)  # fmt: skip
        return {
            settings: files.settings_text(settings, service, variables),
            os.path.join(folder, "service.json"): json.dumps(
                {"prefix": service.prefix, "plan": asdict(plan)}, indent=2
            ),
        }

    def install(self, service: Service, variables: Mapping[str, str]) -> None:
        """Write the plan and its settings."""
        if service.run_as:
            raise ServiceError("without systemd a service runs as who starts it", "Leave --run-as out.")
        for place, text in self.texts(service, variables).items():
            files.write(place, text, 0o600)

    def uninstall(self, name: str) -> None:
        """Stop, and remove the plan and the logs. Settings and caches stay."""
        self.stop(name)
        with files.translated(self._folder(name)):
            shutil.rmtree(self._folder(name))

    def start(self, name: str) -> None:
        """Start the supervisor; it outlives the terminal."""
        left = self._left(name)
        if left:
            raise ServiceError(f"{name} runs already", "Use restart.")
        environ = {**files.given(), **self.environment(name)}
        # Without `site`, which would fix what depends on the bundle's version for all starts to come. -B: it is `site`
        # that keeps bytecode out of the bundle.
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", supervisor.__file__, self._folder(name)], env=environ, cwd="/",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        with child.stdout as answer:  # type: ignore[union-attr]  # it is a pipe
            said = answer.readline().decode().strip()
        if said != "ok":
            raise ServiceError(f"the supervisor of {name} did not start: {said or 'it ended'}")

    def settled(self, name: str) -> dict[str, Any]:
        """The status of a service that was just started, after the time in which one ends that refuses to run."""
        seconds = _plan(self._folder(name)).settle
        _until(lambda: self.status(name)["state"] != "running", seconds)
        return self.status(name)

    def restart(self, name: str) -> None:
        """Stop and start; the settings are read again."""
        self.stop(name)
        self.start(name)

    def stop(self, name: str) -> None:
        """Stop, and wait for the end of every process. Nothing is done to one that is stopped."""
        folder = self._folder(name)
        state = supervisor.read_state(folder)
        head = supervisor.identity_in(state, "supervisor")
        if head and supervisor.send(head, signal.SIGTERM):
            grace = _plan(folder).grace
            if not _until(lambda: not supervisor.lives(head), grace + _MORE):
                raise ServiceError(f"the supervisor of {name}, process {head.pid}, does not end")
        self._end_orphans(name)
        with files.translated(folder):
            if os.path.exists(os.path.join(folder, "state.json")):
                os.unlink(os.path.join(folder, "state.json"))

    def _end_orphans(self, name: str) -> None:
        """What a supervisor that was killed has left running."""
        folder = self._folder(name)
        program = supervisor.identity_in(supervisor.read_state(folder), "program")
        if program and supervisor.send(program, signal.SIGTERM):
            _until(lambda: not supervisor.lives(program), _plan(folder).grace)

        def gone() -> bool:
            left = self._left(name)
            for who in left:
                supervisor.send(who, signal.SIGKILL)
            return not left

        if not _until(gone, _MORE):
            raise ServiceError(f"processes of {name} do not end: {', '.join(str(one.pid) for one in self._left(name))}")

    def _left(self, name: str) -> list[supervisor.Identity]:
        """Every process of the service, its supervisor apart."""
        state = supervisor.read_state(self._folder(name))
        return supervisor.marked(str(state["mark"])) if state and state.get("mark") else []

    def status(self, name: str) -> dict[str, Any]:
        """What the supervisor last wrote, if it still runs."""
        state = supervisor.read_state(self._folder(name))
        if state is None:
            return {"state": "stopped", "pid": None, "failures": 0, "why": None}
        program = supervisor.identity_in(state, "program")
        runs, why = str(state.get("state")), state.get("ended")
        if runs != "failed" and not supervisor.lives(supervisor.identity_in(state, "supervisor")):
            runs, why = "failed", "its supervisor was killed"
        pid = program.pid if program and supervisor.lives(program) else None
        return {"state": runs, "pid": pid, "failures": state.get("failures", 0), "why": why}

    def logs(self, name: str, lines: int, *, follow: bool) -> int:
        """Show the last lines, and what comes after them."""
        path = os.path.join(self._folder(name), "log")
        try:
            with files.translated(path):
                shown, more = _last(path, lines), _after(path) if follow else iter(())
            for piece in itertools.chain([b"".join(shown)], more):
                sys.stdout.buffer.write(piece)
                sys.stdout.flush()
        except BrokenPipeError:  # `| head` has seen enough, and Python would say so again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0

    def environment(self, name: str) -> dict[str, str]:
        """The variables of its settings."""
        return files.environment(self._places, name)

    def command(self, name: str) -> Sequence[str]:
        """The program and its arguments; none in a damaged plan."""
        return _plan(self._folder(name)).argv


def _plan(folder: str) -> supervisor.Plan:
    """A service's plan; one with the usual times where it is damaged, as a stop must still stop."""
    try:
        return supervisor.load_plan(folder)
    except ValueError:
        return supervisor.Plan(argv=(), log="")


def _until(true: Any, seconds: float) -> bool:  # noqa: ANN401
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() >= end:
            return False
        time.sleep(_TURN)
    return True


def _last(path: str, count: int) -> list[bytes]:
    """The last lines of a log and, if it is new, of the one before it."""
    found: collections.deque[bytes] = collections.deque(maxlen=count)
    for one in (f"{path}.1", path):
        if os.path.exists(one):
            with open(one, "rb") as stream:
                found.extend(stream)
    return list(found)


def _after(path: str) -> Iterator[bytes]:
    """What is appended from now on, over changes of the file."""
    stream = open(path, "rb")  # noqa: SIM115  # another one takes its place
    stream.seek(0, os.SEEK_END)
    return _followed(stream, path)


def _followed(stream: IO[bytes], path: str) -> Iterator[bytes]:
    while True:
        if piece := stream.read(1 << 16):
            yield piece
        elif _replaced(stream, path):
            # Between the last read and the change something may have been written.
            yield stream.read()
            stream.close()
            stream = open(path, "rb")  # noqa: SIM115
        else:
            time.sleep(0.2)


def _replaced(stream: IO[bytes], path: str) -> bool:
    try:
        return not os.path.samestat(os.fstat(stream.fileno()), os.stat(path))  # noqa: PTH116
    except FileNotFoundError:  # between two renames
        return False
