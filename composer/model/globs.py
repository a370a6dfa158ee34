"""Path globs of recipes: `*` and `?` stay within one folder, `**` crosses folders, `[...]` is a set."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence

from composer.errors import RecipeError

# Any text, and any folders or none. The latter begins a pattern or follows a slash.
_ANY, _FOLDERS = ".*?", "(?:.*?/)??"
# Any text within one folder.
_STAR = "[^/]*?"


@functools.cache
def compile_glob(pattern: str) -> re.Pattern[str]:
    """The pattern as a regular expression for whole POSIX paths; RecipeError for a set that cannot be meant.

    Each wildcard but the last takes as little as will do, and what it took is final (an atomic group): an earlier end
    of what follows `*` or `**` leaves the next of its kind more to choose from, never less. So the time grows with the
    square of a path's length at most, whatever the number of wildcards, and not with a power of that number.
    """
    parts = _split([*_tokens(pattern)], (_ANY, _FOLDERS))
    out = [_part(parts[0][1], last=len(parts) == 1)]
    for number, (wildcard, tokens) in enumerate(parts[1:], 2):
        last = number == len(parts)
        text = f"{wildcard}{_part(tokens, last=last)}"
        out.append(text if last else f"(?>{text})")
    try:
        return re.compile("".join(out), re.DOTALL)
    except re.error as fault:
        raise RecipeError(f"{pattern!r} is not a glob", why=str(fault)) from fault


def matches(path: str, pattern: str) -> bool:
    """Whether the whole path matches."""
    return compile_glob(pattern).fullmatch(path) is not None


def _tokens(pattern: str) -> Iterator[str]:
    """Wildcards, and regular expressions for one character each."""
    index = 0
    while index < len(pattern):
        rest = pattern[index:]
        if rest.startswith("**/") and pattern[index - 1 : index] in ("", "/"):
            token, length = _FOLDERS, 3
        elif rest.startswith("**"):
            token, length = _ANY, 2
        elif found := re.match(r"\[(!?)([^]]+)\]", rest):
            members = re.sub(r"([\\\[^&~|])", r"\\\1", found[2])
            token, length = f"(?!/)[{'^' if found[1] else ''}{members}]", found.end()
        else:
            token, length = {"*": _STAR, "?": "[^/]"}.get(rest[0], re.escape(rest[0])), 1
        yield token
        index += length


def _split(tokens: Sequence[str], at: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(wildcard, what follows it) for each of the wildcards `at`; first what comes before any, with none."""
    parts: list[tuple[str, list[str]]] = [("", [])]
    for token in tokens:
        if token in at:
            parts.append((token, []))
        else:
            parts[-1][1].append(token)
    return parts


def _part(tokens: Sequence[str], *, last: bool) -> str:
    """What lies between two wildcards that cross folders, or after the last of them."""
    chunks = [(star, "".join(text)) for star, text in _split(tokens, (_STAR,))]
    out = [chunks[0][1]]
    for number, (star, text) in enumerate(chunks[1:], 2):
        out.append(f"{star}{text}" if last and number == len(chunks) else f"(?>{star}{text})")
    return "".join(out)
