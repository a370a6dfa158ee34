"""Check a bundle, packed or unpacked, against its own manifest; offline and read-only.

Content: every file the manifest lists, with its digest, and no other. Proofs: all that need the files alone. Imports:
every module that the recipe names, in a child process without a network.
"""

from __future__ import annotations

import functools
import hashlib
import os
import stat
import threading
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from posixpath import dirname
from typing import IO

import msgspec

from composer._fs import host_errors
from composer.errors import ComposerError, ElfError, WheelError
from composer.events import Event, Listener
from composer.formats.elf import is_elf
from composer.formats.python_imports import SourceImports, source_imports
from composer.model.finding import Finding
from composer.model.layer import Entry
from composer.model.manifest import FINGERPRINT_PATH, MANIFEST_PATH, Manifest, fingerprint_of
from composer.proofs.content import is_told, read_content
from composer.proofs.files import check_mode
from composer.proofs.floors import FLOORS_PATH, check_listed, file_floors, render_floors
from composer.runtime.model.archive import HUB
from composer.steps.bundle import Bundle, open_bundle
from composer.steps.imported import check_unpacked, unpacked
from composer.steps.pack import checksum_path
from composer.steps.proofs import prove_content, prove_objects
from composer.steps.survey import TEXT, ObjectFacts, mapped, object_facts
from composer.steps.tree import manifest_of
from composer.store import Store

_CHUNK, _PIECE = 8 << 20, 1 << 20
# Where `compose model add` puts models, which have lists of their own.
_ADDED = f"{dirname(HUB)}/"


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the proofs take of a bundle's files, by path: facts of objects, and texts."""

    objects: dict[str, ObjectFacts] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)


def verify(path: Path, store: Store, *, imports: bool, jobs: int,
           listener: Listener) -> tuple[Manifest, tuple[Finding, ...]]:  # fmt: skip
    """The manifest and everything found wrong or worth noting. VerifyError when there is no manifest to check against.

    imports: also import modules, which needs room to unpack a packed bundle (HostError when there is none).
    """
    if path.is_dir():
        manifest = manifest_of(path)
        stop = threading.Event()
        check = functools.partial(check_unpacked, path, manifest, jobs=jobs, listener=listener, stop=stop)
        with ThreadPoolExecutor(1) as pool:
            try:
                # Beside each other: one waits for a child process, the other for the disk.
                importing = pool.submit(check) if imports else None
                findings = [*_fingerprint(manifest), *_tree_content(path, manifest, jobs, listener)]
                findings += _unpacked(path, manifest)
                return manifest, (*findings, *(importing.result() if importing else ()))
            except BaseException:
                stop.set()
                raise
    bundle = open_bundle(path)
    findings = [*_fingerprint(bundle.manifest), *_checksum(path)]
    if not imports:
        seen, faults = _packed_content(bundle, jobs, listener)
        return bundle.manifest, (*findings, *faults, *_proofs(bundle.manifest, seen, bundle.manifest.entries().keys()))
    with unpacked(bundle, store, jobs=jobs, listener=listener) as prefix:
        findings += _tree_content(prefix, bundle.manifest, jobs, listener)
        findings += _unpacked(prefix, bundle.manifest)
        imported = check_unpacked(prefix, bundle.manifest, jobs=jobs, listener=listener, moved=True)
    return bundle.manifest, (*findings, *imported)


def _fingerprint(manifest: Manifest) -> Iterator[Finding]:
    if fingerprint_of(manifest.layers) != manifest.fingerprint:
        yield Finding(id="manifest", severity="error", subject=MANIFEST_PATH,
                      evidence="its fingerprint is not that of its layers", fix="Copy the bundle again.")  # fmt: skip


def _checksum(path: Path) -> Iterator[Finding]:
    """The file against its checksum file, when that lies beside it."""
    beside = checksum_path(path)
    if not beside.is_file():
        yield Finding(id="checksum", severity="note", subject=path.name, evidence=f"no {beside.name} beside it")
        return
    expected = beside.read_text("ascii", "replace").split()[:1]
    digest = hashlib.sha256()
    with mapped(path) as view, memoryview(view) as whole:
        for start in range(0, len(whole), _CHUNK):
            with whole[start : start + _CHUNK] as chunk:
                digest.update(chunk)
    if expected != [digest.hexdigest()]:
        yield Finding(id="checksum", severity="error", subject=path.name,
                      evidence=f"sha256 is {digest.hexdigest()}, not that of {beside.name}",
                      fix="Copy the bundle again.")  # fmt: skip


def _packed_content(bundle: Bundle, jobs: int, listener: Listener) -> tuple[_Seen, list[Finding]]:
    """What all layers hold, and faults; one inflated object per thread is in memory."""
    seen = _Seen()

    def one(index: int) -> list[Finding]:
        faults: list[Finding] = []
        for entry, content in bundle.entries(index):
            if content is not None:
                faults += _check_member(entry, content, seen)
        listener(Event(step="verify", subject=bundle.manifest.layers[index].name, finished=True))
        return faults

    sizes = [layer.size for layer in bundle.manifest.layers]
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    with ThreadPoolExecutor(jobs) as pool:
        return seen, [fault for faults in pool.map(one, order) for fault in faults]


def _check_member(entry: Entry, content: IO[bytes], seen: _Seen) -> Iterator[Finding]:
    head = content.read(64)
    kept = bytearray(head) if is_elf(head) or is_told(entry.path) else None
    digest = hashlib.sha256(head)
    while chunk := content.read(_PIECE):
        digest.update(chunk)
        if kept is not None:
            kept += chunk
    if digest.hexdigest() != entry.sha256:
        yield _changed(entry, digest.hexdigest())
    if kept is not None and is_elf(head) and not entry.path.endswith(TEXT):
        yield from _learn(seen, memoryview(kept), entry)
    elif kept is not None:
        seen.texts[entry.path] = bytes(kept)


def _changed(entry: Entry, digest: str) -> Finding:
    return Finding(id="content", severity="error", subject=entry.path,
                   evidence=f"sha256 is {digest}, the manifest says {entry.sha256}",
                   fix="Unpack the bundle again.")  # fmt: skip


def _tree_content(prefix: Path, manifest: Manifest, jobs: int, listener: Listener) -> Iterator[Finding]:
    entries = manifest.entries()
    own = {MANIFEST_PATH, FINGERPRINT_PATH, FLOORS_PATH}
    present = {path for path in _walk(prefix) if path not in own and not path.startswith(_ADDED)}
    for path in sorted(entries.keys() - present):
        yield Finding(id="missing", severity="error", subject=path, evidence="listed in the manifest, not in the tree",
                      fix="Unpack the bundle again.")  # fmt: skip
    for path in sorted(present - entries.keys()):
        yield Finding(id="extra", severity="error", subject=path, evidence="in the tree, not listed in the manifest",
                      fix="Delete it, or unpack the bundle into an empty folder.")  # fmt: skip
    with ThreadPoolExecutor(jobs) as pool:
        todo = [entries[path] for path in sorted(entries.keys() & present)]
        for found in pool.map(lambda entry: [*_check_file(prefix, entry)], todo):
            yield from found
    yield from _own_texts(prefix, manifest)
    listener(Event(step="verify", subject=str(prefix), finished=True))


def _own_texts(prefix: Path, manifest: Manifest) -> Iterator[Finding]:
    """The two files beside the manifest, which repeat a part of it for programs."""
    for path, wanted in (
        (FINGERPRINT_PATH, manifest.fingerprint.encode()),
        (FLOORS_PATH, render_floors(manifest.name, manifest.floors)),
    ):
        file = prefix / path
        if not (file.is_file() and file.read_bytes() == wanted):
            yield Finding(id="content", severity="error", subject=path, evidence="does not say what the manifest says",
                          fix="Unpack the bundle again.")  # fmt: skip


def _walk(prefix: Path) -> Iterator[str]:
    with host_errors(prefix):
        for parent, folders, names in os.walk(prefix):
            links = [name for name in folders if Path(parent, name).is_symlink()]
            for name in (*names, *links):
                yield os.path.relpath(os.path.join(parent, name), prefix)  # noqa: PTH118  (30,000 times)


def _check_file(prefix: Path, entry: Entry) -> Iterator[Finding]:
    path = prefix / entry.path
    with host_errors(path):
        now = path.lstat()
        # Not Path.readlink, which drops a leading `./`.
        target = os.readlink(path) if stat.S_ISLNK(now.st_mode) else None  # noqa: PTH115
        if target != entry.target or not (target or stat.S_ISREG(now.st_mode)):
            listed = stat.S_IFREG if entry.target is None else stat.S_IFLNK
            evidence = f"is {_kind(now.st_mode, target)} instead of {_kind(listed, entry.target)}"
            yield Finding(id="content", severity="error", subject=entry.path, evidence=evidence,
                          fix="Unpack the bundle again.")  # fmt: skip
            return
        if target is not None:
            return
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if digest != entry.sha256:
        yield _changed(entry, digest)
    yield from check_mode(entry.path, stat.S_IMODE(now.st_mode), entry.mode)


def _kind(mode: int, target: str | None) -> str:
    """What a path is, in words. What is neither file nor link is not opened: reading a pipe waits for a writer."""
    if stat.S_ISLNK(mode):
        return f"a link to {target!r}"
    return "a file" if stat.S_ISREG(mode) else "a pipe, socket or device"


def _unpacked(prefix: Path, manifest: Manifest) -> Iterator[Finding]:
    """All proofs that need the files alone, of those that are there."""
    there = {path for path, entry in manifest.entries().items() if _is_there(prefix / path, entry)}
    seen = _Seen()
    for entry in manifest.entries().values():
        path = prefix / entry.path
        if entry.target is not None or entry.path not in there:
            continue
        if is_told(entry.path) and not entry.path.endswith(".py"):
            seen.texts[entry.path] = path.read_bytes()
        elif entry.size >= 64 and not entry.path.endswith(TEXT) and _is_object(path):
            with mapped(path) as view, memoryview(view) as content:
                yield from _learn(seen, content, entry)
    yield from _proofs(manifest, seen, there, prefix)


def _is_there(path: Path, entry: Entry) -> bool:
    """Whether a file or link of the manifest is in the tree, and as such; its content is not looked at."""
    with host_errors(path):
        return path.is_symlink() if entry.target is not None else path.is_file() and not path.is_symlink()


def _learn(seen: _Seen, content: memoryview, entry: Entry) -> Iterator[Finding]:
    """The facts of an object; a finding for one that is what the manifest lists, and yet none can read."""
    try:
        seen.objects[entry.path] = object_facts(content, entry.path)
    except ElfError as fault:
        yield _malformed(entry.path, fault)


def _malformed(path: str, fault: ComposerError) -> Finding:
    return Finding(id="content.malformed", severity="error", subject=path, evidence=fault.what,
                   fix="Take another file in the recipe: this one was packed as it is.")  # fmt: skip


def _is_object(path: Path) -> bool:
    with host_errors(path), path.open("rb") as handle:
        return is_elf(handle.read(64))


def _proofs(manifest: Manifest, seen: _Seen, there: AbstractSet[str], prefix: Path | None = None) -> Iterator[Finding]:
    """All proofs that need the files alone.

    there: paths of the manifest that are in the tree. prefix: where sources are that are not in `seen`.
    """
    contents = {}
    for layer in manifest.layers:
        told = [(one.path, seen.texts[one.path]) for one in layer.entries
                if one.path in seen.texts and not one.path.endswith(".py")]  # fmt: skip
        try:
            contents[layer.name] = read_content(told)
        except WheelError as fault:
            yield _malformed(fault.where or layer.name, fault)

    def imports_of(path: str) -> SourceImports | None:
        """Sources are many, and few of them are reached: they are read when they are asked for."""
        if path in seen.texts:
            return source_imports(seen.texts[path])
        told = prefix is not None and path.endswith(".py") and path in there
        return source_imports((prefix / path).read_bytes()) if prefix and told else None

    kernels = {path: one.kernel for path, one in seen.objects.items() if one.kernel}
    wanted = file_floors({path: one.elf for path, one in seen.objects.items()}, kernels)
    yield from check_listed(manifest.floors, wanted)
    layers = [msgspec.structs.replace(layer, entries=[one for one in layer.entries if one.path in there])
              for layer in manifest.layers]  # fmt: skip
    # What is gone is no library that another could load.
    yield from prove_objects(msgspec.structs.replace(manifest, layers=layers), seen.objects)
    yield from prove_content(manifest, contents, imports_of)
