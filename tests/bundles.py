"""Small real bundles from files at hand, without a recipe, an index or an interpreter."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from composer.events import silent
from composer.model.layer import Entry, Layer
from composer.model.manifest import Floor, Manifest, fingerprint_of
from composer.steps.layer import LayerWriter, stored_layer
from composer.steps.pack import Ready, pack
from composer.store import Store, key_of

#: By path: content, or a link's target.
Files = Mapping[str, bytes | str]
_MTIME = 315_532_800


def make_bundle(
    output: Path, layers: Mapping[str, Files], *, store: Path, floors: Mapping[str, Floor] | None = None,
    lie: Callable[[Entry], Entry] | None = None,
) -> Manifest:  # fmt: skip
    """Write a bundle of these layers. Files in bin/ are programs. lie: what its manifest says instead of an entry."""
    shelf = Store(store)
    ready = [_ready(shelf, name, files) for name, files in layers.items()]

    def manifest_of(done: list[Layer]) -> Manifest:
        told = [msgspec.structs.replace(one, entries=[lie(entry) if lie else entry for entry in one.entries])
                for one in done]  # fmt: skip
        return Manifest(
            name=output.name.removesuffix(".tar.zst"), fingerprint=fingerprint_of(done), composer="0",
            recipe={"name": "small", "version": "1.0"}, lock="",
            target={"sm": "90", "isa": "avx2", "cuda": "12.8", "python": "3.12", "machine": os.uname().machine},
            python="3.12", interpreter="host", torch="wheel", serve=None, floors=floors or {}, checks=[], left_out=[],
            warnings=[], layers=told,
        )  # fmt: skip

    return pack(shelf, ready, manifest_of, output, mtime=_MTIME, listener=silent, accept=lambda _bundle: None)[1]


def _ready(store: Store, name: str, files: Files) -> Ready:
    def fill(writer: LayerWriter) -> Layer:
        for path, content in files.items():
            if isinstance(content, str):
                writer.link(path, content)
            else:
                digest = hashlib.sha256(content).hexdigest()
                writer.file(path, (content,), size=len(content), expected=digest,
                            mode=0o755 if path.startswith("bin/") else 0o644)  # fmt: skip
        return writer.finish(name=name, version="1.0")

    key = key_of("test", 1, name=name, files={path: str(content) for path, content in files.items()})
    return Ready(key=key, layer=stored_layer(store, key, fill, level=1, mtime=_MTIME), fresh=True)
