"""Several releases side by side: unpack the next, switch to it and back at once, and remove old ones.

    ROOT/releases/NAME-FINGERPRINT/    unpacked bundles, which never change
    ROOT/current                       a link to the one in use; replaced by one rename
    ROOT/previous                      a link to the one before it

What `ln` and `mv -T` make by hand is the same. Commands take turns by a lock on ROOT/.lock; readers need none.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from composer._fs import host_errors, sync_folder
from composer.errors import HostError
from composer.events import Listener
from composer.model.manifest import FINGERPRINT_PATH, Manifest
from composer.runtime.staging import sweep
from composer.steps.bundle import Bundle
from composer.steps.host import require_host
from composer.steps.processes import Process, users_of
from composer.steps.staging import remove_folder
from composer.steps.unpack import unpack

#: Hexadecimal digits of the fingerprint in a release's name.
_DIGITS = 12
_CURRENT, _PREVIOUS = "current", "previous"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """Names of releases: what was (or would be) removed, and what a process still uses."""

    removed: tuple[str, ...]
    used: dict[str, Process]


def release_name(manifest: Manifest) -> str:
    """NAME-FINGERPRINT: bundles that were made with different options share their name only."""
    return f"{manifest.name}-{manifest.fingerprint[:_DIGITS]}"


def add(bundle: Bundle, root: Path, *, jobs: int, listener: Listener, any_host: bool = False) -> Path:
    """Unpack a bundle as a release, if it is not there yet, and make it the current one; returns its folder.

    It is on the disk before `current` leads to it. Errors as of `unpack`, and then `current` is as it was.
    """
    if not any_host:
        require_host(bundle.manifest)
    name = release_name(bundle.manifest)
    release = _folder(root) / name
    with _turn(root):
        sweep(_folder(root))
        unpack(bundle, release, jobs=jobs, listener=listener, any_host=True, durable=True)
        _switch(root, name)
    return release


def rollback(root: Path, name: str | None = None) -> str:
    """Make the previous release, or the one with this name, the current one; returns its name.

    The one that was current becomes the previous one, so a second rollback undoes the first. HostError when there is
    none to go back to.
    """
    _require(root)
    with _turn(root):
        present = _releases(root)
        wanted = name or _linked(root, _PREVIOUS)
        if wanted not in present:
            raise HostError(f"has no release {name!r}" if name else "has no previous release", where=str(root),
                            fix=f"Choose one with --to: {', '.join(present) or 'there is none'}.")  # fmt: skip
        if wanted == _linked(root, _CURRENT):
            raise HostError(f"{wanted} is the current release already", where=str(root),
                            fix="Choose another one with --to.")  # fmt: skip
        _switch(root, wanted)
    return wanted


def prune(root: Path, *, keep: int, dry_run: bool = False) -> Pruned:
    """Remove all releases but `keep` (at least 1): the current one, the previous one, and the newest others.

    What a process uses stays, too, and is not counted. Also removed is what killed commands left. dry_run: only tell.
    """
    _require(root)
    with _turn(root), host_errors(root):
        kept = _keepers(root)[:keep]
        surplus = [name for name in _releases(root) if name not in kept]
        used = users_of([_folder(root) / name for name in surplus])
        named = {folder.name: process for folder, process in used.items()}
        removed = tuple(name for name in surplus if name not in named)
        if not dry_run:
            sweep(_folder(root))
            for name in removed:
                _remove(root, name)
    return Pruned(removed=removed, used=named)


def _keepers(root: Path) -> list[str]:
    """All releases, those to be kept first."""
    first = [_linked(root, _CURRENT), _linked(root, _PREVIOUS)]
    present = _releases(root)
    return [name for name in dict.fromkeys([*first, *present]) if name in present]


def _remove(root: Path, name: str) -> None:
    if _linked(root, _PREVIOUS) == name:
        (root / _PREVIOUS).unlink()
    remove_folder(_folder(root) / name)


def _folder(root: Path) -> Path:
    return root / "releases"


def _require(root: Path) -> None:
    if not _folder(root).is_dir():
        raise HostError("holds no releases", where=str(root), fix="Give the folder of `compose unpack --releases`.")


def _releases(root: Path) -> list[str]:
    """Names of the unpacked bundles, the newest first."""
    with host_errors(root):
        found = [one for one in _folder(root).iterdir() if not one.name.startswith(".") and not one.is_symlink()]
        bundles = [one for one in found if (one / FINGERPRINT_PATH).is_file()]
        return [one.name for one in sorted(bundles, key=lambda one: (-one.stat().st_mtime_ns, one.name))]


def _linked(root: Path, link: str) -> str:
    """The name of the release that a link leads to, relative or not; nothing for another place."""
    with host_errors(root):
        found = (root / link).resolve()
        return found.name if found.parent == _folder(root).resolve() else ""


def _switch(root: Path, name: str) -> None:
    """Make a release the current one. Between the two renames a kill leaves `current` whole: the new or the old one."""
    before = _linked(root, _CURRENT)
    if before == name:
        return
    if before == "":
        _point(root, _CURRENT, name)
        return
    if _linked(root, _PREVIOUS) == name:
        # Back: were `previous` changed first, a kill would lose what to go back to.
        _point(root, _CURRENT, name)
        _point(root, _PREVIOUS, before)
    else:
        _point(root, _PREVIOUS, before)
        _point(root, _CURRENT, name)


def _point(root: Path, link: str, name: str) -> None:
    """Replace a link by one rename: whoever opens a path through it finds the old release or the new one."""
    with host_errors(root / link):
        fresh = root / f".{link}.part"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(f"releases/{name}")
        fresh.replace(root / link)
        sync_folder(root)


@contextlib.contextmanager
def _turn(root: Path) -> Iterator[None]:
    """Wait until no other command changes this root. The kernel ends the turn of a process that dies."""
    with host_errors(root):
        _folder(root).mkdir(parents=True, exist_ok=True)
        with (root / ".lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
