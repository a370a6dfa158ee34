"""Runs under the bundle's interpreter: REPORT, and `[SECONDS, [MODULE, ...]]` on standard input; imports them in order.

REPORT gets a line before and after each module: `["begin", MODULE]`, then `["end", MODULE, TRACEBACK]` with an empty
traceback if it was imported. Between them is what it tried beside, successfully or not: `["program", MODULE, PROGRAM]`
to run one, `["reach", MODULE, HOST]` to reach another machine. A module that takes longer than SECONDS ends the
process, with its stack on standard error. Standard library only, Python 3.10 to 3.13; run with -X faulthandler.
"""

import faulthandler
import importlib
import json
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

# Audit events (docs.python.org/3/library/audit_events.html), and which of their arguments says what is asked for.
PROGRAMS = {"subprocess.Popen": 0, "os.exec": 0, "os.posix_spawn": 0, "os.system": 0, "os.spawn": 1}
NAMES = ("socket.getaddrinfo", "socket.gethostbyname")
ADDRESSES = ("socket.connect", "socket.sendto")
# Names of this machine, which is there without a network.
OWN = re.compile(r"localhost|127\.|::1?\Z|0\.0\.0\.0\Z")


def main() -> None:
    """Import all; leave without the exit hooks of what was imported, which are not what is asked about."""
    seconds, modules = json.load(sys.stdin)
    report = Report(Path(sys.argv[1]))
    sys.addaudithook(report.watch)
    for module in modules:
        report.module = module
        report.add("begin")
        faulthandler.dump_traceback_later(seconds, exit=True)
        fault = import_one(module)
        faulthandler.cancel_dump_traceback_later()
        report.add("end", fault)
    os._exit(0)


class Report:
    """The lines about the module that is being imported. A hook must not open a file: that is an event, too."""

    def __init__(self, path: Path) -> None:
        self.module = ""
        self._handle = os.open(path, os.O_WRONLY | os.O_APPEND)

    def add(self, event: str, *details: str) -> None:
        """Write one line."""
        # A file name that is not UTF-8 puts surrogates into a text, which JSON cannot carry.
        plain = [text.encode(errors="backslashreplace").decode() for text in details]
        os.write(self._handle, (json.dumps([event, self.module, *plain]) + "\n").encode())

    def watch(self, event: str, args: tuple[Any, ...]) -> None:
        """The audit hook."""
        if event in PROGRAMS:
            self.add("program", os.fsdecode(args[PROGRAMS[event]]))
        elif event in NAMES:
            self.host(args[0])
        elif event in ADDRESSES and isinstance(args[1], tuple) and args[1]:  # AF_UNIX has a path instead
            self.host(args[1][0])

    def host(self, name: object) -> None:
        """What may be another machine: a name, an IP address, or nothing."""
        text = name.decode("ascii", "replace") if isinstance(name, bytes) else name
        if isinstance(text, str) and text not in ("", os.uname().nodename) and not OWN.match(text):
            self.add("reach", text)


def import_one(module: str) -> str:
    """The traceback that the import ends with, or nothing."""
    try:
        importlib.import_module(module)
    except KeyboardInterrupt:  # of whoever asked for all this
        raise
    except BaseException:  # noqa: BLE001 - a module that exits is one that cannot be imported
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    main()
