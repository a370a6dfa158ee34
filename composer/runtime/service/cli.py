"""Run the bundle's server as a service: with systemd, or with a supervisor of our own where there is none.

    compose-service [--name NAME] [--system|--user|--plain] install|uninstall|start|stop|restart|status|logs|wait

Several services, for several models, differ by their names; each has its own settings, NAME.env. Without a scope it is
the one that the service is installed in, and for `install` the system's manager for root, the user's for others, and
the supervisor where there is no systemd.

Exit status of `status`, as far as it goes that of the Linux Standard Base: 0 it runs and is healthy, 1 it failed or was
killed, 3 it is stopped, 4 it is not installed, 150 it runs and is not healthy (yet). Of the others: 0, 1 for a fault,
2 for wrong arguments, 130 for an interruption.
"""

# ruff: noqa: PTH100, PTH118, PTH119

import argparse
import json
import math
import os
import select
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .. import PREFIX
from ..serve import options
from . import environment_file, files, health
from .plain import Plain
from .spec import (
    PLAIN,
    SERVE,
    SYSTEM,
    USER,
    Service,
    ServiceError,
    UsageError,
    check_name,
    check_path,
    check_programs,
    shown,
    stable_prefix,
)
from .systemd import Systemd, booted, user_manager

FAILED, USAGE, STOPPED, ABSENT, INTERRUPTED, NOT_HEALTHY = 1, 2, 3, 4, 130, 150
_DEFAULT = "sglang"


def _scopes() -> list[Systemd | Plain]:
    return [Plain(), Systemd(USER), Systemd(SYSTEM)]


def usual_scope() -> str:
    """Where a service goes when nobody says."""
    if booted() and os.geteuid() == 0:
        return SYSTEM
    return USER if user_manager() else PLAIN


def find(name: str, scope: str | None) -> Systemd | Plain | None:
    """Who has the service; None for none."""
    return next((one for one in _scopes() if scope in (None, one.scope) and one.installed(name)), None)


def status(name: str, scope: str | None) -> tuple[dict[str, Any], int]:
    """What is known of a service, and the exit status that says so."""
    keeper = find(name, scope)
    if keeper is None:
        return {"name": name, "state": "not installed"}, ABSENT
    facts = {"name": name, "scope": keeper.scope, **keeper.status(name), "address": None, "health": None}
    if facts["pid"]:
        facts |= _health(keeper, name, facts["pid"])
    return facts, _status_of(facts)


def _health(keeper: Systemd | Plain, name: str, pid: int) -> dict[str, str]:
    """Where it listens and what it answers; nothing to who may not read the settings."""
    try:
        host, port = _address(keeper, name, pid)
    except ServiceError:
        return {}
    shown = f"[{host}]" if ":" in host else host
    return {"address": f"http://{shown}:{port}", "health": health.ask(host, port)}


def _address(keeper: Systemd | Plain, name: str, pid: int | None) -> tuple[str, int]:
    """Where a service listens. pid: its main process, if it runs.

    The program may be of the service's user's making. So for root it is run as that user, who sees nothing of root's
    environment, or not at all: then only the settings say it.
    """
    environ, command = keeper.environment(name), keeper.command(name)
    owner = health.credentials(pid) if pid else None
    if os.geteuid() == 0 and owner is None and (pid or keeper.scope == SYSTEM):
        return health.address(environ)
    if os.geteuid() == 0 and owner is not None and owner.uid != 0:
        return health.address({"PATH": os.defpath, **environ}, command, owner)
    return health.address({**files.given(), **environ}, command)


def _status_of(facts: dict[str, Any]) -> int:
    if facts["state"] == "running" and facts["health"] in (health.HEALTHY, None):
        return 0
    return {"failed": FAILED, "stopped": STOPPED}.get(facts["state"], NOT_HEALTHY)


def _status_lines(facts: dict[str, Any]) -> str:
    head = f"{facts['name']}: {facts['state']}"
    details = {
        "scope": "",
        "pid": "process ",
        "address": "",
        "health": "",
        "failures": "failures: ",
        "why": "last end: ",
    }
    return ", ".join([head, *(f"{text}{facts[key]}" for key, text in details.items() if facts.get(key))])


def _service(asked: argparse.Namespace) -> Service:
    prefix = stable_prefix(check_path(os.path.abspath(asked.prefix), "--prefix"))
    program = check_path(asked.program, "--program") if asked.program else os.path.join(prefix, "bin", SERVE)
    arguments = tuple(_words(asked))
    if not all(one.isprintable() for one in arguments):
        raise UsageError("an argument of the server has characters that are not printable")
    return Service(
        name=asked.name, prefix=prefix, program=program, arguments=arguments, run_as=asked.run_as,
        writable=tuple(check_path(one, "--writable") for one in asked.writable), start=asked.start_timeout,
        stop=asked.stop_timeout,
    )  # fmt: skip


def _words(asked: argparse.Namespace) -> list[str]:
    """What stands behind `--`."""
    words: list[str] = asked.arguments
    return words[1:] if words[:1] == ["--"] else words


def _variables(pairs: Sequence[str], service: Service) -> dict[str, str]:
    """What --set names. UsageError for what is no variable, or one that `sglang-serve` would refuse."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"--set takes NAME=VALUE, not {pair!r}")
        found[name] = value
    try:
        environment_file.render(found)
    except ServiceError as fault:
        raise UsageError(f"--set: {fault.what}", fault.fix) from None
    if os.path.basename(service.program) == SERVE:
        for one in options.from_variables(found)[1]:
            if one["severity"] == "error":
                raise UsageError(f"--set {one['subject']}: {one['evidence']}", one["fix"] or "")
    return found


def _install(asked: argparse.Namespace) -> int:
    service = _service(asked)
    variables = _variables(asked.set, service)
    scope = asked.scope or usual_scope()
    keeper = Plain() if scope == PLAIN else Systemd(scope)
    check_programs(service)
    if asked.dry_run:
        for path, text in keeper.texts(service, variables).items():
            sys.stdout.write(f"# {path}\n{text}\n")
        return 0
    other = find(service.name, None)
    if other and other.scope != scope:
        raise ServiceError(f"{service.name} is installed as a {other.scope} service", "Uninstall it first.")
    keeper.install(service, variables)
    sys.stdout.write(f"{service.name} is installed ({scope}): {shown(service)}\n")
    if scope == USER:
        sys.stdout.write("it starts with your session; with the system after `loginctl enable-linger`\n")
    return 0


def _wait(asked: argparse.Namespace) -> int:
    """In a unit the settings are in the environment already, and the command is given."""
    gone = _main_process()
    keeper = find(asked.name, asked.scope) if asked.named else None
    pid = keeper.status(asked.name)["pid"] if keeper else None
    host, port = _address(keeper, asked.name, pid) if keeper else health.address(os.environ, _words(asked))
    if health.wait(host, port, asked.timeout, gone):
        return 0
    if gone():
        raise ServiceError("the server has ended before it was healthy")
    raise ServiceError(f"no healthy server at {host} port {port} after {asked.timeout:g} s")


def _main_process() -> Callable[[], bool]:
    """Whether the unit's main process is gone: until ExecStartPost= ends, systemd does not act on its end.

    Asked of a file descriptor, as /proc of a unit may hide processes. Never, where that cannot be had.
    """
    try:
        handle = os.pidfd_open(int(os.environ.get("MAINPID", "")))
    except ProcessLookupError:
        return lambda: True
    except (OSError, ValueError):
        return lambda: False
    return lambda: bool(select.select([handle], [], [], 0)[0])


def _status(asked: argparse.Namespace) -> int:
    facts, code = status(asked.name, asked.scope)
    sys.stdout.write((json.dumps(facts) if asked.json else _status_lines(facts)) + "\n")
    return code


def _other(asked: argparse.Namespace) -> int:
    keeper = find(asked.name, asked.scope)
    if keeper is None:
        raise ServiceError(f"no service {asked.name} is installed", "Install it, or name another with --name.")
    if asked.action == "logs":
        return keeper.logs(asked.name, asked.lines, follow=asked.follow)
    getattr(keeper, asked.action)(asked.name)
    if isinstance(keeper, Plain) and asked.action in ("start", "restart"):  # systemd waits until it is healthy
        _tell_start(asked.name, keeper.settled(asked.name))
    return 0


def _tell_start(name: str, facts: dict[str, Any]) -> None:
    """Say how it began. ServiceError for a server that has ended, and is not started again."""
    if facts["state"] == "failed":
        raise ServiceError(
            f"{name} has ended at once: {facts['why']}", "See `compose-service logs`, then start it again."
        )
    sys.stdout.write(_status_lines({"name": name, **facts}) + "\n")


def _parser(program: str, prefix: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program, description="Run the bundle's server as a service.", epilog=(__doc__ or "").rpartition("\n\n")[2],
    )  # fmt: skip
    parser.add_argument(
        "--prefix", default=prefix, required=prefix is None, help="the bundle's folder, or a link to it"
    )
    parser.add_argument("--name", help=f"which service; default: {_DEFAULT}")
    scope = parser.add_mutually_exclusive_group()
    for one, text in ((SYSTEM, "the system's systemd"), (USER, "the user's systemd"), (PLAIN, "our own supervisor")):
        scope.add_argument(f"--{one}", dest="scope", action="store_const", const=one, help=text)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _install_options(actions.add_parser("install", help="write what runs it; it is not started"))
    for action, text in (("uninstall", "stop and remove it; settings and caches stay"), ("start", "start it"),
                         ("stop", "end it and its children"), ("restart", "stop and start")):  # fmt: skip
        actions.add_parser(action, help=text)
    actions.add_parser("status", help="whether it runs and serves").add_argument("--json", action="store_true")
    logs = actions.add_parser("logs", help="show what it wrote")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until interrupted")
    logs.add_argument("-n", "--lines", type=_count, default=100, help="how many; default: 100")
    wait = actions.add_parser("wait", help="until its /health answers well")
    wait.add_argument("--timeout", type=_time, default=math.inf, metavar="S", help="default: no limit")
    wait.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="that of the server, in a unit")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of lines")
    return min(int(text), sys.maxsize)


def _seconds(text: str) -> int:
    """Of a unit, for which 0 would mean no limit."""
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 1 << 31):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds: 1 or more")
    return int(text)


def _time(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not found >= 0:  # nan, too, which no time ever reaches
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds: 0 or more")
    return found


def _install_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--program", help=f"what to run; default: PREFIX/bin/{SERVE}")
    parser.add_argument("--run-as", default="", metavar="USER", help="system: default: a user made for it by systemd")
    parser.add_argument("--writable", action="append", default=[], metavar="FOLDER",
                        help="system: it may write here too, besides its cache")  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a variable of its settings")
    parser.add_argument(
        "--start-timeout", type=_seconds, default=Service.start, metavar="S", help="until it is healthy"
    )
    parser.add_argument(
        "--stop-timeout", type=_seconds, default=Service.stop, metavar="S", help="to finish its requests"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the files and write none")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- ARGUMENT", help="for the program")


def run(arguments: Sequence[str] | None, program: str, prefix: str | None) -> int:
    """The program, for a bundle's folder; None: it has to be given."""
    asked = _parser(program, prefix).parse_args(arguments)
    asked.named = asked.name is not None
    try:
        asked.name = check_name(asked.name or _DEFAULT)
        return {"install": _install, "status": _status, "wait": _wait}.get(asked.action, _other)(asked)
    except ServiceError as fault:
        sys.stderr.write(f"{program}: {fault}\n")
        return USAGE if isinstance(fault, UsageError) else FAILED
    except KeyboardInterrupt:  # of logs --follow, or of a wait
        return INTERRUPTED


def main(arguments: Sequence[str] | None = None) -> int:
    """The program."""
    return run(arguments, "compose-service", PREFIX)
