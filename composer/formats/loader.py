"""How glibc's dynamic loader would find libraries inside a tree that is not on disk.

Sources: ld.so(8) and glibc's `elf/dl-load.c` (`_dl_map_object`, `fillin_rpath`) and `elf/dl-deps.c`. For a DT_NEEDED
name without a slash the loader takes, in this order: an object of the same process that already goes by that name
(file name as requested, or SONAME); unless the requesting object has a DT_RUNPATH, the DT_RPATH of that object, of the
object that loaded it, and so on up, then of the program; LD_LIBRARY_PATH; the requester's DT_RUNPATH; the host's cache
and default folders. A file for another machine is passed over; one that is no shared object ends the search with an
error. An object that has a DT_RUNPATH has no DT_RPATH, whatever it says.

Only what lies inside the tree counts here: nothing is assumed of LD_LIBRARY_PATH and the host. Not modelled are the
`glibc-hwcaps` subfolders and the tokens $LIB and $PLATFORM, whose values differ from host to host.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from posixpath import basename, dirname
from types import MappingProxyType
from typing import Literal, NamedTuple

from composer.formats.dlopen import Dlopen
from composer.formats.elf import Elf

How = Literal["rpath", "runpath", "loaded", "preloaded", "path", "absent", "unusable"]

_ORIGIN = re.compile(r"\$(?:ORIGIN(?![A-Za-z0-9_])|\{ORIGIN\})")
_MOST_LINKS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """The files of one prefix by their relative paths (`lib/python3.12/...`, no leading slash, no symlink on the way).

    `objects` are ELF files, `symlinks` map a path to its target as written, `files` are all others.
    """

    objects: Mapping[str, Elf]
    symlinks: Mapping[str, str] = field(default_factory=dict)
    files: Collection[str] = frozenset()
    folders: frozenset[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        found = {""}
        for path in itertools.chain(self.objects, self.symlinks, self.files):
            folder = dirname(path)
            while folder not in found:
                found.add(folder)
                folder = dirname(folder)
        object.__setattr__(self, "folders", frozenset(found))

    def walk(self, path: str) -> str | None:
        """The path without symlinks, `.` and `..`, as the kernel walks it; None if it is absent or leaves the tree."""
        todo = path.split("/")[::-1]
        done: list[str] = []
        links = 0
        while todo:
            name = todo.pop()
            if name == "..":
                if not done:
                    return None
                done.pop()
            elif name not in ("", "."):
                done.append(name)
                here = "/".join(done)
                target = self.symlinks.get(here)
                if target is not None:
                    links += 1
                    if target.startswith("/") or links > _MOST_LINKS:
                        return None
                    done.pop()
                    todo += target.split("/")[::-1]
                elif here not in self.folders and (todo or not self._is_file(here)):
                    return None
        return "/".join(done)

    def _is_file(self, path: str) -> bool:
        return path in self.objects or path in self.files


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """How one DT_NEEDED name of one object, or one that it opens at run time, was answered.

    `chain` holds the requesting object, the one that loaded it, and so on to the root; `found` is the path through
    which the provider is opened and `provider` the object at its end: both None unless it is in the tree. `opened` says
    why the name is opened, unless it is a DT_NEEDED; of several names it is then the one that was found, or the first.
    """

    chain: tuple[str, ...]
    needed: str
    how: How
    found: str | None = None
    provider: str | None = None
    opened: Dlopen | None = None

    @property
    def subject(self) -> str:
        """The object that has the DT_NEEDED."""
        return self.chain[0]


class Entry(NamedTuple):
    """An RPATH or RUNPATH entry, as written, and the object that has it."""

    owner: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Loaded:
    """One object of the simulated process; `folder` is its $ORIGIN, which a symlinked file does not share."""

    path: str
    folder: str
    elf: Elf
    loader: _Loaded | None

    def ancestry(self) -> Iterator[_Loaded]:
        """This object, the one that loaded it, and so on."""
        here: _Loaded | None = self
        while here is not None:
            yield here
            here = here.loader


@dataclass(frozen=True, slots=True, kw_only=True)
class _Process:
    """What is loaded, in order, and by which names it is known."""

    queue: list[_Loaded]
    names: dict[str, _Loaded]
    preloaded: frozenset[str]

    def add(self, loaded: _Loaded, *names: str | None) -> None:
        if loaded not in self.queue:
            self.queue.append(loaded)
        for name in names:
            if name is not None:
                self.names.setdefault(name, loaded)


def entries(elf: Elf) -> tuple[str, ...]:
    """The entries that the loader heeds: DT_RUNPATH's, else DT_RPATH's; a tag with an empty value has none."""
    found = elf.runpath or elf.rpath
    return () if found == ("",) else found


def lexical(entry: str, folder: str) -> str | None:
    """The folder that an RPATH entry of an object in `folder` means, by its text alone; None if it is not in the tree.

    Absolute and relative (to the working folder) entries, $LIB, $PLATFORM and too many `..` are not in the tree.
    """
    origin = _origin_of(entry)
    if origin is None:
        return None
    rest = entry[origin.end() :]
    done = [name for name in folder.split("/") if name]
    for name in rest.split("/"):
        if name == "..":
            if not done:
                return None
            done.pop()
        elif name not in ("", "."):
            done.append(name)
    return "/".join(done)


class Loader:
    """The loader's answers for one tree.

    `program` is the executable, in the tree, that loads all the others (Python): what it needs itself is in the process
    from its start, and its DT_RPATH is in force for all. `preloaded` are further names that are known to be loaded
    beforehand. Neither applies to what another program loads. `opened` says, by path, what objects open by name at run
    time, beside what their own notes say: those names are looked for as dlopen does it, when all else is loaded.
    """

    def __init__(
        self,
        tree: Tree,
        *,
        program: str | None = None,
        preloaded: Collection[str] = (),
        opened: Mapping[str, Sequence[Dlopen]] = MappingProxyType({}),
    ) -> None:
        self.tree = tree
        self._opened = opened
        self._folders_of: dict[str, set[str]] = {}
        for path in itertools.chain(tree.objects, tree.symlinks, tree.files):
            self._folders_of.setdefault(basename(path), set()).add(dirname(path))
        self._paths: dict[tuple[str, tuple[str, ...]], tuple[str, ...]] = {}
        self._preloaded = frozenset(preloaded)
        self._running = _Process(queue=[], names={}, preloaded=frozenset())
        if program is not None:
            first = self._first(program, self._running)
            self._load_needed(self._running, 0, first)

    @property
    def running(self) -> tuple[str, ...]:
        """The program and what it has loaded, in the tree, in the loader's order."""
        return tuple(each.path for each in self._running.queue)

    def surroundings(self, elf: Elf) -> tuple[tuple[str, ...], frozenset[str]]:
        """The folders that the program adds to every search for `elf` and below, and the names it has loaded."""
        if elf.kind == "executable":
            return (), frozenset()
        folders = tuple(folder for each in self._running.queue[:1] for folder in self.inherited(each.elf, each.folder))
        return folders, self._preloaded.union(self._running.names)

    def folders(self, entries: tuple[str, ...], origin: str) -> tuple[str, ...]:
        """The existing folders of the tree that RPATH entries stand for, without symlinks."""
        key = (origin, entries)
        if key not in self._paths:
            texts = (f"{origin}{entry[found.end() :]}" for entry in entries if (found := _origin_of(entry)))
            self._paths[key] = tuple(path for path in map(self.tree.walk, texts) if path is not None)
        return self._paths[key]

    def inherited(self, elf: Elf, origin: str) -> tuple[str, ...]:
        """The folders that an object adds to the searches of itself and of what it loads."""
        return () if elf.runpath else self.folders(elf.rpath, origin)

    def search_path(self, elf: Elf, origin: str, above: Iterable[str]) -> Iterator[str]:
        """The folders in which a name is looked for; `above` are those inherited from the loading chain."""
        if elf.runpath:
            yield from self.folders(elf.runpath, origin)
        else:
            yield from self.inherited(elf, origin)
            yield from above

    def places(self, name: str, like: Elf) -> tuple[str, ...]:
        """Every folder, sorted, that holds under exactly this file name an object `like` could load."""
        return tuple(folder for folder in sorted(self._folders_of.get(name, ())) if self._at(folder, name, like))

    def find(self, name: str, like: Elf, folders: Iterable[str]) -> str | None:
        """The first folder in which the loader stops: at a shared object, or at a file that is an error to load."""
        candidates = self._folders_of.get(name)
        if not candidates:
            return None
        return next((folder for folder in folders if folder in candidates and self._stops(folder, name, like)), None)

    def provider(self, folder: str, name: str) -> str | None:
        """The object at the end of a name in a folder."""
        path = self.tree.walk(f"{folder}/{name}")
        return path if path is not None and path in self.tree.objects else None

    def load(self, root: str) -> tuple[Lookup, ...]:
        """Load one object and, breadth first, all that it needs: into the running program, or as a program itself."""
        if self.tree.objects[root].kind == "executable":
            return self._load(root, _Process(queue=[], names={}, preloaded=frozenset()))
        running = self._running
        return self._load(root, _Process(queue=[*running.queue], names={**running.names}, preloaded=self._preloaded))

    def entry(self, lookup: Lookup) -> Entry | None:
        """The first entry by which the loader found what one of its lookups tells; None where none was needed."""
        if lookup.how not in ("rpath", "runpath") or lookup.found is None:
            return None
        wanted = dirname(lookup.found)
        program = self.running[:1] if self.tree.objects[lookup.chain[-1]].kind != "executable" else ()
        for path in lookup.chain[:1] if lookup.how == "runpath" else (*lookup.chain, *program):
            elf = self.tree.objects[path]
            for text in elf.runpath or elf.rpath:
                # A requester that was found through a link has the link's folder as its $ORIGIN, which no chain tells.
                if self.folders((text,), dirname(path)) == (wanted,) and (path == lookup.subject or not elf.runpath):
                    return Entry(path, text)
        return None

    def _load(self, root: str, process: _Process) -> tuple[Lookup, ...]:
        start = len(process.queue)
        parent = self._first(root, process).loader
        lookups = self._load_needed(process, start, parent)
        for current in itertools.islice(process.queue, start, None):  # which grows on the way
            for one in (*current.elf.opens, *self._opened.get(current.path, ())):
                before = len(process.queue)
                lookups.append(self._open(current, one, process, _lineage(current, parent)))
                lookups += self._load_needed(process, before, parent)
        return tuple(lookups)

    def _first(self, root: str, process: _Process) -> _Loaded:
        elf = self.tree.objects[root]
        loaded = _Loaded(path=root, folder=dirname(root), elf=elf, loader=next(iter(process.queue), None))
        process.add(loaded, elf.soname)
        return loaded

    def _load_needed(self, process: _Process, start: int, parent: _Loaded | None) -> list[Lookup]:
        """Load what the objects from `start` on need; chains end before `parent`."""
        return [
            self._need(current, needed, process, _lineage(current, parent))
            for current in itertools.islice(process.queue, start, None)  # which grows on the way
            for needed in current.elf.needed
        ]

    def _open(self, current: _Loaded, opened: Dlopen, process: _Process, lineage: tuple[str, ...]) -> Lookup:
        first = None
        for name in opened.names:
            lookup = replace(self._need(current, name, process, lineage), opened=opened)
            if lookup.how != "absent":
                return lookup
            first = first or lookup
        assert first is not None  # notes and recipes without a name are refused
        return first

    def _need(self, current: _Loaded, needed: str, process: _Process, lineage: tuple[str, ...]) -> Lookup:
        if needed in process.names:
            seen = process.names[needed]
            return Lookup(chain=lineage, needed=needed, how="loaded", found=seen.path, provider=seen.path)
        if needed in process.preloaded:
            return Lookup(chain=lineage, needed=needed, how="preloaded")
        found, how = self._search(current, needed)
        provider = self.tree.walk(found) if found is not None and how != "unusable" else None
        if found is None or provider is None:
            return Lookup(chain=lineage, needed=needed, how=how, found=found)
        same = next((each for each in process.queue if each.path == provider), None)
        elf = self.tree.objects[provider]
        loaded = same or _Loaded(path=provider, folder=dirname(found), elf=elf, loader=current)
        process.add(loaded, needed, elf.soname)
        return Lookup(chain=lineage, needed=needed, how=how, found=found, provider=provider)

    def _search(self, current: _Loaded, needed: str) -> tuple[str | None, How]:
        if "/" in needed:
            return self._by_path(current, needed)
        above = [
            folder for each in itertools.islice(current.ancestry(), 1, None)
            for folder in self.inherited(each.elf, each.folder)
        ]  # fmt: skip
        folder = self.find(needed, current.elf, self.search_path(current.elf, current.folder, above))
        if folder is None:
            return None, "absent"
        found = f"{folder}/{needed}".lstrip("/")
        if not self._at(folder, needed, current.elf):
            return found, "unusable"
        return found, "runpath" if current.elf.runpath else "rpath"

    def _by_path(self, current: _Loaded, needed: str) -> tuple[str | None, How]:
        """A name with a slash is opened as it is, and is in the tree only if it begins with $ORIGIN."""
        origin = _origin_of(needed)
        real = self.tree.walk(f"{current.folder}{needed[origin.end() :]}") if origin else None
        return (real, "path") if real is not None and real in self.tree.objects else (None, "absent")

    def _at(self, folder: str, name: str, like: Elf) -> bool:
        elf = self._fitting(folder, name, like)
        return elf is not None and elf.dynamic and elf.kind == "shared"

    def _stops(self, folder: str, name: str, like: Elf) -> bool:
        return self._fitting(folder, name, like) is not None or self.tree.walk(f"{folder}/{name}") in self.tree.files

    def _fitting(self, folder: str, name: str, like: Elf) -> Elf | None:
        """The object of that name, unless it is for another machine, which the loader passes over."""
        elf = self.tree.objects.get(self.provider(folder, name) or "")
        return elf if elf is not None and (elf.machine, elf.bits) == (like.machine, like.bits) else None


def _lineage(loaded: _Loaded, parent: _Loaded | None) -> tuple[str, ...]:
    return tuple(each.path for each in loaded.ancestry() if each is not parent)


def _origin_of(entry: str) -> re.Match[str] | None:
    """The $ORIGIN that an entry begins with, when all of it can be known without the host."""
    found = _ORIGIN.match(entry)
    if found is None or "$" in entry[found.end() :]:
        return None
    return found if entry[found.end() : found.end() + 1] in ("", "/") else None
