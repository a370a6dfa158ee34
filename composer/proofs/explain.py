"""Tell why a library is in a bundle: who needs it, who provides it, and by which rule of the loader."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from posixpath import basename
from types import MappingProxyType
from typing import Literal

from composer.formats.dlopen import Dlopen
from composer.formats.loader import Entry, Loader, Lookup, Tree
from composer.proofs.closure import DRIVER_LIBRARIES, GLIBC_LIBRARIES, PLUGIN_LIBRARIES, matches

Rule = Literal["rpath", "runpath", "path", "loaded", "preloaded", "host", "absent", "unusable"]
Host = Literal["glibc", "driver", "plugin"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """One way in which the loader answers one object that needs the library, or opens it at run time.

    chain: what loads the object, up to what is opened first; empty when it is that itself. provider: the object that it
    is given; None unless it is in the tree. owner, entry: who has the RPATH or RUNPATH entry by which it was found, or,
    of what is loaded by then, who had it loaded. opened: for what it is opened at run time, None for a DT_NEEDED.
    ways: in how many of the objects that can be opened first it is so.
    """

    subject: str
    rule: Rule
    chain: tuple[str, ...] = ()
    provider: str | None = None
    owner: str | None = None
    entry: str | None = None
    opened: str | None = None
    ways: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """A library of the tree that goes by the name. names: its file name and SONAME; serves: how many are given it."""

    path: str
    names: tuple[str, ...]
    serves: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Everything about one name. host: whose it is when the host brings it; similar: names that may have been meant."""

    name: str
    host: Host | None
    preloaded: bool
    needs: tuple[Need, ...]
    providers: tuple[Provider, ...]
    similar: tuple[str, ...] = ()

    @property
    def known(self) -> bool:
        """Whether anything in the tree needs, opens or provides it."""
        return bool(self.needs or self.providers)


def explain(
    tree: Tree,
    name: str,
    *,
    program: str | None = None,
    preloaded: Collection[str] = (),
    opened: Mapping[str, Sequence[Dlopen]] = MappingProxyType({}),
) -> Explanation:
    """All needs and providers of a file name or SONAME, in a stable order. Other arguments as in `check_closure`."""
    loader = Loader(tree, program=program, preloaded=preloaded, opened=opened)
    ways: dict[tuple[str | None, ...], list[Need]] = {}
    names: set[str] = set()
    for root in sorted(path for path, elf in tree.objects.items() if elf.dynamic):
        lookups = loader.load(root)
        names.update(lookup.needed for lookup in lookups)
        for number, lookup in enumerate(lookups):
            if lookup.needed == name:
                need = _need(loader, lookup, lookups[:number])
                ways.setdefault((need.subject, need.rule, need.provider, need.opened, need.entry), []).append(need)
    needs = tuple(map(_shortest, ways.values()))
    providers = tuple(_providers(tree, name, needs))
    names.update(chain.from_iterable((basename(path), elf.soname or "") for path, elf in tree.objects.items()))
    return Explanation(
        name=name, host=_host(name), preloaded=name in preloaded,
        needs=tuple(sorted(needs, key=lambda one: (one.subject, one.rule, one.provider or "", one.entry or ""))),
        providers=providers,
        similar=() if needs or providers else tuple(_similar(name, sorted(names))),
    )  # fmt: skip


def _similar(name: str, known: Sequence[str]) -> Sequence[str]:
    """The same library with another version, or else names that look alike."""
    stem = name.partition(".so")[0]
    return [one for one in known if one.partition(".so")[0] == stem] or difflib.get_close_matches(name, known)


def _need(loader: Loader, lookup: Lookup, before: Sequence[Lookup]) -> Need:
    entry = loader.entry(lookup) or _loaded_by(loader, lookup, before)
    return Need(
        subject=lookup.subject, rule=_rule(lookup), chain=lookup.chain[1:], provider=lookup.provider,
        owner=entry and entry.owner, entry=entry and (entry.text or None),
        opened=lookup.opened.why if lookup.opened else None,
    )  # fmt: skip


def _shortest(needs: Sequence[Need]) -> Need:
    """The one with the shortest chain, and how many there are."""
    return replace(min(needs, key=lambda one: (len(one.chain), one.chain)), ways=len(needs))


def _rule(lookup: Lookup) -> Rule:
    return "host" if lookup.how == "absent" and _host(lookup.needed) else lookup.how


def _loaded_by(loader: Loader, lookup: Lookup, before: Sequence[Lookup]) -> Entry | None:
    """Who had it loaded; the program, when nothing did that was loaded later."""
    if lookup.how != "loaded":
        return None
    first = next((one for one in before if one.provider == lookup.provider), None)
    if first is not None:
        return Entry(first.subject, "")
    return Entry(loader.running[0], "") if lookup.provider in loader.running else None


def _providers(tree: Tree, name: str, needs: Sequence[Need]) -> Iterator[Provider]:
    for path, elf in sorted(tree.objects.items()):
        names = tuple(dict.fromkeys(filter(None, (basename(path), elf.soname))))
        served = {need.subject for need in needs if need.provider == path}
        if served or (name in names and elf.dynamic and elf.kind == "shared"):
            yield Provider(path=path, names=names, serves=len(served))


def _host(name: str) -> Host | None:
    families: tuple[tuple[Host, frozenset[str]], ...] = (
        ("glibc", GLIBC_LIBRARIES), ("driver", DRIVER_LIBRARIES), ("plugin", PLUGIN_LIBRARIES),
    )  # fmt: skip
    return next((family for family, patterns in families if matches(name, patterns)), None)
