"""Write the files of a service: whole or not at all, and never over those of others."""

# ruff: noqa: PTH103, PTH105, PTH108, PTH120, PTH123

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping

from . import environment_file
from .spec import Places, Service, ServiceError

_SETTINGS = """\
# The environment of the service {name}: one NAME="value" a line, as systemd reads it. A restart takes a change up.
# Tokens may be kept here: only the owner can read this file.
#SGLANG_MODEL="/srv/models/name"
#SGLANG_HOST="0.0.0.0"
#SGLANG_PORT="30000"
#SGLANG_TP_SIZE="1"
#SGLANG_EXTRA_ARGS="--mem-fraction-static 0.85"
#HF_TOKEN=""
"""


@contextlib.contextmanager
def translated(path: str) -> Iterator[None]:
    """An OSError as a ServiceError that names the file."""
    try:
        yield
    except OSError as fault:
        fix = "Run it as root, or use --user or --plain." if isinstance(fault, PermissionError) else ""
        raise ServiceError(f"{fault.filename or path}: {fault.strerror}", fix) from fault


def read(path: str) -> str | None:
    """The text of a file; None where there is none."""
    with translated(path):
        try:
            with open(path, encoding="utf-8") as stream:
                return stream.read()
        except FileNotFoundError:
            return None
        except UnicodeDecodeError as fault:
            raise ServiceError(f"{path} is not UTF-8") from fault


def write(path: str, text: str, mode: int) -> None:
    """Replace a file; its folder is made."""
    folder = os.path.dirname(path)
    with translated(path):
        os.makedirs(folder, mode=0o755, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".compose-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fchmod(handle, mode)
                os.fsync(handle)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


def settings_text(path: str, service: Service, variables: Mapping[str, str]) -> str:
    """What the settings file is to hold: what it holds, or the first one, with `variables` set."""
    text = read(path)
    return environment_file.update(_SETTINGS.format(name=service.name) if text is None else text, variables, path)


def given() -> dict[str, str]:
    """The environment that this process was started with; the bundle's interpreter has added to os.environ.

    Without SGLANG_ variables: those of a service are its settings', whoever starts it or asks for its state.
    """
    with open("/proc/self/environ", "rb") as stream:
        pairs = [os.fsdecode(pair).partition("=") for pair in stream.read().split(b"\0")]
    return {name: value for name, equals, value in pairs if name and equals and not name.startswith("SGLANG_")}


def environment(found: Places, name: str) -> dict[str, str]:
    """The variables of a service."""
    path = found.settings_file(name)
    return environment_file.parse(read(path) or "", path)
