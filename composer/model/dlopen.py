"""What the libraries of a stack open by name at run time, as data of a recipe: no table of an object tells it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from packaging.utils import canonicalize_name, is_normalized_name

from composer.model._strict import Record
from composer.model.globs import matches


class DlopenRule(Record, frozen=True, kw_only=True):
    """Libraries that objects of a distribution open by name.

    of: the distribution; without it in a bundle the rule is about nothing. files: the objects that call dlopen (globs
    below site-packages, or below the prefix for what lies elsewhere), whose RPATH the loader searches. names: as they
    are given to dlopen. reason: what for. optional: what opens them goes on without.
    """

    of: str
    files: tuple[str, ...]
    names: tuple[str, ...]
    reason: str
    optional: bool = False

    def covers(self, path: str) -> bool:
        """Whether an object, by its path below the prefix, is one that opens them."""
        name = path.partition("/site-packages/")[2] or path
        return any(matches(name, pattern) for pattern in self.files)


def dlopen_faults(rules: Sequence[DlopenRule]) -> Iterator[tuple[str, str]]:
    """(key, fault) of every value that has the right type and cannot be meant; patterns are not looked at."""
    for number, rule in enumerate(rules):
        key = f"dlopen[{number}]"
        if not is_normalized_name(rule.of):
            yield f"{key}.of", f"{rule.of!r} is not a normalised name; write {canonicalize_name(rule.of)!r}"
        if not rule.files:
            yield f"{key}.files", "must name at least one object"
        if not rule.names:
            yield f"{key}.names", "must name at least one library"
        for name in rule.names:
            if not name.isprintable() or not name or "/" in name:
                yield f"{key}.names", f"{name!r} is not the name of a library without a folder"
        if not (rule.reason.strip() and rule.reason.isprintable()):
            yield f"{key}.reason", "must be one line of text"
