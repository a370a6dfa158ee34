"""A layer: one distribution (or the interpreter) as a tar segment in zstd frames, and what was changed in it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec

from composer.formats.seekable import Frame


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One file or link below the prefix.

    sha256: of the content, hexadecimal; empty for a link. original: of the upstream file, when it was edited.
    """

    path: str
    mode: int = 0o644
    size: int = 0
    sha256: str = ""
    target: str | None = None
    original: str | None = None


class RequiresChange(msgspec.Struct, frozen=True, kw_only=True):
    """A Requires-Dist line that was replaced, or dropped (`now` is None)."""

    was: str
    now: str | None
    reason: str


class FileChange(msgspec.Struct, frozen=True, kw_only=True):
    """An edit of one file: kind is `patch`, `rpath`, `slim` or `record`, `stub` for what stands in for
    one, or `pth` for one that is not edited, but allowed to run at every start."""

    kind: str
    path: str
    detail: str
    reason: str


class PruneChange(msgspec.Struct, frozen=True, kw_only=True):
    """What one prune rule left out: count of files and their bytes."""

    pattern: str
    reason: str
    files: int
    size: int


class Changes(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The ledger of one distribution: everything that differs from upstream's wheel, and why."""

    requires: Sequence[RequiresChange] = ()
    files: Sequence[FileChange] = ()
    pruned: Sequence[PruneChange] = ()
    untouched: str | None = None


class Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A run of whole frames of a layer. digest: sha256 of its compressed bytes.

    blob: key of the shared object in the store that holds them; None for the layer's own bytes, one after another.
    """

    digest: str
    frames: Sequence[Frame]
    blob: str | None = None

    @property
    def compressed(self) -> int:
        """Bytes in the bundle."""
        return sum(frame.compressed for frame in self.frames)


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """A finished layer. artifact: sha256 of the wheel it was made from."""

    name: str
    version: str
    parts: Sequence[Part]
    entries: Sequence[Entry]
    artifact: str | None = None
    changes: Changes = Changes()

    @property
    def frames(self) -> list[Frame]:
        """All frames in order."""
        return [frame for part in self.parts for frame in part.frames]

    @property
    def digest(self) -> str:
        """sha256 over the digests of the parts, a line each: equal digests mean equal bytes."""
        return hashlib.sha256("".join(f"{part.digest}\n" for part in self.parts).encode()).hexdigest()

    @property
    def compressed(self) -> int:
        """Bytes in the bundle."""
        return sum(part.compressed for part in self.parts)

    @property
    def size(self) -> int:
        """Bytes of the unpacked files."""
        return sum(entry.size for entry in self.entries)
