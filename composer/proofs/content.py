"""All proofs that read a bundle's texts (METADATA, RECORD, `.pth`, sources), and the facts that they take of a layer.

The facts of a layer are small and depend on its files alone, so they can be kept under its digest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import msgspec

from composer.formats.loader import Tree
from composer.formats.python_imports import SourceImports, source_imports
from composer.formats.python_tree import python_tree
from composer.model.finding import Finding
from composer.model.layer import Entry, Layer
from composer.model.runtime import RuntimeWork
from composer.proofs.files import (
    Recorded,
    check_collisions,
    check_entries,
    check_record,
    check_start,
    owned,
    read_recorded,
)
from composer.proofs.ledger import Declared, Row, check_ledger, check_requirements, ledger, left_out, read_declared
from composer.proofs.modules import Left, check_losses, check_modules, check_programs
from composer.proofs.offline import check_offline

_INFO = ".dist-info/"


class Content(msgspec.Struct, frozen=True, kw_only=True):
    """What the texts of one layer say. pth: content of `.pth` files; imports: of sources in site-packages; by path."""

    declared: tuple[Declared, ...] = ()
    recorded: tuple[Recorded, ...] = ()
    pth: Mapping[str, bytes] = {}
    imports: Mapping[str, SourceImports] = {}


def is_told(path: str) -> bool:
    """Whether `read_content` reads the file at `path` below the prefix."""
    return _kind(path) is not None


def read_content(files: Iterable[tuple[str, bytes]]) -> Content:
    """The facts of a layer from those of its files (path, content) that matter; others are passed over.

    Raises WheelError for METADATA that is malformed.
    """
    declared: list[Declared] = []
    recorded: list[Recorded] = []
    texts: dict[str, bytes] = {}
    imports: dict[str, SourceImports] = {}
    for path, data in files:
        match _kind(path):
            case "METADATA":
                declared.append(read_declared(path, data))
            case "RECORD":
                recorded.append(read_recorded(path, data))
            case ".pth":
                texts[path] = data
            case ".py":
                imports[path] = source_imports(data)
            case _:
                pass
    return Content(declared=tuple(declared), recorded=tuple(recorded), pth=texts, imports=imports)


def _kind(path: str) -> str | None:
    _, site, name = path.partition("/site-packages/")
    if not site:
        return None
    if "/" not in name.partition(_INFO)[0] and name.endswith((f"{_INFO}METADATA", f"{_INFO}RECORD")):
        return name.rpartition("/")[2]
    if name.endswith(".pth") and "/" not in name:
        return ".pth"
    return ".py" if name.endswith(".py") else None


@dataclass(frozen=True, kw_only=True)
class Composed:
    """A bundle as the proofs take it, written or not.

    contents: by the names of `layers`. environment: the target's marker variables (PEP 508), without `extra`. roots:
    modules that must import. hooks: names of `.pth` files that the recipe allows, beside those that the layers' changes
    list as `pth`. runtime: what the stack makes where it serves. imports_of: in place of the contents' imports, for who
    reads sources only when they are asked for; what modules that nothing reaches would need is then not told.
    programs: the modules of entry points, by the paths of programs, which need not all be there.
    """

    layers: Sequence[Layer]
    contents: Mapping[str, Content]
    environment: Mapping[str, str]
    sms: Sequence[int]
    roots: Sequence[str]
    hooks: Collection[str] = ()
    runtime: Sequence[RuntimeWork] = ()
    programs: Mapping[str, str] = field(default_factory=dict)
    imports_of: Callable[[str], SourceImports | None] | None = field(default=None, repr=False)

    @property
    def python(self) -> str:
        """The minor version."""
        return self.environment["python_version"]

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """All files and links by path."""
        return {entry.path: entry for layer in self.layers for entry in layer.entries}

    @cached_property
    def stack(self) -> list[Declared]:
        """What all distributions say of themselves."""
        return [one for content in self.contents.values() for one in content.declared]

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The ledger."""
        return ledger(self.stack, {layer.name: layer.changes.requires for layer in self.layers}, self.environment)

    def check(self) -> tuple[Finding, ...]:
        """All findings."""
        return (*self._ledger(), *self._modules(), *self._files(), *self._offline())

    def _ledger(self) -> Iterator[Finding]:
        yield from check_requirements(self.stack, self.environment)
        yield from check_ledger(self.rows, {one.name: one.path for one in self.stack})

    def _modules(self) -> tuple[Finding, ...]:
        tree = python_tree(self.entries, self.python, self.environment["platform_machine"], self._pth)
        pruned = {one.pattern: one.reason for layer in self.layers for one in layer.changes.pruned}
        known = {path: found for content in self.contents.values() for path, found in content.imports.items()}
        left = Left(dropped=left_out(self.rows), pruned=pruned)
        if self.imports_of:
            return check_modules(tree, self.imports_of, self.roots, left)
        programs = {path: module for path, module in self.programs.items() if path in self.entries}
        return (*check_modules(tree, known.get, self.roots, left), *check_losses(tree, known, left),
                *check_programs(tree, known.get, programs, left))  # fmt: skip

    def _files(self) -> Iterator[Finding]:
        links = {path: entry.target for path, entry in self.entries.items() if entry.target is not None}
        tree = Tree(objects={}, symlinks=links, files=self.entries.keys() - links.keys())
        yield from check_collisions([owned(layer.name, layer.entries) for layer in self.layers])
        yield from check_entries(self.entries.values(), tree)
        yield from check_start(self._pth, self._hooks, self.entries)
        for layer in self.layers:
            for record in self.contents.get(layer.name, Content()).recorded:
                yield from check_record(record, layer.entries)

    def _offline(self) -> tuple[Finding, ...]:
        names = {layer.name for layer in self.layers}
        return check_offline(self.runtime, self.entries, names, sms=self.sms, python=self.python)

    @property
    def _pth(self) -> dict[str, bytes]:
        return {path: data for content in self.contents.values() for path, data in content.pth.items()}

    @property
    def _hooks(self) -> frozenset[str]:
        """What may run at every start: what the recipe allows, and the bundle's own, which no wheel brought."""
        own = {entry.path for layer in self.layers if layer.artifact is None for entry in layer.entries}
        noted = {one.path for layer in self.layers for one in layer.changes.files if one.kind == "pth"}
        return frozenset(own | noted | {f"lib/python{self.python}/site-packages/{name}" for name in self.hooks})
