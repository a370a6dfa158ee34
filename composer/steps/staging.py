"""A private folder beside a destination, that becomes it by one rename or vanishes (`runtime.staging`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from composer._fs import host_errors, sync_folder
from composer.runtime import staging


@contextlib.contextmanager
def staging_folder(destination: Path) -> Iterator[Path]:
    """An empty folder on the file system of `destination`; it is removed at the end of the block if still there.

    HostError where it cannot be made.
    """
    with contextlib.ExitStack() as stack:
        with host_errors(destination):
            folder = stack.enter_context(staging.staging_folder(destination.parent, destination.name))
        yield folder


def put_in_place(folder: Path, destination: Path) -> None:
    """Make a staged folder the destination, which must not exist, or be an empty folder."""
    with host_errors(destination):
        folder.chmod(0o755)
        folder.replace(destination)
        sync_folder(destination.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder: at once for those who look at it, and for good even when this process is killed meanwhile."""
    with staging_folder(folder) as trash, host_errors(folder):
        folder.replace(trash)
