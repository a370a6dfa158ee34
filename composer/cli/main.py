"""The entry point: runs a command and turns what happened into an exit code."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from types import FrameType

import click

from composer.errors import ComposerError, HostError

_INTERRUPTED = 130
_TERMINATED = 143


class _Terminated(BaseException):
    """SIGTERM, as an exception, so that temporary files are removed on the way out."""


def main() -> None:
    """Run `compose` and leave with the exit code of what happened (see composer.errors)."""
    signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        # Here, because loading everything takes a moment in which ^C must be answered, too.
        from composer.cli.commands import compose

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
        # Who reads our output went away: nothing more can be said.
        _silence()
        sys.exit(1)
    except OSError as fault:
        # Files are translated where they are used; what is left is our own output.
        _silence()
        _show(HostError(fault.strerror or str(fault), where=fault.filename or "standard output"))
        sys.exit(HostError.exit_code)


def _silence() -> None:
    """Keep the interpreter's own flush at exit from failing again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _raise_terminated(_signal: int, _frame: FrameType | None) -> None:
    raise _Terminated


def _show(fault: ComposerError) -> None:
    if "--debug" in sys.argv:
        traceback.print_exception(fault)
    click.echo(f"error: {fault}", err=True)
