"""Runs under the bundle's interpreter: REPORT, and `[SECONDS, [MODULE, ...]]` on standard input; imports them in order.

REPORT gets a line before and after each module: `["begin", MODULE]`, then `["end", MODULE, TRACEBACK]` with an empty
traceback if it was imported. A module that takes longer than SECONDS ends the process, with its stack on standard
error. Standard library only, Python 3.10 to 3.13; run with -X faulthandler.
"""

import faulthandler
import importlib
import json
import os
import sys
import traceback
from pathlib import Path


def main() -> None:
    """Import all; leave without the exit hooks of what was imported, which are not what is asked about."""
    seconds, modules = json.load(sys.stdin)
    with Path(sys.argv[1]).open("a", encoding="utf-8") as lines:
        for module in modules:
            lines.write(json.dumps(["begin", module]) + "\n")
            lines.flush()
            faulthandler.dump_traceback_later(seconds, exit=True)
            fault = import_one(module)
            faulthandler.cancel_dump_traceback_later()
            lines.write(json.dumps(["end", module, fault]) + "\n")
            lines.flush()
    os._exit(0)


def import_one(module: str) -> str:
    """The traceback that the import ends with, or nothing."""
    try:
        importlib.import_module(module)
    except BaseException:  # noqa: BLE001 - a module that exits is one that cannot be imported
        # A file name that is not UTF-8 puts surrogates into the text, which JSON cannot carry.
        return traceback.format_exc().encode(errors="backslashreplace").decode()
    return ""


if __name__ == "__main__":
    main()
