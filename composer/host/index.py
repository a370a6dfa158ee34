"""What is known of bundles before one is fetched: the list that `compose select` reads, `index.json`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from composer._fs import host_errors, write_atomic
from composer.errors import VerifyError
from composer.model.manifest import Manifest
from composer.steps.bundle import Bundle, open_bundle

SCHEMA = 1
INDEX_NAME = "index.json"
#: A bundle takes 1.4 KB of it.
MAX_BYTES = 64 << 20
SUFFIX = ".tar.zst"

_Text = Annotated[str, msgspec.Meta(pattern=r"\A[^\x00-\x1f\x7f-\x9f]*\Z", max_length=1000)]
_Size = Annotated[int, msgspec.Meta(ge=0)]
_Sha256 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class NeededFloor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A floor of the manifest."""

    version: _Text
    because: _Text


class BundleTarget(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a bundle was built for. sm: as words, `90` or `80 90`."""

    sm: _Text
    isa: _Text
    cuda: _Text
    python: _Text
    machine: _Text


class BundleFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A bundle as far as choosing it goes.

    file: relative to the index. sha256: of the file; None where nobody has computed it. size, unpacked: bytes.
    """

    file: _Text
    sha256: _Sha256 | None
    size: _Size
    unpacked: _Size
    name: _Text
    fingerprint: _Text
    recipe: _Text
    version: _Text
    target: BundleTarget
    floors: Mapping[_Text, NeededFloor]


class Index(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The bundles of one place."""

    schema: int
    bundles: tuple[BundleFacts, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Damaged:
    """A file that is called a bundle and is none."""

    file: str
    why: str


def parse_index(data: bytes, where: str) -> Index:
    """An index from its JSON. VerifyError for any other, and for files that are not beside or below it."""
    try:
        index = msgspec.json.decode(data, type=Index)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as fault:
        raise VerifyError("not an index of bundles", where=where, why=str(fault),
                          fix="Write it with `compose select --write-index FOLDER`.") from fault  # fmt: skip
    if index.schema != SCHEMA:
        raise VerifyError(f"index schema {index.schema} is not {SCHEMA}", where=where)
    VerifyError.collect([
        VerifyError("not the path of a bundle below the index", where=f"{where}: {one.file!r}")
        for one in index.bundles if not _inside(one.file)
    ])  # fmt: skip
    return index


def _inside(file: str) -> bool:
    parts = file.split("/")
    return file.endswith(SUFFIX) and "\\" not in file and not {"", ".", ".."} & set(parts)


def read_folder(folder: Path) -> tuple[list[BundleFacts], list[Damaged]]:
    """Every bundle in a folder by its manifest, and the files that are none. Nothing is unpacked or hashed."""
    found: list[BundleFacts] = []
    damaged: list[Damaged] = []
    with host_errors(folder):
        paths = sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIX))
    for path in paths:
        try:
            found.append(read_bundle(path))
        except VerifyError as fault:
            damaged.append(Damaged(file=path.name, why=fault.what))
    return found, damaged


def read_bundle(path: Path) -> BundleFacts:
    """The facts of one bundle. VerifyError where it is damaged, or was made by another version."""
    bundle = open_bundle(path)
    with host_errors(path):
        size = path.stat().st_size
    return _facts(bundle, size, _sidecar(path))


def _facts(bundle: Bundle, size: int, sha256: str | None) -> BundleFacts:
    manifest: Manifest = bundle.manifest
    try:
        return msgspec.convert({
            "file": bundle.path.name, "sha256": sha256, "size": size,
            "unpacked": sum(layer.size for layer in manifest.layers), "name": manifest.name,
            "fingerprint": manifest.fingerprint, "recipe": manifest.recipe["name"],
            "version": manifest.recipe["version"], "target": dict(manifest.target),
            "floors": {name: {"version": one.version, "because": one.because} for name, one in manifest.floors.items()},
        }, BundleFacts)  # fmt: skip
    except msgspec.ValidationError as fault:
        raise VerifyError("the manifest does not say what the bundle is for", where=bundle.path.name,
                          why=str(fault)) from fault  # fmt: skip


def _sidecar(path: Path) -> str | None:
    """What the `.sha256` beside a bundle says: `HEX  NAME`."""
    try:
        text = path.with_name(f"{path.name}.sha256").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.match(r"([0-9a-f]{64})[ \t]", text)
    return found[1] if found else None


def write_index(folder: Path) -> tuple[Path, Index]:
    """Write the index of a folder's bundles into it. A bundle without a `.sha256` is hashed; a damaged one is an error.

    The digest is the sidecar's where there is one: `sha256sum -c` tells whether it is true.
    """
    found, damaged = read_folder(folder)
    VerifyError.collect([VerifyError(one.why, where=one.file) for one in damaged])
    digests = {one.file: one.sha256 or _hash(folder / one.file) for one in found}
    bundles = tuple(msgspec.structs.replace(one, sha256=digests[one.file]) for one in found)
    index = Index(schema=SCHEMA, bundles=bundles)
    path = folder / INDEX_NAME
    write_atomic(path, msgspec.json.format(msgspec.json.encode(index), indent=1) + b"\n")
    return path, index


def _hash(path: Path) -> str:
    with host_errors(path), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
