"""Unified diffs, applied exactly: every line at the line number it names, or not at all.

GNU patch guesses (fuzz, offsets, reversed patches, other file names). A composed bundle must not: a patch is written
for one version of one file, and where the file differs the recipe is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from composer.errors import RecipeError

_HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@(?: .*)?")
_GIT = re.compile(rb"diff --git a/(.+) b/(.+)")
_NO_NEWLINE = b"\\ No newline at end of file"
# What git can ask for besides a change of text, and the other formats that `patch` reads.
_REFUSED = (
    b"rename ", b"copy ", b"similarity ", b"dissimilarity ", b"old mode ", b"new mode ", b"new file mode ",
    b"deleted file mode ", b"GIT binary patch", b"Binary files ", b"*** ", b"Index: ",
)  # fmt: skip
_FIX = "Make it again with `diff -u` or `git diff --no-renames` against the exact file."


@dataclass(frozen=True, slots=True, kw_only=True)
class Hunk:
    """One change: at 0-based line `start`, the lines `old` become `new`. Lines keep their ends."""

    start: int
    old: tuple[bytes, ...]
    new: tuple[bytes, ...]
    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePatch:
    """The changes to one file, in ascending order and apart from each other."""

    path: str
    hunks: tuple[Hunk, ...]


def apply_patch(patch: bytes, read: Callable[[str], bytes]) -> dict[str, bytes]:
    """Return the new content of every file that `patch` changes, by its path relative to the wheel's root.

    `read` gives a file's content, and raises KeyError or OSError where there is none. Raises RecipeError if the patch
    is malformed, names a path outside the root, creates, deletes, renames or re-modes a file, or does not fit exactly.
    """
    return {change.path: _changed(change, read) for change in parse_patch(patch)}


def parse_patch(patch: bytes) -> tuple[FilePatch, ...]:
    """Read a unified diff; text before its first file header (DEP-3 fields, a message) is skipped.

    Raises RecipeError with the line number of what is wrong.
    """
    parser = _Parser(patch.split(b"\n"))
    changes = tuple(parser.files())
    if not changes:
        raise RecipeError("not a unified diff", where="patch", why="it has no `--- a/PATH` line", fix=_FIX)
    twice = {change.path for change in changes if sum(other.path == change.path for other in changes) > 1}
    if twice:
        raise RecipeError("changes a file twice", where=f"patch: {min(twice)}", fix=_FIX)
    return changes


class _Parser:
    def __init__(self, lines: list[bytes]) -> None:
        self.lines = lines[:-1] if lines[-1] == b"" else lines
        self.at = 0
        self.named = ""

    def fault(self, what: str, *, line: int | None = None, why: str | None = None) -> RecipeError:
        return RecipeError(what, where=f"patch line {(self.at if line is None else line) + 1}", why=why, fix=_FIX)

    @property
    def here(self) -> bytes | None:
        return self.lines[self.at] if self.at < len(self.lines) else None

    def files(self) -> Iterator[FilePatch]:
        free_text = True
        while self.find_header(free_text=free_text):
            named, path = self.named, self.file_header()
            if named not in ("", path):
                raise self.fault("changes another file than its `diff --git` line names", why=f"{named} and {path}")
            yield FilePatch(path=path, hunks=self.hunks())
            free_text = False

    def find_header(self, *, free_text: bool) -> bool:
        """Go to the next file header, if there is one; `named` is what a `diff --git` line before it says."""
        self.named = ""
        while (line := self.here) is not None and not line.startswith(b"--- "):
            if line.startswith(_REFUSED):
                raise self.fault("asks for more than a change of text", why=line[:80].decode(errors="replace"))
            if git := _GIT.fullmatch(line):
                self.named = git[1].decode(errors="replace")
            elif not (free_text or line.startswith((b"diff ", b"index "))):
                raise self.fault("neither a hunk nor a file header", why=line[:80].decode(errors="replace"))
            self.at += 1
        return self.here is not None

    def file_header(self) -> str:
        old = self.path(b"--- ", b"a/")
        new = self.path(b"+++ ", b"b/")
        if old != new:
            raise self.fault("renames a file", line=self.at - 1, why=f"{old} to {new}")
        return old

    def path(self, mark: bytes, side: bytes) -> str:
        line = self.here or b""
        name = line.removeprefix(mark).split(b"\t")[0]
        if name == b"/dev/null":
            raise self.fault("creates or deletes a file")
        try:
            text = name.removeprefix(side).decode("ascii")
        except UnicodeDecodeError:
            text = ""
        safe = all(part not in ("", ".", "..") for part in text.split("/")) and not re.search(r'[\\"\x00-\x1f]', text)
        if not line.startswith(mark + side) or not safe:
            raise self.fault(f"not `{(mark + side).decode()}` and a relative path", why=repr(line[:80]))
        self.at += 1
        return text

    def hunks(self) -> tuple[Hunk, ...]:
        found: list[Hunk] = []
        shift = end = 0
        while (line := self.here) is not None and line.startswith(b"@@"):
            hunk, new_start = self.hunk(line)
            if hunk.start < end or hunk.start + shift != new_start:
                raise self.fault("line numbers of the hunks do not add up", line=hunk.line)
            shift += len(hunk.new) - len(hunk.old)
            end = hunk.start + len(hunk.old)
            found.append(hunk)
        if not found:
            raise self.fault("a file header without a hunk")
        return tuple(found)

    def hunk(self, header: bytes) -> tuple[Hunk, int]:
        numbers = _HUNK.fullmatch(header)
        if numbers is None:
            raise self.fault("malformed hunk header", why=repr(header[:80]))
        line = self.at
        old_start, old_count, new_start, new_count = (int(n) if n is not None else 1 for n in numbers.groups())
        self.at += 1
        old, new = self.body(old_count, new_count)
        if old == new:
            raise self.fault("a hunk that changes nothing", line=line)
        # A side without lines is numbered by the line before it (POSIX diff -u).
        start = old_start - (old_count > 0)
        return Hunk(start=start, old=tuple(old), new=tuple(new), line=line), new_start - (new_count > 0)

    def body(self, old_count: int, new_count: int) -> tuple[list[bytes], list[bytes]]:
        old: list[bytes] = []
        new: list[bytes] = []
        while len(old) < old_count or len(new) < new_count:
            line = self.here
            if line is None or line[:1] not in (b" ", b"-", b"+"):
                raise self.fault("the hunk ends before its counts do")
            self.at += 1
            text = line[1:] + b"\n"
            if self.here == _NO_NEWLINE:
                text = text[:-1]
                self.at += 1
            if line[:1] != b"+":
                old.append(text)
            if line[:1] != b"-":
                new.append(text)
        if (len(old), len(new)) != (old_count, new_count):
            raise self.fault("the hunk has more lines than its counts say")
        return old, new


def _changed(change: FilePatch, read: Callable[[str], bytes]) -> bytes:
    where = f"patch: {change.path}"
    try:
        content = read(change.path)
    except (KeyError, OSError) as fault:
        raise RecipeError("no such file in the distribution", where=where, fix=_FIX) from fault
    lines = _split(content)
    result: list[bytes] = []
    end = 0
    for hunk in change.hunks:
        result += lines[end : hunk.start]
        end = hunk.start + len(hunk.old)
        if tuple(lines[hunk.start : end]) != hunk.old:
            raise RecipeError("does not fit", where=where, why=_misfit(hunk, lines), fix=_FIX)
        result += hunk.new
    return b"".join(result + lines[end:])


def _split(content: bytes) -> list[bytes]:
    """Lines that end in LF; a CR is part of its line."""
    pieces = content.split(b"\n")
    return [piece + b"\n" for piece in pieces[:-1]] + ([pieces[-1]] if pieces[-1] else [])


def _misfit(hunk: Hunk, lines: list[bytes]) -> str:
    if tuple(lines[hunk.start : hunk.start + len(hunk.new)]) == hunk.new:
        return f"the change at line {hunk.start + 1} is there already"
    for number, wanted in enumerate(hunk.old, hunk.start):
        found = lines[number] if number < len(lines) else b"the end of the file"
        if found != wanted:
            return f"line {number + 1} is {found[:80]!r}, the patch says {wanted[:80]!r}"
    return "the file is shorter"
