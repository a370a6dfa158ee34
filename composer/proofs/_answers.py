"""Names that more than one library of a tree goes by, and which of them answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from posixpath import basename

from composer.formats.loader import Loader, Lookup, Tree
from composer.model.finding import Finding

_RULES = {
    "rpath": "by RPATH", "runpath": "by RUNPATH", "path": "by its path", "loaded": "because it is loaded by then",
}  # fmt: skip


class Answers:
    """Collects who was given what for a name, over all the ways in which the objects of a tree are loaded."""

    def __init__(self, tree: Tree, preloaded: Collection[str]) -> None:
        self._tree = tree
        self._preloaded = preloaded
        self._found: defaultdict[str, dict[str, dict[str, Lookup]]] = defaultdict(dict)
        self._asked: defaultdict[str, set[str]] = defaultdict(set)
        self._loaded: set[str] = set()

    def add(self, lookup: Lookup) -> None:
        """One answer of the loader."""
        self._asked[lookup.needed].add(lookup.subject)
        if lookup.provider is not None:
            self._loaded.add(lookup.provider)
            by_subject = self._found[lookup.needed].setdefault(lookup.provider, {})
            if lookup.how != "loaded" or lookup.subject not in by_subject:
                by_subject[lookup.subject] = lookup

    def findings(self, loader: Loader) -> Iterator[Finding]:
        """One for each name that is asked for and that two libraries go by, or one beside the host's."""
        for name, paths in sorted(self._providers().items()):
            if name in self._preloaded:
                yield from (self._host_first(name, path) for path in sorted(paths) if basename(path) == name)
            elif len(paths) > 1 and self._found[name]:
                yield self._ambiguous(name, paths, loader)

    def _providers(self) -> dict[str, set[str]]:
        found: defaultdict[str, set[str]] = defaultdict(set)
        for path, elf in self._tree.objects.items():
            if elf.dynamic and elf.kind == "shared":
                for name in {elf.soname or "", basename(path)} & self._asked.keys():
                    found[name].add(path)
        return found

    def _ambiguous(self, name: str, paths: Collection[str], loader: Loader) -> Finding:
        """The one that most objects are given wins; the others win only where they are loaded first."""
        found = self._found[name]
        first, *others = sorted(paths, key=lambda path: (-len(found.get(path, ())), path))
        lacking = sorted(
            {version for other in others if other in self._loaded for version in self._lacking(name, other)}
        )
        parts = [f"{name} is {first} for {_count(found.get(first, {}))}{_why(found.get(first, {}), loader)}"]
        parts += [
            f"{other} goes by this name, too, {self._part(found.get(other, {}), other)}" for other in others
        ]  # fmt: skip
        parts += [f"and does not define {', '.join(lacking)}, which is wanted"] if lacking else []
        return Finding(
            id="closure.ambiguous", severity="warning" if lacking else "note", subject=first,
            evidence="; ".join(parts), fix="Prune all but one, if one serves all.",
        )  # fmt: skip

    def _host_first(self, name: str, path: str) -> Finding:
        lacking = self._lacking(name, path)
        evidence = f"{name} is the host's, which is loaded at the start; this one only where the host has none"
        if lacking:
            evidence += f", and it does not define {', '.join(sorted(lacking))}, which is wanted"
        return Finding(
            id="closure.ambiguous", severity="warning" if lacking else "note", subject=path, evidence=evidence,
            fix=f"Bundle a newer {name}." if lacking else None,
        )  # fmt: skip

    def _part(self, given: dict[str, Lookup], path: str) -> str:
        if given:
            return f"and is it for {_count(given)}"
        return "and answers where it is loaded first" if path in self._loaded else "and is loaded by nothing"

    def _lacking(self, name: str, path: str) -> frozenset[str]:
        """Versions that are wanted of a name and that this library does not define, if it defines any."""
        defined = self._tree.objects[path].versions_defined
        wanted = frozenset[str]().union(
            *(self._tree.objects[subject].versions_needed.get(name, ()) for subject in self._asked[name])
        )
        return wanted - defined if defined else frozenset()


def _count(given: dict[str, Lookup]) -> str:
    return f"{len(given)} object{'' if len(given) == 1 else 's'}"


def _why(given: dict[str, Lookup], loader: Loader) -> str:
    """The rule by which an object is given it: the first that is not that it is loaded by then."""
    lookup = min(given.values(), key=lambda one: (one.how == "loaded", one.subject), default=None)
    if lookup is None:
        return ""
    entry = loader.entry(lookup)
    return f", {_RULES[lookup.how]} {entry.text} of {entry.owner}" if entry else f", {_RULES.get(lookup.how, '')}"
