"""One locked artifact as a file: its place in the store, and whether bytes are the locked ones."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

from composer._fs import atomic_file, host_errors
from composer.errors import IntegrityError
from composer.model.lock import Artifact

#: Bytes that are read at a time.
CHUNK = 1 << 20
#: What to do about bytes that are not the locked ones.
CHECK_SOURCE = "Do not use this file. If the source is right, run `compose lock` again and review what changed."


def artifact_path(store: Path, artifact: Artifact) -> Path:
    """The place of `artifact` in the folder `store`, whether it is there or not."""
    return store / "artifacts" / artifact.sha256[:2] / artifact.sha256 / artifact.filename


def is_present(path: Path, artifact: Artifact, *, verify: bool) -> bool:
    """Whether a regular file of the locked size is there; its bytes were verified before it got its name."""
    try:
        found = path.lstat()
    except OSError:
        return False
    if not stat.S_ISREG(found.st_mode) or found.st_size != (artifact.size or found.st_size):
        return False
    return not verify or _sha256(path) == artifact.sha256


def _sha256(path: Path) -> str:
    with host_errors(path), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def copy_artifact(source: Path, path: Path, artifact: Artifact) -> None:
    """Copy a local file, whole and verified, or raise IntegrityError and leave nothing."""
    digest, length = hashlib.sha256(), 0
    with atomic_file(path, mode=0o444) as target, source.open("rb") as stream:
        while length <= (artifact.size or length) and (chunk := stream.read(CHUNK)):
            digest.update(chunk)
            length += len(chunk)
            target.write(chunk)
        if digest.hexdigest() != artifact.sha256:
            raise mismatch(artifact, str(source), digest.hexdigest(), length)


def mismatch(artifact: Artifact, where: str, sha256: str, size: int) -> IntegrityError:
    """The error for bytes that are not those of `artifact`; sha256, size: theirs."""
    if artifact.size and size != artifact.size:
        got = f"{'more than ' * (size > artifact.size)}{min(size, artifact.size)} bytes"
        return IntegrityError(
            "not the locked size", where=where, why=f"expected {artifact.size} bytes, got {got}", fix=CHECK_SOURCE
        )
    return IntegrityError(
        "not the locked bytes", where=where, why=f"expected sha256 {artifact.sha256}, got {sha256}", fix=CHECK_SOURCE
    )
