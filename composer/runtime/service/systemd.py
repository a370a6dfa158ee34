"""A service as a systemd unit, of the system's manager or of the user's."""

# ruff: noqa: PTH108, PTH110, PTH112, PTH118, S607

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from . import files
from .spec import USER, Places, Service, ServiceError, places
from .unit import MARK, command, unit

_FIELDS = ("LoadState", "ActiveState", "SubState", "MainPID", "NRestarts", "Result")
_STATES = {"active": "running", "activating": "starting", "reloading": "running", "deactivating": "stopping",
           "failed": "failed", "inactive": "stopped"}  # fmt: skip


class Systemd:
    """The services of one manager."""

    def __init__(self, scope: str, found: Places | None = None) -> None:
        self.scope, self._user = scope, scope == USER
        self._places = found or places(scope, os.environ)

    def _unit_file(self, name: str) -> str:
        return os.path.join(self._places.units, f"{name}.service")

    def installed(self, name: str) -> bool:
        """Whether there is a unit of ours."""
        return (files.read(self._unit_file(name)) or "").startswith(MARK)

    def texts(self, service: Service, variables: Mapping[str, str]) -> dict[str, str]:
        """The files of a service by path: the settings, then the unit."""
        settings = self._places.settings_file(service.name)
        text = unit(service, settings, user=self._user, version=version(), modprobe=shutil.which("nvidia-modprobe"))
        return {
            settings: files.settings_text(settings, service, variables),
            self._unit_file(service.name): text,
        }

    def install(self, service: Service, variables: Mapping[str, str]) -> None:
        """Write the unit and its settings and enable it: it starts with the system, or with the user's session."""
        if not booted():
            raise ServiceError("no systemd runs here", "Use --plain, or --dry-run to see the files.")
        path = self._unit_file(service.name)
        if files.read(path) is not None and not self.installed(service.name):
            raise ServiceError(f"{path} is not ours", "Choose another --name.")
        for place, text in self.texts(service, variables).items():
            files.write(place, text, 0o644 if place == path else 0o600)
        self._control("daemon-reload")
        self._control("enable", f"{service.name}.service")

    def uninstall(self, name: str) -> None:
        """Stop and remove the unit. Settings and caches stay."""
        self._control("disable", "--now", f"{name}.service")
        with files.translated(self._unit_file(name)):
            os.unlink(self._unit_file(name))
        self._control("daemon-reload")

    def start(self, name: str) -> None:
        """Start, and wait until it is healthy."""
        self._fresh("start", name)

    def restart(self, name: str) -> None:
        """Stop and start."""
        self._fresh("restart", name)

    def stop(self, name: str) -> None:
        """Stop."""
        self._control("stop", f"{name}.service")

    def _fresh(self, verb: str, name: str) -> None:
        # Somebody who starts a service by hand has seen to why it failed: the start limit begins anew.
        self._control("reset-failed", f"{name}.service", check=False)
        self._control(verb, f"{name}.service")

    def status(self, name: str) -> dict[str, Any]:
        """What the manager knows of it."""
        shown = self._control("show", f"{name}.service", f"--property={','.join(_FIELDS)}")
        facts = dict(line.partition("=")[::2] for line in shown.splitlines())
        state = _STATES.get(facts.get("ActiveState", ""), "unknown")
        return {
            "state": "waiting" if facts.get("SubState") == "auto-restart" else state,
            "pid": int(facts.get("MainPID") or 0) or None,
            "failures": int(facts.get("NRestarts") or 0),
            "why": None if facts.get("Result") in (None, "", "success") else facts["Result"],
        }

    def logs(self, name: str, lines: int, *, follow: bool) -> int:
        """Show the journal of the unit; journalctl's exit status."""
        words = ["journalctl", *self._manager(), "--unit", f"{name}.service", "--no-pager", f"--lines={lines}"]
        return _call([*words, "--follow"] if follow else words)

    def environment(self, name: str) -> dict[str, str]:
        """The variables of its settings."""
        return files.environment(self._places, name)

    def command(self, name: str) -> list[str]:
        """The program and its arguments."""
        return command(files.read(self._unit_file(name)) or "")

    def _manager(self) -> Sequence[str]:
        return ["--user"] if self._user else []

    def _control(self, *words: str, check: bool = True) -> str:
        call = ["systemctl", *self._manager(), *words]
        try:
            done = subprocess.run(call, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        except OSError as fault:
            raise ServiceError(
                f"systemctl cannot be run: {fault.strerror}", "Use --plain where there is no systemd."
            ) from fault
        if check and done.returncode:
            why = done.stderr.strip() or f"exit status {done.returncode}"
            raise ServiceError(f"{' '.join(call)}: {why}", "See `compose-service logs`.")
        return done.stdout


def _call(command: Sequence[str]) -> int:
    try:
        return subprocess.run(command, check=False).returncode
    except OSError as fault:
        raise ServiceError(f"{command[0]} cannot be run: {fault.strerror}") from fault


def version() -> int:
    """Of systemd, 0 where that cannot be found out."""
    try:
        done = subprocess.run(["systemctl", "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return 0
    found = re.match(r"systemd (\d+)", done.stdout)
    return int(found[1]) if found else 0


def booted() -> bool:
    """Whether this system runs systemd: sd_booted(3)."""
    return os.path.isdir("/run/systemd/system")


def user_manager() -> bool:
    """Whether this user has a manager to talk to."""
    return booted() and os.path.exists(os.path.join(os.environ.get("XDG_RUNTIME_DIR", ""), "systemd", "private"))
