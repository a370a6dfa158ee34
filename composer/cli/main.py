"""The entry point: runs a command and turns what happened into an exit code."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from types import FrameType

import click

from composer.cli.commands import compose
from composer.errors import ComposerError

_INTERRUPTED = 130
_TERMINATED = 143


class _Terminated(BaseException):
    """SIGTERM, as an exception, so that temporary files are removed on the way out."""


def main() -> None:
    """Run `compose` and leave with the exit code of what happened (see composer.errors)."""
    signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        compose.main(standalone_mode=False)
    except click.ClickException as fault:
        fault.show()
        sys.exit(fault.exit_code)
    except ComposerError as fault:
        _show(fault)
        sys.exit(fault.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; the same command goes on from here", err=True)
        sys.exit(_INTERRUPTED)
    except _Terminated:
        click.echo("terminated; the same command goes on from here", err=True)
        sys.exit(_TERMINATED)
    except BrokenPipeError:
        # Who reads our output went away. Nothing more can be said, also not by the interpreter's own flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _raise_terminated(_signal: int, _frame: FrameType | None) -> None:
    raise _Terminated


def _show(fault: ComposerError) -> None:
    if "--debug" in sys.argv:
        traceback.print_exception(fault)
    click.echo(f"error: {fault}", err=True)
