"""Path globs of recipes: `*` and `?` stay within one folder, `**` crosses folders, `[...]` is a set."""

from __future__ import annotations

import functools
import re


@functools.cache
def compile_glob(pattern: str) -> re.Pattern[str]:
    """The pattern as a regular expression for whole POSIX paths."""
    out, index = [], 0
    while index < len(pattern):
        rest = pattern[index:]
        if rest.startswith("**/"):
            out.append("(?:.*/)?")
            index += 3
        elif rest.startswith("**"):
            out.append(".*")
            index += 2
        elif found := re.match(r"\[!?[^]]+\]", rest):
            out.append(found[0].replace("[!", "[^"))
            index += found.end()
        else:
            out.append({"*": "[^/]*", "?": "[^/]"}.get(rest[0], re.escape(rest[0])))
            index += 1
    return re.compile("".join(out), re.DOTALL)


def matches(path: str, pattern: str) -> bool:
    """Whether the whole path matches."""
    return compile_glob(pattern).fullmatch(path) is not None
