"""Prove that the files of a bundle get along: with each other, with the kernel and with their distributions' RECORD."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from posixpath import dirname, join, normpath

import msgspec

from composer.errors import WheelError
from composer.formats.elf import Elf
from composer.formats.loader import Tree
from composer.formats.record import RecordRow, parse_record
from composer.model.finding import Finding
from composer.model.layer import Entry

_BAD_BITS = ((0o6000, "runs with the rights of its owner or group"), (0o002, "anyone may change it"))
#: Modules that CPython's `site` imports by name at every start, wherever they come from.
_AT_START = ("sitecustomize", "usercustomize")
_SHOWN_FAULTS = 5
_GPU_CODE = (("cuda", 64), ("amdgpu", 64))
_SHARED = re.compile(r"/(?:__init__\.py|__pycache__/__init__\.[a-z0-9-]+\.pyc)\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Owned:
    """One distribution, or another part of a bundle, and its files: paths with the digest of what is there.

    The digest is None where it is not known: a link, or a file that is still to be written.
    """

    name: str
    files: Mapping[str, str | None]


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """A RECORD: its own path below the prefix, and sha256 (hexadecimal) and size of each row by path, likewise.

    fault: why it cannot be read.
    """

    path: str
    rows: Mapping[str, tuple[str | None, int | None]] = {}
    fault: str | None = None


def owned(name: str, entries: Iterable[Entry]) -> Owned:
    """The files of a layer."""
    return Owned(name=name, files={entry.path: entry.sha256 or None for entry in entries})


def read_recorded(path: str, data: bytes) -> Recorded:
    """The facts of the RECORD at `path`; damage is a fact, too."""
    try:
        rows = parse_record(data)
    except WheelError as fault:
        return Recorded(path=path, fault=fault.what)
    site = dirname(dirname(path))
    return Recorded(path=path, rows={normpath(f"{site}/{name}"): _cells(row) for name, row in rows.items()})


def _cells(row: RecordRow) -> tuple[str | None, int | None]:
    return (row.sha256.hex() if row.sha256 else None, row.size)


def check_collisions(parts: Sequence[Owned]) -> tuple[Finding, ...]:
    """Paths that two distributions own, and paths that only some file systems can tell apart.

    Equal content is allowed for a package's `__init__.py` alone: that is how namespace folders are shared. A name that
    differs in case or in Unicode's composition is a warning: Linux keeps both, and where it does not, one is lost.
    """
    owners: dict[str, Owned] = {}
    found = []
    for part in parts:
        for path in part.files:
            first = owners.setdefault(path, part)
            if first is not part and not _is_shared(path, first, part):
                found.append(_collision(path, f"owned by both {first.name} and {part.name}"))
    folders = {folder for path in owners for folder in _folders(path)}
    found += [_collision(path, f"a file of {owners[path].name}, and a folder") for path in owners.keys() & folders]
    return tuple(sorted([*found, *_look_alikes(owners)], key=lambda one: (one.subject, one.id)))


def check_entries(entries: Iterable[Entry], tree: Tree) -> tuple[Finding, ...]:
    """Modes that give others more than they should have, and links that lead out of the bundle or nowhere."""
    return tuple(finding for entry in entries for finding in _check_entry(entry, tree))


def check_mode(path: str, mode: int, listed: int) -> tuple[Finding, ...]:
    """What an unpacked file's mode gives to others, or no longer gives to its owner, unlike the one that is listed.

    Rights that a umask took from others are no fault.
    """
    faults = [f"mode {mode:04o}: {what}" for bits, what in _BAD_BITS if mode & bits & ~listed]
    if listed & 0o100 and not mode & 0o100:
        faults.append(f"mode {mode:04o}: it cannot be run")
    return tuple(
        Finding(id="files.mode", severity="error", subject=path, evidence=fault, fix="Unpack the bundle again.")
        for fault in faults
    )


def check_machine(objects: Mapping[str, Elf], machine: str) -> tuple[Finding, ...]:
    """Programs and libraries for other processors than `machine`, by path; no host of the bundle can load them.

    The loader passes such a library over, and a wheel's tag does not tell. GPU code in ELF files and what only a linker
    reads are for no host's processor.
    """
    return tuple(
        Finding(
            id="files.machine", severity="error", subject=path,
            evidence=f"is for {_processor(elf)}, the bundle for {machine}",
            fix="Prune it, or take the wheel for that machine.",
        )
        for path, elf in sorted(objects.items())
        if (elf.dynamic or elf.kind == "executable") and (elf.machine, elf.bits) not in ((machine, 64), *_GPU_CODE)
    )  # fmt: skip


def _processor(elf: Elf) -> str:
    return elf.machine if elf.bits == 64 else f"{elf.machine} ({elf.bits} bits)"


def check_start(pth: Mapping[str, bytes], allowed: Collection[str], modules: Iterable[str] = ()) -> tuple[Finding, ...]:
    """What runs at every start of the interpreter.

    pth: content of the `.pth` files of site-packages, by path. allowed: paths of what may execute code. modules: all
    files of the bundle, of which `sitecustomize` and its like run, too.
    """
    found = [finding for path, content in sorted(pth.items()) for finding in _check_pth(path, content, allowed)]
    for path in sorted(modules):
        folder, _, name = path.rpartition("/")
        if name.partition(".")[0] in _AT_START and folder.endswith("/site-packages") and path not in allowed:
            found.append(_runs(path, "Python imports it by its name"))
    return tuple(found)


def check_record(record: Recorded, entries: Sequence[Entry]) -> tuple[Finding, ...]:
    """Every file of a distribution (its layer's `entries`) is in its RECORD as it is in the bundle, and nothing else.

    RECORD itself and links, which a wheel cannot hold, are not.
    """
    if record.fault:
        return (_recorded(record, f"cannot be read: {record.fault}"),)
    files = {entry.path: entry for entry in entries if entry.target is None and entry.path != record.path}
    rows = {path: cells for path, cells in record.rows.items() if path != record.path}
    faults = [f"{path} is not in it" for path in sorted(files.keys() - rows.keys())]
    faults += [f"{path} is not in the bundle" for path in sorted(rows.keys() - files.keys())]
    for path in sorted(files.keys() & rows.keys()):
        faults += _differs(files[path], *rows[path])
    shown = [_recorded(record, fault) for fault in faults[:_SHOWN_FAULTS]]
    more = len(faults) - _SHOWN_FAULTS
    return (*shown, *([_recorded(record, f"and {more} more of the kind")] if more > 0 else []))


def _is_shared(path: str, first: Owned, second: Owned) -> bool:
    digest = first.files[path]
    return bool(_SHARED.search(path)) and digest is not None and second.files[path] == digest


def _folders(path: str) -> Iterator[str]:
    while path := dirname(path):
        yield path


def _look_alikes(owners: Mapping[str, Owned]) -> Iterator[Finding]:
    by_folded: dict[str, list[str]] = {}
    for path in owners:
        by_folded.setdefault(_folded(path), []).append(path)
    for paths in by_folded.values():
        first, *others = sorted(paths)
        for path in others:
            yield Finding(
                id="files.look-alike", severity="warning", subject=path,
                evidence=f"of {owners[path].name}, differs from {first!a} of {owners[first].name} in case or in the "
                "composition of its letters only",
                fix="Unpack it on a file system that tells them apart, or prune one of them.",
            )  # fmt: skip


def _folded(path: str) -> str:
    """One text for all paths that some file system takes for one (Unicode's caseless matching, D145)."""
    if path.isascii():
        return path.lower()
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", path).casefold())


def _collision(path: str, evidence: str) -> Finding:
    return Finding(
        id="files.collision", severity="error", subject=path, evidence=evidence,
        fix="Prune it from one of them in the recipe.",
    )  # fmt: skip


def _check_entry(entry: Entry, tree: Tree) -> Iterator[Finding]:
    if entry.target is not None:
        yield from _check_link(entry.path, entry.target, tree)
        return
    for bits, what in _BAD_BITS:
        if entry.mode & bits:
            yield Finding(
                id="files.mode", severity="error", subject=entry.path, evidence=f"mode {entry.mode:04o}: {what}",
                fix="Build the bundle again from wheels that do not ask for this.",
            )  # fmt: skip


def _check_link(path: str, target: str, tree: Tree) -> Iterator[Finding]:
    where = None
    if target.startswith("/"):
        where = "an absolute path"
    elif _is_outside(path, target):
        where = "outside the bundle"
    elif tree.walk(path) is None:
        where = "not in the bundle, or outside it by way of other links"
    if where:
        yield Finding(
            id="files.link", severity="error", subject=path, evidence=f"leads to {target!r}, which is {where}",
            fix="Link to a file of the bundle by a relative path.",
        )  # fmt: skip


def _check_pth(path: str, content: bytes, allowed: Collection[str]) -> Iterator[Finding]:
    """As CPython's `site.addpackage` reads it: a line that starts with `import` is executed, others are folders."""
    for line in content.decode("utf-8-sig", "replace").splitlines():
        if line.startswith(("import ", "import\t")):
            if path not in allowed:
                yield _runs(path, f"executes {line.strip()[:120]!r}")
        elif line.strip() and not line.startswith("#") and _is_outside(path, line.strip()):
            yield Finding(
                id="files.pth-folder", severity="error", subject=path,
                evidence=f"adds {line.strip()!r} to sys.path, which is not in the bundle", fix="Prune it.",
            )  # fmt: skip


def _is_outside(path: str, target: str) -> bool:
    """Whether `target`, as the file at `path` names it, is an absolute path or leads out of the prefix."""
    return target.startswith("/") or f"{normpath(join(dirname(path), target))}/".startswith("../")


def _runs(path: str, how: str) -> Finding:
    return Finding(
        id="files.at-start", severity="error", subject=path,
        evidence=f"runs at every start of the interpreter ({how}), and the recipe does not allow it",
        fix="Read it, then prune it, or list it under `pth` in the recipe.",
    )  # fmt: skip


def _differs(entry: Entry, sha256: str | None, size: int | None) -> Iterator[str]:
    if sha256 is None or size is None:
        yield f"{entry.path} has no digest or no size in it"
    elif sha256 != entry.sha256:
        of = "upstream's, but the file was edited" if sha256 == entry.original else "not the file's"
        yield f"the digest of {entry.path} is {of}"
    elif size != entry.size:
        yield f"{entry.path} has {entry.size} bytes, not {size}"


def _recorded(record: Recorded, evidence: str) -> Finding:
    return Finding(
        id="files.record", severity="error", subject=record.path, evidence=evidence, fix="Build the bundle again.",
    )  # fmt: skip
