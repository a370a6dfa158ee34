"""Start sglang's server as variables, a profile and the command line say.

    sglang-serve [--profile NAME] [--preflight] [--dry-run] [--print-cmd] [--strict] [--json] [-- FLAG...]

Settings are variables: SGLANG_MODEL, SGLANG_HOST, SGLANG_PORT, SGLANG_SERVED_NAME, SGLANG_ATTENTION_BACKEND,
SGLANG_DISABLE_CUDA_GRAPH, SGLANG_DTYPE, SGLANG_TP_SIZE, SGLANG_PREFERRED_SAMPLING_PARAMS, SGLANG_EXTRA_ARGS,
SGLANG_PREFLIGHT, SGLANG_MODEL_ENV_FILE. Flags of sglang's own go into SGLANG_EXTRA_ARGS or behind `--`. The later of
these wins: profile, variables, SGLANG_EXTRA_ARGS, `--`.

Exit status: 0 for --dry-run, 1 this host (nothing to write to, no such address, no interpreter), 2 a command line,
variable or profile that cannot be meant, 3 the port is held by another user's process, 4 by one that cannot be found,
5 by one of this user, 6 the model is not there, not whole or quantised in a way that this SGLang does not know, 7 there
is no GPU; once started, the server's own.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ..finding import error
from ..model.place import place_here
from . import preflight
from .launch import Launch, planned
from .options import truth
from .report import HOST, USAGE, Refusal, shown

_NOTES = {"bundle": " (bundled)", "cache": " (cached)", "hub": " (will download from HF)"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the server in the place of this process, or say what would be started."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    own, passed = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    report: dict[str, Any] = {"schema": 1, "status": 0}
    try:
        options, unknown = _parser().parse_known_args(own)
        if unknown:
            evidence = f"Unknown flag: {unknown[0]} (all sglang options are set via env vars)"
            raise Refusal(USAGE, error("serve.flag", unknown[0], evidence, "Put flags of sglang behind --."))
        launch = planned(place_here(), profile=options.profile, passed=passed, starting=not options.dry_run)
        report |= _told(launch)
        _check(launch, options, report)
        _announce(launch, options, report)
        return 0 if options.dry_run else _start(launch)
    except Refusal as refusal:
        sys.stderr.write(shown(refusal.findings))
        _print({**report, "status": refusal.status, "findings": refusal.findings}, asked="--json" in own)
        return refusal.status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """A command line that cannot be meant: told like every other refusal, as JSON, too."""
        raise Refusal(USAGE, error("serve.flag", self.prog, message, f"See {self.prog} --help."))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("sglang-serve", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--profile", metavar="NAME", default="", help="settings by the name of a launch profile")
    parser.add_argument("--preflight", action="store_true", help="check the port first, as SGLANG_PREFLIGHT=1 does")
    parser.add_argument("--print-cmd", action="store_true", help="print the command on stderr before the start")
    parser.add_argument("--dry-run", action="store_true", help="print the command on stderr and start nothing")
    parser.add_argument("--strict", action="store_true", help="start nothing if there is a warning")
    parser.add_argument("--json", action="store_true", help="print what was decided as one line of JSON on stdout")
    return parser


def _told(launch: Launch) -> dict[str, Any]:
    """The launch as JSON. Of the environment only what is changed: the rest may hold secrets."""
    before = os.environ
    changed = {name: value for name, value in launch.environ.items() if before.get(name) != value}
    removed = sorted(name for name in before if name not in launch.environ)
    model = {"asked": launch.model.asked, "source": launch.model.source, "path": launch.model.path}
    return {"command": launch.command, "environment": {"set": changed, "removed": removed}, "model": model,
            "port": {"port": launch.port, "host": launch.host}, "findings": launch.findings}  # fmt: skip


def _check(launch: Launch, options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Raise Refusal for warnings that are to count as errors, and for a port that cannot be had."""
    warnings = [one for one in launch.findings if one["severity"] == "warning"]
    if options.strict and warnings:
        raise Refusal(USAGE, *({**one, "severity": "error"} for one in warnings))
    if options.preflight or truth(os.environ.get("SGLANG_PREFLIGHT", "")):
        report["port"] = preflight.port_state(launch.port, launch.host)
        if not report["port"]["free"]:
            raise preflight.port_refusal(report["port"])


def _announce(launch: Launch, options: argparse.Namespace, report: Mapping[str, Any]) -> None:
    model = launch.model.asked if launch.model.local else launch.model.path
    lines = [
        "SGLang server starting",
        f"  model: {model}{_NOTES.get(launch.model.source, '')}",
        f"  host: {launch.host}  port: {launch.port}",
    ]
    if options.print_cmd or options.dry_run:
        lines.append(f"CMD: {shlex.join(launch.command)}")
    sys.stderr.write(shown(launch.findings) + "".join(f"{line}\n" for line in lines))
    _print(report, asked=options.json)


def _print(report: Mapping[str, Any], *, asked: bool) -> None:
    if asked:
        print(json.dumps(report), flush=True)


def _start(launch: Launch) -> int:
    sys.stderr.flush()
    try:
        os.execve(launch.command[0], launch.command, launch.environ)  # noqa: S606
    except OSError as fault:
        evidence = f"cannot be started: {fault.strerror}"
        raise Refusal(HOST, error("serve.python", launch.command[0], evidence, "Unpack the bundle again.")) from None


if __name__ == "__main__":
    sys.exit(main())
