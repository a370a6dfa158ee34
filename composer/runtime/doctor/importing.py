"""Import one module, as a program of its own that the doctor watches.

    python -m _compose.doctor.importing MODULE REPORT

The network is refused to Python's sockets; the HTTP of other programs goes to a proxy that is not there. REPORT, a
file, gets a JSON line for each event: `["reach", HOST]` and `["program", NAME]` for what the import asked for, and
`["end", TRACEBACK]`, empty if it was imported. Audit events: docs.python.org/3/library/audit_events.html.
"""

import errno
import importlib
import json
import os
import re
import sys
import traceback
from typing import Any

_PROGRAMS = {"subprocess.Popen": 0, "os.exec": 0, "os.posix_spawn": 0, "os.system": 0, "os.spawn": 1}
_NAMES = ("socket.getaddrinfo", "socket.gethostbyname")
_ADDRESSES = ("socket.connect", "socket.sendto")
#: Where the doctor sends HTTP: port 1, where nobody listens. Who connects to it meant another machine.
PROXY = ("127.0.0.1", 1)
#: Names of this machine, which is there without a network.
_OWN = re.compile(r"localhost|127\.|::1?\Z|0\.0\.0\.0\Z")


def main() -> None:
    """Leave without the exit hooks of what was imported, which are not what is asked about."""
    module, report = sys.argv[1:]
    handle = os.open(report, os.O_WRONLY | os.O_APPEND)

    def add(*row: str) -> None:
        os.write(handle, (json.dumps(row) + "\n").encode())

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event in _PROGRAMS:
            add("program", os.fsdecode(args[_PROGRAMS[event]]))
        elif event in _NAMES or (event in _ADDRESSES and isinstance(args[1], tuple) and args[1]):
            _refuse(args[0] if event in _NAMES else _host(args[1]), add)

    sys.addaudithook(watch)
    try:
        importlib.import_module(module)
    except BaseException:  # noqa: BLE001  # a module that exits is one that cannot be imported
        add("end", traceback.format_exc())
    else:
        add("end", "")
    os._exit(0)


def _host(address: tuple[Any, ...]) -> object:
    return "another machine by HTTP" if address == PROXY else address[0]


def _refuse(host: object, add: Any) -> None:  # noqa: ANN401
    """OSError for another machine."""
    text = host.decode("ascii", "replace") if isinstance(host, bytes) else host
    if isinstance(text, str) and text not in ("", os.uname().nodename) and not _OWN.match(text):
        add("reach", text)
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))


if __name__ == "__main__":
    main()
