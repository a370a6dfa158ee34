"""Tell what on this host keeps the bundle from serving, or will: findings by name, each with what to do about it.

    compose-doctor [--gpu] [--deep] [--imports] [--model FOLDER] [--port N] [--json]

Without options: the driver and the GPUs, the host's floors, limits, shared memory, clock, port and environment, the
cache folder, and the bundle's files by name and size. Nothing is changed, and nothing asked of the network. Exit
status: 0 if there is no error (there may be warnings), 1 if there is one, 2 for a command line that cannot be meant.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .. import PREFIX
from ..finding import Finding, error, note, warning
from ..host.detect import detect
from ..model.snapshot import faults as model_faults
from ..serve import quantization
from . import facts, gpus, machine, place, report, tree, trials

#: What a launcher found wrong with the bundle's own Python, where another runs this: evidence and fix, with a tab.
_START = "_COMPOSE_START_FAULT"
#: Kinds of findings, in the order of the report; `--model` and the trials add theirs.
_CHECKS = (
    "driver", "gpu", "library", "host", "floors", "limits", "shm", "clock", "port", "env", "prefix", "cache", "jit",
)  # fmt: skip
#: A process that imports torch takes a gigabyte and a core.
_MOST_IMPORTS = 4


class Doctor:
    """One examination: what it asks, what it found, and what it has looked at."""

    def __init__(self, prefix: str, environ: dict[str, str], asked: argparse.Namespace, start: str) -> None:
        self.prefix, self.environ, self.asked = prefix, environ, asked
        self.found: list[Finding] = []
        self.checked: list[str] = []
        self.tests: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {}
        self.manifest: dict[str, Any] = {}
        self._start = start

    def examine(self) -> None:
        """Everything that was asked for. A part that fails is a warning, and the next goes on."""
        self._part("python", self._python)
        self._part("manifest", self._manifest)
        self._part("host", self._host)
        if self.manifest:
            self._part("files", self._files)
        model = self.asked.model or self.environ.get("SGLANG_MODEL", "")
        if self.asked.model or os.path.isdir(model):  # noqa: PTH112
            self._part("model", lambda: self._model(model))
        if self.asked.imports:
            self._part("import", self._imports)
        if self.asked.gpu:
            self._part("self-test", self._self_test)

    def _part(self, name: str, examine: Callable[[], Iterable[Finding]]) -> None:
        try:
            self.found += examine()
        except Exception as fault:  # noqa: BLE001  # a fault of ours must not hide what else is wrong with the host
            self.found.append(warning(f"doctor.{name}", "compose-doctor", f"this part failed: {fault!r}",
                                      "Report it; the other parts are not concerned."))  # fmt: skip
        else:
            self.checked += _CHECKS if name == "host" else [name]

    def _python(self) -> Iterable[Finding]:
        if self._start:
            evidence, _, fix = self._start.partition("\t")
            yield error("python.start", "bin/python3", evidence, fix or None)

    def _manifest(self) -> Iterable[Finding]:
        self.manifest, found = tree.read_manifest(self.prefix)
        return found

    def _host(self) -> Iterable[Finding]:
        self.facts = facts.read(self.prefix, self.manifest, detect(), environ=self.environ, port=self.asked.port)
        return judge(self.facts)

    def _files(self) -> Iterable[Finding]:
        return tree.check(self.prefix, self.manifest, deep=self.asked.deep, jobs=_cores())

    def _model(self, folder: str) -> Iterable[Finding]:
        for one in model_faults(folder, deep=self.asked.deep):
            yield {**one, "subject": os.path.normpath(os.path.join(folder, one["subject"]))}  # noqa: PTH118
        yield from quantization.faults(quantization.method_of(Path(folder)), folder, Path(self.prefix))

    def _imports(self) -> Iterable[Finding]:
        if self._start:
            return [note("import.skipped", "bin/python3", "it does not start: see the errors above")]
        working = self.facts["nvidia"]["cuda"]["loaded"]
        return trials.imports(self.prefix, self.manifest.get("checks") or [], self.environ, driver=working,
                                     jobs=min(_cores(), _MOST_IMPORTS))  # fmt: skip

    def _self_test(self) -> Iterable[Finding]:
        if self._start or self.facts["hidden"] or self.facts["nvidia"]["cuda"]["status"] != 0:
            return [note("self-test.skipped", "GPUs", "they cannot be used: see the errors above")]
        self.tests, found = trials.self_test(self.prefix, len(self.facts.get("visible") or ()), self.environ)
        return found

    def report(self, *, as_json: bool) -> str:
        """What is printed."""
        title = (self.facts.get("bundle") or {}).get("name") or os.path.basename(self.prefix)  # noqa: PTH119
        # Nothing is found out about GPUs without their driver, nor about it where they are hidden.
        ids = {one["id"] for one in self.found}
        unseen = (
            {"driver"} if "gpu.hidden" in ids else {"gpu"} if any(one.startswith("driver.") for one in ids) else set()
        )
        checked = [name for name in self.checked if name not in unseen]
        if as_json:
            return report.as_json(title, self.found, checked, prefix=self.prefix, tests=self.tests)
        tests = [f"{one['check']} on {one['where']}: {one['seconds']} s" for one in self.tests if one["ok"]]
        text = report.as_text(f"{title} in {self.prefix}", self.found, checked)
        return "\n".join([*(f"passed: {line}" for line in tests), text])


def judge(facts: dict[str, Any]) -> Iterable[Finding]:
    """Everything that facts of a host say about a bundle on it."""
    found = list(gpus.judge(facts))
    works = not any(one["id"].startswith("driver.") for one in found) and not facts["hidden"]
    found += trials.judge_libraries(facts["libraries"], rdma=facts["rdma"], driver=works, ptx=facts["bundle"]["ptx"])
    return [*found, *machine.judge(facts), *place.judge(facts)]


def main(arguments: Sequence[str] | None = None) -> int:
    """The program."""
    asked = _parser().parse_args(arguments)
    start = os.environ.pop(_START, "")
    doctor = Doctor(PREFIX, facts.restored(), asked, start)
    try:
        doctor.examine()
        print(doctor.report(as_json=asked.json), flush=True)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1 if report.has_errors(doctor.found) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compose-doctor", description="Tell what on this host keeps the bundle from serving, and what helps.",
        epilog="Exit status: 0 without errors, 1 with, 2 for wrong arguments.", allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--gpu", action="store_true", help="also compute on every visible GPU and compare with the CPU")
    parser.add_argument("--deep", action="store_true", help="also compare the content of all files (of a model, too)")
    parser.add_argument("--imports", action="store_true", help="also import the stack's modules, without a network")
    parser.add_argument(
        "--model", metavar="FOLDER", help="look for what a model's folder lacks (default: SGLANG_MODEL, if a folder)"
    )
    parser.add_argument("--port", type=_port, metavar="N", help="the port to serve on (default: SGLANG_PORT, or 30000)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 1 to 65535")
    return int(text)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    sys.exit(main())
