"""A delta: what makes a bundle out of an older one, as a file that a person, `compose apply` and a shell script read.

    compose-delta 1 BYTES           of the header's other lines
    old SIZE SHA256 NAME            the bundle to start from
    old-end SIZE SHA256             its last bytes: manifest, end of archive, seek table
    new SIZE SHA256 NAME            the bundle to make
    copy OFFSET SIZE                the parts of NEW in order: bytes of OLD, each at most once
    store SIZE                      or the next bytes of those that follow the header
    ...
    SHA256                          after the stored bytes: of all that precedes it

Sizes and offsets are decimal. A delta makes at most as many bytes as OLD and the delta have together.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from composer.errors import VerifyError

#: Bytes that hold the whole first line.
FIRST_LINE: Final = 64
#: Bytes at the end: a digest in hexadecimal and a line feed.
TRAILER: Final = 65
#: Bytes that are worth a part of their own: less costs more in the header, and in processes of the shell script.
SHORTEST_COPY: Final = 4096
#: A limit of ours on the header, far above any real one: between two bundles there are some hundred parts.
_MAX_HEADER: Final = 16 << 20
# At most 15 digits: sums of two such numbers fit in the 64 bits of a shell's arithmetic.
_NUMBER = r"(0|[1-9][0-9]{0,14})"
_DIGEST = r"([0-9a-f]{64})"
_NAME = r"([A-Za-z0-9][A-Za-z0-9._+-]{0,127})"
_FIRST = re.compile(rf"compose-delta 1 {_NUMBER}\n".encode())
_HEAD = re.compile(
    rf"old {_NUMBER} {_DIGEST} {_NAME}\nold-end {_NUMBER} {_DIGEST}\nnew {_NUMBER} {_DIGEST} {_NAME}\n", re.ASCII
)
_PART = re.compile(rf"(?:copy {_NUMBER}|store) {_NUMBER}\n", re.ASCII)
_FIX = "Copy the delta again, or make it again."


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """A bundle's file: its name, bytes and their sha256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Part:
    """The next `size` bytes of NEW: those of OLD from `offset` on, or, without an offset, the next stored ones."""

    size: int
    offset: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """The header of a delta. end: size and sha256 of OLD's last bytes, by which it is known without reading all."""

    old: Sealed
    end: tuple[int, str]
    new: Sealed
    parts: Sequence[Part]

    @property
    def stored(self) -> int:
        """Bytes of NEW that the delta brings."""
        return sum(part.size for part in self.parts if part.offset is None)


def render_header(delta: Delta) -> bytes:
    """The header's bytes. VerifyError for a bundle whose name could not be read back."""
    lines = [
        f"old {delta.old.size} {delta.old.sha256} {delta.old.name}", f"old-end {delta.end[0]} {delta.end[1]}",
        f"new {delta.new.size} {delta.new.sha256} {delta.new.name}",
        *(f"store {one.size}" if one.offset is None else f"copy {one.offset} {one.size}" for one in delta.parts),
    ]  # fmt: skip
    for one in (delta.old, delta.new):
        if not re.fullmatch(_NAME, one.name):
            raise VerifyError("its name is not a plain word", where=repr(one.name), fix="Build the bundle again.")
    body = "".join(f"{line}\n" for line in lines).encode("ascii")
    return f"compose-delta 1 {len(body)}\n".encode() + body


def header_size(data: bytes, where: str) -> int:
    """Bytes of the whole header, from the first FIRST_LINE bytes of a file. VerifyError when it is no delta."""
    found = _FIRST.match(data)
    if found is None:
        raise VerifyError("is no delta, or one of another version", where=where, fix="Give a file of `compose delta`.")
    if int(found[1]) > _MAX_HEADER:
        raise VerifyError(f"its header has {int(found[1])} bytes", where=where, why=f"{_MAX_HEADER} are the most")
    return len(found[0]) + int(found[1])


def parse_header(data: bytes, size: int, where: str) -> Delta:
    """The header of a delta, of all its bytes and the size of the file. VerifyError for what could not be meant."""
    text = data.decode("ascii", "replace")
    head = _HEAD.match(text, text.find("\n") + 1)
    if head is None:
        raise VerifyError("its header is damaged", where=where, fix=_FIX)
    delta = Delta(
        old=Sealed(name=head[3], size=int(head[1]), sha256=head[2]), end=(int(head[4]), head[5]),
        new=Sealed(name=head[8], size=int(head[6]), sha256=head[7]), parts=tuple(_parts(text, head.end(), where)),
    )  # fmt: skip
    if fault := _fault(delta, size - len(data) - TRAILER):
        raise VerifyError(fault, where=where, fix=_FIX)
    return delta


def _parts(text: str, at: int, where: str) -> Iterator[Part]:
    while at < len(text):
        found = _PART.match(text, at)
        if found is None:
            raise VerifyError("its list of parts is damaged", where=where, fix=_FIX)
        yield Part(int(found[2]), None if found[1] is None else int(found[1]))
        at = found.end()


def _fault(delta: Delta, stored: int) -> str:
    """What cannot be, of a header and the count of stored bytes in the file."""
    if stored != delta.stored:
        return f"{max(stored, 0)} stored bytes instead of {delta.stored}: it is cut short, or longer than it should be"
    if sum(part.size for part in delta.parts) != delta.new.size or not all(part.size for part in delta.parts):
        return "its parts do not add up to the new bundle"
    if delta.end[0] > delta.old.size:
        return "the end of the old bundle is longer than the bundle"
    ranges = sorted((one.offset, one.offset + one.size) for one in delta.parts if one.offset is not None)
    if ranges and ranges[-1][1] > delta.old.size:
        return "it copies from beyond the end of the old bundle"
    if any(end > begin for (_, end), (begin, _) in itertools.pairwise(ranges)):
        return "it copies bytes of the old bundle twice"
    return ""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A range of a bundle that may be found again in another one. digest: equal for equal content."""

    offset: int
    size: int
    digest: str

    @property
    def end(self) -> int:
        """The offset of what follows."""
        return self.offset + self.size


def shared(old: Iterable[Chunk], new: Iterable[Chunk]) -> Iterator[tuple[Chunk, Chunk]]:
    """(of OLD, of NEW) for each chunk of NEW that OLD has, too, in NEW's order; each of OLD's is used at most once.

    Of several equal ones that is the one after the last match, if it can be: then both are one copy.
    """
    places: defaultdict[str, dict[int, Chunk]] = defaultdict(dict)
    for chunk in old:
        places[chunk.digest][chunk.offset] = chunk
    last = -1
    for chunk in new:
        if equal := places.get(chunk.digest):
            found = equal.pop(last if last in equal else next(iter(equal)))
            last = found.end
            yield found, chunk


def parts_of(found: Iterable[tuple[Chunk, Chunk]], size: int) -> list[Part]:
    """The parts of a bundle of `size` bytes with these matches (OLD, NEW), which do not overlap.

    Neighbours become one part, and what is shorter than SHORTEST_COPY then is stored.
    """
    parts, at = list[Part](), 0
    for begin, offset, length in _runs(sorted(found, key=lambda pair: pair[1].offset)):
        if length >= SHORTEST_COPY:
            parts += [Part(begin - at)] if begin > at else []
            parts.append(Part(length, offset))
            at = begin + length
    return [*parts, Part(size - at)] if size > at else parts


def _runs(found: Sequence[tuple[Chunk, Chunk]]) -> Iterator[tuple[int, int, int]]:
    """(offset in NEW, offset in OLD, size) of each longest run that goes on in both."""
    run = (0, 0, 0)
    for old, new in found:
        begin, offset, size = run
        if (begin + size, offset + size) == (new.offset, old.offset):
            run = (begin, offset, size + new.size)
        else:
            yield run
            run = (new.offset, old.offset, new.size)
    yield run
