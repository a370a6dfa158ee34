"""The facts that proofs of a bundle's texts take, gathered from an unpacked one."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from composer.formats.python_imports import SourceImports, source_imports
from composer.model.layer import Entry, Layer
from composer.model.manifest import MANIFEST_PATH, parse_manifest
from composer.proofs.content import Composed, is_told, read_content
from composer.steps.resolve import marker_environment


def as_composed(prefix: Path, *hooks: str) -> Composed:
    """A bundle as its manifest has it; sources are read when they are asked for."""
    manifest = parse_manifest((prefix / MANIFEST_PATH).read_bytes(), str(prefix))

    def imports_of(path: str) -> SourceImports | None:
        return source_imports((prefix / path).read_bytes()) if path.endswith(".py") else None

    made = Composed(
        layers=manifest.layers,
        contents={},
        environment=marker_environment(manifest.python, manifest.target["machine"]),
        sms=manifest.sms,
        roots=[check.module for check in manifest.checks],
        hooks=hooks,
        imports_of=imports_of,
    )
    return with_layers(made, prefix, manifest.layers)


def as_found(prefix: Path, *hooks: str) -> Composed:
    """The same with what is on disk now: what is gone is gone, and what is new belongs to the last layer."""
    said = as_composed(prefix, *hooks)
    known = said.entries
    new = [found(prefix, Entry(path=path)) for path in walk(prefix) if path not in known]
    *first, last = [
        msgspec.structs.replace(
            layer, entries=[found(prefix, one) for one in layer.entries if os.path.lexists(prefix / one.path)]
        )
        for layer in said.layers
    ]
    return with_layers(said, prefix, [*first, msgspec.structs.replace(last, entries=[*last.entries, *new])])


def with_layers(made: Composed, prefix: Path, layers: Sequence[Layer]) -> Composed:
    """Other layers, and what their texts say; imports are read later."""
    contents = {
        layer.name: read_content(
            (one.path, (prefix / one.path).read_bytes()) for one in layer.entries
            if is_told(one.path) and not one.path.endswith(".py") and (prefix / one.path).is_file()
        )
        for layer in layers
    }  # fmt: skip
    return replace(made, layers=layers, contents=contents)


def without(made: Composed, name: str) -> Composed:
    """The bundle without one distribution."""
    layers = [layer for layer in made.layers if layer.name != name]
    return replace(made, layers=layers, contents={key: one for key, one in made.contents.items() if key != name})


def found(prefix: Path, said: Entry) -> Entry:
    path = prefix / said.path
    if path.is_symlink():
        return Entry(path=said.path, target=str(path.readlink()))
    data, mode = path.read_bytes(), path.stat().st_mode & 0o7777
    return msgspec.structs.replace(said, mode=mode, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def walk(prefix: Path) -> Iterator[str]:
    """Every file and link below a folder, but for what the manifest does not list."""
    for parent, folders, names in os.walk(prefix):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        for path in (Path(parent, name).relative_to(prefix).as_posix() for name in (*names, *links)):
            if not path.startswith("share/compose/"):
                yield path


def rewrite(prefix: Path, path: str, change: Callable[[bytes], bytes]) -> None:
    """Change a file and its row in RECORD, so that nothing but the content is odd."""
    replace_file(prefix / path, change((prefix / path).read_bytes()))
    data = (prefix / path).read_bytes()
    for record in prefix.glob("lib/*/site-packages/*.dist-info/RECORD"):
        name = os.path.relpath(prefix / path, record.parents[1])
        rows = record.read_text().splitlines()
        changed = [row_of(name, data) if row.rsplit(",", 2)[0] == name else row for row in rows]
        replace_file(record, "".join(f"{row}\n" for row in changed).encode())


def replace_file(path: Path, data: bytes) -> None:
    """A new file: the old one may be a hard link of the tree that others use."""
    path.unlink()
    path.write_bytes(data)


def row_of(name: str, data: bytes) -> str:
    """A row of RECORD."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(data)}"
