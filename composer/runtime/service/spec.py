"""What a service of a bundle is, and where its files are."""

# Folders are named by strings, as in the units and plans that they are written to.
# ruff: noqa: PTH110, PTH111, PTH113, PTH114, PTH117, PTH118, PTH120

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
#: The bundle's own server.
SERVE = "sglang-serve"
SYSTEM, USER, PLAIN = SCOPES = ("system", "user", "plain")


class ServiceError(Exception):
    """What went wrong, and what the reader can do."""

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what)
        self.what, self.fix = what, fix

    def __str__(self) -> str:
        return f"{self.what}\n  fix: {self.fix}" if self.fix else self.what


class UsageError(ServiceError):
    """A command line that cannot be meant."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """One server: what is run, as whom, and how long it may take.

    prefix: the bundle, or a link to it that upgrades replace. run_as: a user of the system; nothing for one that
    systemd makes for the service. writable: folders besides the cache. start, stop: seconds.
    """

    name: str
    prefix: str
    program: str
    arguments: tuple[str, ...] = ()
    run_as: str = ""
    writable: tuple[str, ...] = ()
    start: int = 1800
    stop: int = 120


@dataclass(frozen=True, kw_only=True)
class Places:
    """The folders of a scope: of units, of the settings (NAME.env), and of what a plain supervisor keeps."""

    units: str
    settings: str
    state: str

    def settings_file(self, name: str) -> str:
        """What a service's environment is read from."""
        return os.path.join(self.settings, f"{name}.env")


def places(scope: str, environ: Mapping[str, str]) -> Places:
    """Where the files of a scope are: systemd.unit(5) and the XDG base directory specification."""
    home = _home(environ)
    config = environ.get("XDG_CONFIG_HOME") or os.path.join(home, ".config")
    state = environ.get("XDG_STATE_HOME") or os.path.join(home, ".local", "state")
    if scope == SYSTEM:
        return Places(units="/etc/systemd/system", settings="/etc/compose", state="")
    return Places(
        units=os.path.join(config, "systemd", "user"),
        settings=os.path.join(config, "compose"),
        state=os.path.join(state, "compose"),
    )


def _home(environ: Mapping[str, str]) -> str:
    """The user's home. That which a bundle makes for a user without one would change with every version: see
    `composer.runtime.environment`.
    """
    home, cache = environ.get("HOME") or os.path.expanduser("~"), environ.get("COMPOSE_CACHE")
    return os.path.join(os.path.dirname(cache), "home") if cache and home.startswith(f"{cache}/") else home


def check_name(name: str) -> str:
    """A name that is a file name and a unit name without escapes; UsageError for another."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} cannot be the name of a service", "Use letters, digits and . _ -, at most 64.")
    return name


def check_path(path: str, what: str) -> str:
    """An absolute path that can be written in a line of text; UsageError for another."""
    if not os.path.isabs(path) or not path.isprintable():
        raise UsageError(f"{what} is no absolute path of printable characters: {path!r}")
    return os.path.normpath(path)


def stable_prefix(prefix: str) -> str:
    """`current` beside the bundle, when it is a link to it: then an upgrade needs a restart and no new unit."""
    current = os.path.join(os.path.dirname(prefix), "current")
    return current if os.path.islink(current) and os.path.realpath(current) == os.path.realpath(prefix) else prefix


def check_programs(service: Service) -> None:
    """ServiceError unless what the service runs is there."""
    if service.program == os.path.join(service.prefix, "bin", SERVE) and not os.path.exists(service.program):
        raise ServiceError(f"this bundle has no {SERVE}: name the server with --program")
    for program in (service.program, own_program(service)):
        if not os.access(program, os.X_OK) or not os.path.isfile(program):
            raise ServiceError(f"{program} is no program", "Give the folder of a bundle with --prefix.")


def own_program(service: Service) -> str:
    """The bundle's `compose-service`."""
    return os.path.join(service.prefix, "bin", "compose-service")


def shown(service: Service) -> str:
    """The command line, for people."""
    return shlex.join([service.program, *service.arguments])
