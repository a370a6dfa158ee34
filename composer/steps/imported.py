"""Import the modules of a finished bundle on this machine, where it was unpacked and again after a move."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from composer.errors import HostError
from composer.events import Event, Listener
from composer.interpreter import find_pythons
from composer.model.finding import Finding
from composer.model.manifest import HOST, Manifest
from composer.proofs.floors import check_host
from composer.proofs.imports import check_imports
from composer.runtime import floors as runtime
from composer.steps.bundle import Bundle
from composer.steps.unpack import unpack_into
from composer.store import Store

#: Finding of a machine that the bundle is not for.
SKIPPED = "import.skipped"
#: A libcuda of ours takes the driver's place, and the bundle has a C++ runtime for hosts with none.
_NOT_NEEDED = ("driver", "libstdc++ GLIBCXX")


def check_packed(bundle: Bundle, store: Store, *, jobs: int, listener: Listener) -> tuple[Finding, ...]:
    """What importing all modules of the manifest finds; a warning where this machine cannot run the bundle.

    HostError when there is no room to unpack it.
    """
    if reason := _why_not(bundle.manifest):
        return (_skipped(reason),)
    with unpacked(bundle, store, jobs=jobs, listener=listener) as prefix:
        return check_unpacked(prefix, bundle.manifest, jobs=jobs, listener=listener, moved=True)


def require_room(manifest: Manifest, store: Store, size: int) -> None:
    """HostError where there is no room to unpack a bundle of `size` bytes, whose modules can be imported here.

    For who is about to make it: of the manifest, the layers are not looked at.
    """
    if not _why_not(manifest):
        _check_room(store.root, size)


@contextlib.contextmanager
def unpacked(bundle: Bundle, store: Store, *, jobs: int, listener: Listener) -> Iterator[Path]:
    """The bundle as a folder, for as long as the block runs; HostError when there is no room for it."""
    with store.scratch() as folder:
        _check_room(folder, sum(layer.size for layer in bundle.manifest.layers))
        prefix = folder / "bundle"
        prefix.mkdir()
        unpack_into(bundle, prefix, jobs=jobs, listener=listener)
        yield prefix


def check_unpacked(prefix: Path, manifest: Manifest, *, jobs: int, listener: Listener, moved: bool = False,
                   stop: threading.Event | None = None) -> tuple[Finding, ...]:  # fmt: skip
    """The same of a folder. moved: also from another place, which only who may move the folder can ask for.

    stop: as in `check_imports`.
    """
    if reason := _why_not(manifest):
        return (_skipped(reason),)
    listener(Event(step="import", subject=manifest.name))
    # One process for the modules that need the driver, and one for the others.
    found = check_imports(prefix, manifest.checks, host=_host_python(manifest), jobs=min(jobs, 2), moved=moved,
                          stop=stop)  # fmt: skip
    listener(Event(step="import", subject=manifest.name, finished=True))
    return found


def _why_not(manifest: Manifest) -> str:
    """Why no program of the bundle runs on this machine; nothing where it does."""
    machine = manifest.target["machine"]
    if os.uname().machine != machine:
        return f"the bundle is for {machine}, this machine is {os.uname().machine}"
    if manifest.interpreter == HOST and _host_python(manifest) is None:
        return f"the bundle takes the host's CPython {manifest.target['python']}, and this machine has none"
    floors = {name: floor for name, floor in manifest.floors.items() if name not in _NOT_NEEDED}
    host = runtime.read_host({name: (floor.version, floor.because) for name, floor in floors.items()})
    return "; ".join(one.evidence for one in check_host(floors, host))


def _skipped(reason: str) -> Finding:
    return Finding(id=SKIPPED, severity="warning", subject="bin/python3",
                   evidence=f"no module was imported: {reason}",
                   fix="Run `compose verify` on a machine that the bundle is for.")  # fmt: skip


def _host_python(manifest: Manifest) -> Path | None:
    """This machine's CPython for a bundle that carries none."""
    if manifest.interpreter != HOST:
        return None
    return next((one.path for one in find_pythons((manifest.target["python"],))), None)


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise HostError(f"{needed >> 20} MiB are needed to unpack the bundle, {free >> 20} MiB are free",
                        where=str(folder),
                        fix="Free some space, set WHEEL_COMPOSER_STORE, or use --no-imports.")  # fmt: skip
