"""Compare the bundle's files with its manifest, where the `compose` tool is not: `compose verify` for its contents.

Quickly: every file is there, with its size, its kind and, for programs, the right to run it; and no other is. Deeply:
its sha256, too. Findings have the ids that `compose verify` gives them.
"""

# 39,000 paths, and twice as many in their listing: pathlib would take longer than the file system.
# ruff: noqa: PTH115, PTH118, PTH123

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..finding import Finding, error, warning

MANIFEST = "share/compose/manifest.json"
_FINGERPRINT, _FLOORS = "share/compose/fingerprint", "share/compose/floors"
#: What is written into a bundle on its host: models (share/models), and state of our own programs.
_ADDED = ("share/models/",)
#: What a deployment may edit: docs/reference/environment.md of wheel-composer.
_EDITABLE = "etc/env"
_AGAIN = "Unpack the bundle again."
_COPY = "Copy the bundle again."
_CHUNK = 1 << 20

Manifest = Mapping[str, Any]


def read_manifest(prefix: str) -> tuple[dict[str, Any], list[Finding]]:
    """The manifest, or nothing and why; one whose fingerprint is not that of its layers is both."""
    path = os.path.join(prefix, MANIFEST)
    try:
        with open(path, "rb") as stream:
            manifest = json.load(stream)
        wanted = _fingerprint(manifest)
        for layer in manifest["layers"]:
            for entry in layer["entries"]:
                entry["path"].split("/")
    except OSError as fault:
        return {}, [error("manifest", MANIFEST, fault.strerror or str(fault), _AGAIN)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
        return {}, [error("manifest", MANIFEST, f"damaged: {fault!r}", _AGAIN)]
    if manifest.get("fingerprint") != wanted:
        return manifest, [error("manifest", MANIFEST, "its fingerprint is not that of its layers", _COPY)]
    return manifest, []


def check(prefix: str, manifest: Manifest, *, deep: bool, jobs: int) -> list[Finding]:
    """All differences between the tree and its manifest, in the order of paths; deep: read every byte."""
    entries = {entry["path"]: entry for layer in manifest["layers"] for entry in layer["entries"]}
    found: list[Finding] = []
    present = dict(_walk(prefix, "", found))
    for path in sorted(entries.keys() - present.keys()):
        found.append(error("missing", path, "listed in the manifest, not in the tree", _AGAIN))
    for path in sorted(present.keys() - entries.keys() - {MANIFEST, _FINGERPRINT, _FLOORS}):
        if not path.startswith(_ADDED):
            found.append(error("extra", path, "in the tree, not listed in the manifest",
                               "Delete it, or unpack the bundle into an empty folder."))  # fmt: skip
    common = sorted(entries.keys() & present.keys())
    for path in common:
        found += _compare(prefix, entries[path], present[path])
    found += _own_texts(prefix, manifest)
    if deep:
        faulty = {one["subject"] for one in found}
        found += _contents(prefix, [entries[path] for path in common if path not in faulty], jobs)
    return found


def _fingerprint(manifest: Manifest) -> str:
    """sha256 over names and digests of layers; a layer's is that over the digests of its parts."""
    digest = hashlib.sha256()
    for layer in manifest["layers"]:
        parts = "".join(f"{part['digest']}\n" for part in layer["parts"])
        digest.update(f"{layer['name']}={hashlib.sha256(parts.encode()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _walk(prefix: str, below: str, found: list[Finding]) -> Iterator[tuple[str, os.stat_result]]:
    """(path, status) of all but folders; a link to a folder is a link."""
    try:
        with os.scandir(os.path.join(prefix, below)) as listing:
            rows = [(f"{below}{one.name}", one.stat(follow_symlinks=False)) for one in listing]
    except OSError as fault:
        found.append(error("content", below or prefix, f"cannot be listed: {fault.strerror}",
                           "Give this user the right to read it."))  # fmt: skip
        return
    for path, status in rows:
        if stat.S_ISDIR(status.st_mode):
            yield from _walk(prefix, f"{path}/", found)
        else:
            yield path, status


def _compare(prefix: str, entry: Mapping[str, Any], status: os.stat_result) -> Iterator[Finding]:
    path, target = entry["path"], entry.get("target")
    is_link = stat.S_ISLNK(status.st_mode)
    if is_link or target is not None:
        has = os.readlink(os.path.join(prefix, path)) if is_link else "a file"
        if has != target:
            wanted = f"a link to {target!r}" if target is not None else "a file"
            yield error("content", path, f"is {has!r} instead of {wanted}", _AGAIN)
    elif status.st_size != entry.get("size", 0) or not stat.S_ISREG(status.st_mode):
        yield _other(path, f"has {status.st_size} bytes, the manifest says {entry.get('size', 0)}")
    elif entry.get("mode", 0o644) & 0o100 and not status.st_mode & 0o111:
        yield error("files.mode", path, "may not be run: its execute permission is lost",
                    f"chmod a+x it. {_AGAIN} Copies by way of FAT, SMB or object storage lose it.")  # fmt: skip


def _own_texts(prefix: str, manifest: Manifest) -> Iterator[Finding]:
    """The two files beside the manifest, which repeat a part of it for programs."""
    rows = [(name, one["version"], one["because"]) for name, one in (manifest.get("floors") or {}).items()]
    floors = "".join("\t".join(row) + "\n" for row in [(manifest.get("name") or "",), *rows])
    for path, wanted in ((_FINGERPRINT, manifest.get("fingerprint") or ""), (_FLOORS, floors)):
        try:
            with open(os.path.join(prefix, path), "rb") as stream:
                has = stream.read()
        except OSError:
            has = b""
        if has != wanted.encode():
            yield error("content", path, "does not say what the manifest says", _AGAIN)


def _contents(prefix: str, entries: list[Mapping[str, Any]], jobs: int) -> list[Finding]:
    """hashlib and the kernel work outside of the interpreter's lock. The largest go first: a file is one thread's."""
    todo = sorted((one for one in entries if one.get("target") is None), key=lambda one: -one.get("size", 0))
    with ThreadPoolExecutor(jobs) as pool:
        found = [fault for fault in pool.map(lambda one: _content(prefix, one), todo) if fault]
    return sorted(found, key=lambda one: str(one["subject"]))


def _content(prefix: str, entry: Mapping[str, Any]) -> Finding | None:
    path = entry["path"]
    digest = hashlib.sha256()
    try:
        with open(os.path.join(prefix, path), "rb", 0) as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    except OSError as fault:
        return error("content", path, f"cannot be read: {fault.strerror}", _AGAIN)
    if digest.hexdigest() == entry.get("sha256"):
        return None
    return _other(path, f"sha256 is {digest.hexdigest()}, the manifest says {entry.get('sha256')}")


def _other(path: str, evidence: str) -> Finding:
    """Another content than that of the manifest."""
    if path == _EDITABLE:
        return warning("content", path, evidence, "It was edited, which it may be: see that every line is meant.")
    return error("content", path, evidence, _AGAIN)
