"""Write a folder of small files, whole or not at all; and what a bundle says of itself, wherever it is."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from composer._fs import host_errors, sync_folder
from composer.errors import HostError
from composer.model.manifest import MANIFEST_PATH, Manifest, parse_manifest
from composer.steps.bundle import open_bundle


def read_manifest(path: Path) -> tuple[Manifest, str | None]:
    """The manifest of a bundle's file, of the folder it was unpacked into, or from a file of it; and the file's sha256.

    The digest is None where there is no file of a bundle. VerifyError for what is no bundle, HostError for what cannot
    be read.
    """
    with host_errors(path):
        if path.is_dir() or path.suffix == ".json":
            found = path / MANIFEST_PATH if path.is_dir() else path
            return parse_manifest(found.read_bytes(), str(found)), None
        manifest = open_bundle(path).manifest
        with path.open("rb") as stream:
            return manifest, hashlib.file_digest(stream, "sha256").hexdigest()


def write_folder(folder: Path, files: Mapping[str, str]) -> None:
    """Make `folder` hold exactly these texts. HostError when it exists and is not empty, or cannot be written."""
    with host_errors(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise HostError("exists and is not empty", where=str(folder), fix="Choose another folder, or remove it.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name[:100]}.", dir=folder.parent))
        try:
            for name, text in files.items():
                path = staging / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
            staging.chmod(0o755)
            staging.replace(folder)
            sync_folder(folder.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
