"""Which distribution of a bundle requires which, by their METADATA, and what becomes of each requirement."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence

import msgspec
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from composer.model.marker import counts
from composer.model.recipe import RequiresEdit


class Edge(msgspec.Struct, frozen=True, kw_only=True):
    """A requirement as METADATA has it, on the distribution `name`.

    replaced: the requirement that took its place. dropped: it is not met, and need not be. reason: of the recipe, for
    either.
    """

    name: str
    requirement: str
    replaced: str | None = None
    dropped: bool = False
    reason: str | None = None


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """A distribution. root: the recipe asks for it. requires: None where its wheel is not at hand to be read."""

    name: str
    version: str
    root: bool
    requires: Sequence[Edge] | None

    @property
    def kept(self) -> list[Edge]:
        """The requirements that are met, one for each distribution."""
        return list({one.name: one for one in self.requires or () if not one.dropped}.values())


class DependencyGraph(msgspec.Struct, frozen=True, kw_only=True):
    """All distributions, in the order of their names."""

    nodes: Sequence[Node]

    @property
    def tops(self) -> list[str]:
        """Names from which every other one can be reached: what nothing requires, and the first of each circle."""
        edges = {node.name: [edge.name for edge in node.kept] for node in self.nodes}
        required = {name for names in edges.values() for name in names}
        found: list[str] = []
        seen: set[str] = set()
        for name in [*(one for one in edges if one not in required), *edges]:
            if name not in seen:
                found.append(name)
                seen |= _reached(name, edges)
        return found


def _reached(name: str, edges: Mapping[str, Sequence[str]]) -> set[str]:
    seen, todo = {name}, [name]
    while todo:
        fresh = [one for one in edges.get(todo.pop(), ()) if one not in seen]
        seen.update(fresh)
        todo += fresh
    return seen


def dependency_graph(versions: Mapping[str, str], requires: Mapping[str, Sequence[str]], *,
                     edits: Sequence[RequiresEdit], roots: Collection[str],
                     environment: Mapping[str, str]) -> DependencyGraph:  # fmt: skip
    """The graph of a bundle.

    Parameters
    ----------
    versions: of its distributions, by normalised name.
    requires: Requires-Dist lines of those that were read.
    environment: marker variables (PEP 508) of the target, without `extra`.
    """
    parsed = {name: [Requirement(line) for line in lines] for name, lines in requires.items()}
    extras = _extras(parsed, edits, environment)
    nodes = [
        Node(name=name, version=versions[name], root=name in roots,
             requires=[_edge(one, name, edits) for one in _wanted(parsed[name], extras[name], environment)]
             if name in parsed else None)
        for name in sorted(versions)
    ]  # fmt: skip
    return DependencyGraph(nodes=nodes)


def _extras(parsed: Mapping[str, Sequence[Requirement]], edits: Sequence[RequiresEdit],
            environment: Mapping[str, str]) -> Mapping[str, set[str]]:  # fmt: skip
    """The extras that are asked of each distribution, after the edits; an extra may ask for more of them."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    before = -1
    while before != (before := sum(map(len, found.values()))):
        for name, lines in parsed.items():
            for one in [*_wanted(lines, found[name], environment)]:
                edge = _edge(one, name, edits)
                if not edge.dropped:
                    found[edge.name] |= Requirement(edge.replaced or edge.requirement).extras
    return found


def _wanted(
    lines: Sequence[Requirement], extras: Collection[str], environment: Mapping[str, str]
) -> Iterator[Requirement]:
    """The requirements that hold for the target, with these extras."""
    return (one for one in lines if counts(one, environment, ("", *extras)))


def _edge(wanted: Requirement, of: str, edits: Sequence[RequiresEdit]) -> Edge:
    name = canonicalize_name(wanted.name)
    found = [edit for edit in edits if edit.name == name and edit.of in (None, of)]
    if not found:
        return Edge(name=name, requirement=str(wanted))
    edit = found[-1]  # as planning takes the last
    return Edge(name=name, requirement=str(wanted), replaced=edit.to, dropped=edit.to is None, reason=edit.reason)
