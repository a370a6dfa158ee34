"""Unpack a bundle, all layers in parallel, every byte checked before the result becomes visible."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from composer._fs import host_errors
from composer.errors import HostError, VerifyError
from composer.events import Event, Listener
from composer.model.layer import Entry
from composer.model.manifest import FINGERPRINT_PATH, MANIFEST_PATH
from composer.proofs.floors import FLOORS_PATH, render_floors
from composer.steps.bundle import Bundle
from composer.steps.host import require_host

_CHUNK = 1 << 20


def unpack(bundle: Bundle, prefix: Path, *, jobs: int, listener: Listener, any_host: bool = False) -> None:
    """Make `prefix` the unpacked bundle: whole or not at all. It must not exist, or be an empty folder.

    any_host: though this host is older than the bundle needs, which otherwise is a HostError before anything is made.
    VerifyError for content that is not the manifest's, HostError for a place that cannot be written or is in use.
    """
    if not any_host:
        require_host(bundle.manifest)
    with host_errors(prefix):
        if prefix.exists() and (not prefix.is_dir() or any(prefix.iterdir())):
            raise HostError("exists and is not empty", where=str(prefix), fix="Choose another folder, or remove it.")
        prefix.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{prefix.name[:100]}.", dir=prefix.parent))
    try:
        unpack_into(bundle, staging, jobs=jobs, listener=listener)
        with host_errors(prefix):
            staging.chmod(0o755)
            staging.replace(prefix)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def unpack_into(bundle: Bundle, folder: Path, *, jobs: int, listener: Listener) -> None:
    """Write every file of the bundle into an existing empty folder."""
    layers = bundle.manifest.layers
    largest_first = sorted(range(len(layers)), key=lambda index: -layers[index].size)

    def one(index: int) -> None:
        for entry, content in bundle.entries(index):
            with host_errors(folder):
                _write(folder, entry, content, bundle.path.name)
        listener(Event(step="unpack", subject=layers[index].name, finished=True))

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, largest_first))
    with host_errors(folder):
        manifest = folder / MANIFEST_PATH
        manifest.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_bytes(bundle.manifest_json)
        (folder / FINGERPRINT_PATH).write_text(bundle.manifest.fingerprint)
        (folder / FLOORS_PATH).write_bytes(render_floors(bundle.manifest.name, bundle.manifest.floors))


def _write(folder: Path, entry: Entry, content: IO[bytes] | None, where: str) -> None:
    path = folder / entry.path
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        if not path.is_symlink():
            path.symlink_to(entry.target or "")
        return
    # A path that two layers share has equal content in both: each writes its own copy and renames it into place.
    handle, name = tempfile.mkstemp(prefix=".part-", dir=path.parent)
    with os.fdopen(handle, "wb") as out:
        digest = copy_hashed(content, out.write)
        os.fchmod(out.fileno(), entry.mode)
    if digest != entry.sha256:
        raise VerifyError("content does not have the manifest's digest", where=f"{where}: {entry.path}",
                          why=f"expected sha256 {entry.sha256}, got {digest}",
                          fix="Copy the bundle again and compare its .sha256.")  # fmt: skip
    Path(name).replace(path)


def copy_hashed(content: IO[bytes], sink: Callable[[bytes], object]) -> str:
    """Pass all of `content` to `sink` and return its sha256."""
    digest = hashlib.sha256()
    while chunk := content.read(_CHUNK):
        digest.update(chunk)
        sink(chunk)
    return digest.hexdigest()
