"""What differs between two bundles, by their manifests alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from composer.model.coverage import Coverage
from composer.model.dlopen import DlopenRule
from composer.model.input import InputFacts
from composer.model.layer import Changes, Entry, Layer
from composer.model.manifest import Check, Floor, Manifest
from composer.model.plan import BuiltFacts, LeftOut
from composer.model.runtime import RuntimeWork

What = Literal["added", "removed", "content", "mode", "link"]

#: Fields of a manifest that are compared in another way.
_ELSEWHERE = ("schema", "layers")
#: What one entry of a field is called, where that is not the field's name.
_KINDS = {"floors": "floor", "checks": "check", "left_out": "left out", "warnings": "warning", "properties": "property",
          "host_libraries": "host library", "inputs": "input"}  # fmt: skip
#: (kind, subject, text): the field or kind of edit, what it is about, and what is said of that.
_Item = tuple[str, str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Something that one bundle says and the other does not, or says otherwise; None on the side that does not.

    kind: the field of the manifest, or the kind of an edit. subject: which of them, where there are several.
    """

    kind: str
    subject: str
    old: str | None
    new: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FileDifference:
    """A file that is in one bundle only, or in both with another content, mode or link's target. old, new: bytes."""

    path: str
    distribution: str
    what: What
    old: int | None
    new: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """A distribution in one bundle. artifact: sha256 of its wheel; compressed, size: bytes packed and unpacked."""

    version: str
    artifact: str | None
    digest: str
    compressed: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DistributionDifference:
    """A distribution that is in one bundle only, or in both and not the same.

    shared: bytes of its layer in NEW that OLD has, too. added, removed, changed: counts of files.
    """

    name: str
    old: Side | None
    new: Side | None
    edits: Sequence[Difference]
    shared: int
    added: int
    removed: int
    changed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What NEW has in common with OLD, by digest. layers: of how many in all; bytes: of all layers' compressed ones."""

    layers: int
    of_layers: int
    bytes: int
    of_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All that differs between two bundles, and how much does not."""

    facts: Sequence[Difference]
    distributions: Sequence[DistributionDifference]
    files: Sequence[FileDifference]
    shared: Shared

    @property
    def is_same(self) -> bool:
        """Whether nothing differs."""
        return not (self.facts or self.distributions or self.files)


def compare(old: Manifest, new: Manifest) -> Comparison:
    """What differs between the bundles of two manifests."""
    files = list(_files(old, new))
    known = {part.digest for layer in old.layers for part in layer.parts}
    return Comparison(facts=_differences(_facts(old), _facts(new)), files=files, shared=_shared(old, new, known),
                      distributions=list(_distributions(old, new, files, known)))  # fmt: skip


def _shared(old: Manifest, new: Manifest, known: set[str]) -> Shared:
    digests = {layer.digest for layer in old.layers}
    return Shared(
        layers=sum(layer.digest in digests for layer in new.layers), of_layers=len(new.layers),
        bytes=sum(_known_bytes(layer, known) for layer in new.layers),
        of_bytes=sum(layer.compressed for layer in new.layers),
    )  # fmt: skip


def _known_bytes(layer: Layer, known: set[str]) -> int:
    return sum(part.compressed for part in layer.parts if part.digest in known)


# --- what manifests say -----------------------------------------------------------------------------------------------


def _facts(manifest: Manifest) -> Iterator[_Item]:
    """Everything but the layers."""
    for field in msgspec.structs.fields(manifest):
        if field.name not in _ELSEWHERE:
            kind, value = _KINDS.get(field.name, field.name), getattr(manifest, field.name)
            if isinstance(value, str):
                yield kind, "", value
            elif isinstance(value, Mapping):
                yield from ((kind, key, _text(one)) for key, one in value.items())
            elif value is not None:
                yield from ((kind, *_named(one)) for one in value)


def _text(value: str | Floor) -> str:
    return value if isinstance(value, str) else f"{value.version} (because of {value.because})"


def _named(item: object) -> tuple[str, str]:
    """What an item of a list is known by, and what else it says."""
    match item:
        case Check(module=module, needs_driver=needs_driver):
            return module, "with a driver" if needs_driver else "without a driver"
        case BuiltFacts(name=name, version=version, key=key, source=source):
            return name, f"{version} from {source}, build {key}"
        case LeftOut(name=name, version=version, reason=reason):
            return name, f"{version}: {reason}"
        case InputFacts(name=name, sha256=sha256, files=count, size=size):
            return name, f"sha256 {sha256}, {count} files, {size} bytes"
        case Coverage(files=files):
            return ", ".join(files), _json(item)
        case DlopenRule(of=of, names=names):
            return f"{', '.join(names)} of {of}", _json(item)
        case RuntimeWork(what=what):
            return what, _json(item)
    return str(item), ""


def _json(rule: msgspec.Struct) -> str:
    """A rule of the recipe that proofs go by; it has no shorter form."""
    return msgspec.json.encode(rule).decode()


def _differences(old: Iterator[_Item], new: Iterator[_Item]) -> list[Difference]:
    """What is said of each subject on either side, where that is not the same; in OLD's order, then NEW's."""
    said: defaultdict[tuple[str, str], tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for side, items in enumerate((old, new)):
        for kind, subject, text in items:
            said[kind, subject][side].append(text)
    return [
        Difference(kind=kind, subject=subject, old=_joined(before), new=_joined(after))
        for (kind, subject), (before, after) in said.items()
        if before != after
    ]


def _joined(texts: Sequence[str]) -> str | None:
    return "; ".join(texts) if texts else None


# --- distributions ----------------------------------------------------------------------------------------------------


def _distributions(old: Manifest, new: Manifest, files: Sequence[FileDifference],
                   known: set[str]) -> Iterator[DistributionDifference]:  # fmt: skip
    """Those that differ; in OLD's order, then NEW's."""
    olds, news = ({layer.name: layer for layer in one.layers} for one in (old, new))
    of_each: defaultdict[str, list[What]] = defaultdict(list)
    for file in files:
        of_each[file.distribution].append(file.what)
    for name in dict.fromkeys((*olds, *news)):
        before, after = olds.get(name), news.get(name)
        if _identity(before) != _identity(after):
            whats = of_each[name]
            added, removed = whats.count("added"), whats.count("removed")
            yield DistributionDifference(
                name=name, old=_side(before), new=_side(after), edits=_differences(_edits(before), _edits(after)),
                shared=_known_bytes(after, known) if after else 0, added=added, removed=removed,
                changed=len(whats) - added - removed,
            )  # fmt: skip


def _identity(layer: Layer | None) -> object:
    """All of a layer but where a store keeps its bytes."""
    return layer and (layer.version, layer.artifact, layer.digest, layer.changes, layer.entries)


def _side(layer: Layer | None) -> Side | None:
    if layer is None:
        return None
    return Side(version=layer.version, artifact=layer.artifact, digest=layer.digest, compressed=layer.compressed,
                size=layer.size)  # fmt: skip


def _edits(layer: Layer | None) -> Iterator[_Item]:
    changes = layer.changes if layer else Changes()
    for line in changes.requires:
        yield "requires", line.was, f"{line.now or 'dropped'} ({line.reason})"
    for one in changes.pruned:
        yield "pruned", one.pattern, f"{one.files} files, {one.size} bytes ({one.reason})"
    for file in changes.files:
        yield file.kind, file.path, f"{file.detail} ({file.reason})"
    if changes.untouched is not None:
        yield "untouched", "", changes.untouched


# --- files ------------------------------------------------------------------------------------------------------------


def _files(old: Manifest, new: Manifest) -> Iterator[FileDifference]:
    """By path."""
    olds, news = _owned(old), _owned(new)
    for path in sorted(olds.keys() | news.keys()):
        before, after = olds.get(path), news.get(path)
        what = _what(before and before[1], after and after[1])
        if what and (found := after or before):
            yield FileDifference(path=path, distribution=found[0], what=what, old=before and before[1].size,
                                 new=after and after[1].size)  # fmt: skip


def _owned(manifest: Manifest) -> Mapping[str, tuple[str, Entry]]:
    return {entry.path: (layer.name, entry) for layer in manifest.layers for entry in layer.entries}


def _what(old: Entry | None, new: Entry | None) -> What | None:
    if old is None:
        return "added"
    if new is None:
        return "removed"
    if old.target != new.target:
        return "link"
    if (old.sha256, old.size) != (new.sha256, new.size):
        return "content"
    return "mode" if old.mode != new.mode else None
