"""Which processes of this host use files of a folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A process, with the start of its command line."""

    pid: int
    command: str


def users_of(folders: Sequence[Path]) -> dict[Path, Process]:
    """By folder, a process that has its program, its working folder, its root or a mapped file there.

    Files are known by path, and by device and inode, because a container has other paths for the host's files. Of
    processes that may not be looked at (another user's), the command line is searched for the folder's path.
    """
    marks = {folder: (f"{folder.resolve()}/", _inodes(folder)) for folder in folders}
    found: dict[Path, Process] = {}
    for place in _PROC.iterdir():
        if not place.name.isdigit() or len(found) == len(marks):
            continue
        paths, inodes = _seen(place)
        for folder, (path, own) in marks.items():
            if folder not in found and (any(f"{one}/".startswith(path) for one in paths) or inodes & own):
                found[folder] = Process(pid=int(place.name), command=" ".join(_command(place))[:80])
    return found


def _inodes(folder: Path) -> frozenset[tuple[int, int]]:
    """(device, inode) of every file of a folder."""
    device = folder.stat().st_dev
    return frozenset((device, inode) for inode in _walk(folder))


def _walk(folder: Path) -> Iterator[int]:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(Path(entry.path))
            else:
                yield entry.inode()


def _seen(place: Path) -> tuple[set[str], set[tuple[int, int]]]:
    """The paths, and the (device, inode) of the files, that a process works with."""
    paths: set[str] = set()
    inodes: set[tuple[int, int]] = set()
    for name in ("cwd", "exe", "root"):
        with contextlib.suppress(OSError):
            paths.add(os.fspath((place / name).readlink()))
    try:
        for line in (place / "maps").read_text("utf-8", "replace").splitlines():
            _, _, _, device, inode, *path = line.split(None, 5)
            major, minor = (int(number, 16) for number in device.split(":"))
            if inode != "0":
                inodes.add((os.makedev(major, minor), int(inode)))
                paths.update(path)
    except (OSError, ValueError):
        paths.update(_command(place))
    return paths, inodes


def _command(place: Path) -> list[str]:
    try:
        return (place / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    except OSError:  # it has ended
        return []
