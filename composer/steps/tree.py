"""The objects of a bundle, packed or unpacked, and its tree as the loader sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TypeVar

from composer.errors import VerifyError
from composer.formats.elf import Elf, is_elf, read_elf
from composer.formats.loader import Tree
from composer.model.layer import Entry
from composer.model.manifest import MANIFEST_PATH, Manifest, parse_manifest
from composer.steps.bundle import Bundle, open_bundle
from composer.steps.survey import mapped

T = TypeVar("T")
#: Makes something of the content and the path of an object.
Read = Callable[[memoryview, str], T]

_HEAD = 64


def read_tree(path: Path, *, jobs: int) -> tuple[Manifest, Tree]:
    """The manifest and the tree of a bundle file or of the folder that one was unpacked into; nothing is hashed.

    Raises VerifyError for what is no bundle, HostError for what cannot be read, ElfError for a damaged object.
    """
    manifest, objects = read_bundle(path, read_elf, jobs=jobs)
    return manifest, tree_of(manifest, objects)


def read_bundle(path: Path, read: Read[T], *, jobs: int) -> tuple[Manifest, dict[str, T]]:
    """The manifest, and what `read` makes of each object, by path; otherwise as `read_tree`."""
    if path.is_dir():
        manifest = manifest_of(path)
        return manifest, dict(_in_folder(path, manifest, read))
    bundle = open_bundle(path)
    with ThreadPoolExecutor(jobs) as pool:
        found = pool.map(lambda index: [*_in_layer(bundle, index, read)], range(len(bundle.manifest.layers)))
        return bundle.manifest, {name: made for layer in found for name, made in layer}


def tree_of(manifest: Manifest, objects: Mapping[str, Elf]) -> Tree:
    """The tree of a bundle with these objects."""
    entries = manifest.entries()
    links = {name: entry.target for name, entry in entries.items() if entry.target}
    return Tree(objects=objects, symlinks=links, files=entries.keys() - objects.keys() - links.keys())


def read_manifest(path: Path) -> tuple[Manifest, bytes]:
    """The manifest of a bundle file, or of the folder that one was unpacked into, and its JSON. Errors: `read_tree`."""
    if path.is_dir():
        return _of_folder(path)
    bundle = open_bundle(path)
    return bundle.manifest, bundle.manifest_json


def manifest_of(prefix: Path) -> Manifest:
    """The manifest of an unpacked bundle; VerifyError when the folder is none."""
    return _of_folder(prefix)[0]


def _of_folder(prefix: Path) -> tuple[Manifest, bytes]:
    try:
        data = (prefix / MANIFEST_PATH).read_bytes()
    except OSError as fault:
        raise VerifyError("is not an unpacked bundle", where=str(prefix), why=f"{MANIFEST_PATH}: {fault.strerror}",
                          fix="Give a bundle file, or the folder one was unpacked into.") from fault  # fmt: skip
    return parse_manifest(data, str(prefix)), data


def _in_folder(prefix: Path, manifest: Manifest, read: Read[T]) -> Iterator[tuple[str, T]]:
    for name in (name for name, entry in manifest.entries().items() if _may_be_object(entry)):
        path = prefix / name
        if path.is_file():
            with mapped(path) as view, memoryview(view) as content:
                if is_elf(bytes(content[:_HEAD])):
                    yield name, read(content, name)


def _in_layer(bundle: Bundle, index: int, read: Read[T]) -> Iterator[tuple[str, T]]:
    if not any(map(_may_be_object, bundle.manifest.layers[index].entries)):
        return
    for entry, content in bundle.entries(index):
        if content is not None and _may_be_object(entry):
            data = _whole(content, entry)
            if data:
                yield entry.path, read(memoryview(data), entry.path)


def _may_be_object(entry: Entry) -> bool:
    """Every object is a library by its name, or a program by its mode."""
    return entry.size >= _HEAD and (".so" in entry.path.rpartition("/")[2] or bool(entry.mode & 0o111))


def _whole(content: IO[bytes], entry: Entry) -> bytearray:
    """The content of an object; nothing of any other file."""
    data = bytearray(content.read(_HEAD))
    if not is_elf(bytes(data)):
        return bytearray()
    while chunk := content.read(entry.size - len(data)):
        data += chunk
    return data
