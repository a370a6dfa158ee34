"""Path globs of recipes: `*` and `?` stay within one folder, `**` crosses folders, `[...]` is a set."""

from __future__ import annotations

import functools
import re

from composer.errors import RecipeError


@functools.cache
def compile_glob(pattern: str) -> re.Pattern[str]:
    """The pattern as a regular expression for whole POSIX paths; RecipeError for a set that cannot be meant."""
    out, index = [], 0
    while index < len(pattern):
        rest = pattern[index:]
        if rest.startswith("**/"):
            out.append("(?:.*/)?")
            index += 3
        elif rest.startswith("**"):
            out.append(".*")
            index += 2
        elif found := re.match(r"\[(!?)([^]]+)\]", rest):
            members = re.sub(r"([\\\[^&~|])", r"\\\1", found[2])
            out.append(f"(?!/)[{'^' if found[1] else ''}{members}]")
            index += found.end()
        else:
            out.append({"*": "[^/]*", "?": "[^/]"}.get(rest[0], re.escape(rest[0])))
            index += 1
    try:
        return re.compile("".join(out), re.DOTALL)
    except re.error as fault:
        raise RecipeError(f"{pattern!r} is not a glob", why=str(fault)) from fault


def matches(path: str, pattern: str) -> bool:
    """Whether the whole path matches."""
    return compile_glob(pattern).fullmatch(path) is not None
