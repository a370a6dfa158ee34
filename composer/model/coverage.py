"""Which files of a distribution must hold GPU code for a target: the routes of their loaders, as data of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from composer.model._strict import Record
from composer.model.globs import matches

Requirement = Literal["every", "some", "none"]


class Coverage(Record, frozen=True, kw_only=True):
    """A rule for files of a distribution (globs below site-packages).

    sm, sm_not, machines: the targets on which they are loaded; on others nothing is asked of them.
    requires: `every` container holds something for the target, as in a library of which each source file is compiled
    for every GPU; `some` do, as in one with kernels for single architectures; `none`: nothing that is served runs it.
    otherwise: what becomes of it where no file holds anything, for what the stack can do without. The `files` are then
    providers in the order in which the loader asks them, and one is enough; else each pattern must match a file.
    """

    files: tuple[str, ...]
    requires: Requirement
    reason: str
    sm: tuple[int, ...] = ()
    sm_not: tuple[int, ...] = ()
    machines: tuple[str, ...] = ()
    otherwise: str | None = None

    def applies(self, sm: int) -> bool:
        """Whether the files are loaded on a GPU of this architecture, and must hold something for it."""
        return self.requires != "none" and (not self.sm or sm in self.sm) and sm not in self.sm_not

    def covers(self, path: str) -> bool:
        """Whether the rule is about a file, whatever the target; the path is below site-packages."""
        return any(matches(path, pattern) for pattern in self.files)


def coverage_faults(rules: Sequence[Coverage]) -> Iterator[tuple[str, str]]:
    """(key, fault) of every value that has the right type and cannot be meant; patterns are not looked at."""
    for number, rule in enumerate(rules):
        key = f"coverage[{number}]"
        if not rule.files:
            yield f"{key}.files", "must name at least one file"
        if rule.sm and rule.sm_not:
            yield f"{key}.sm-not", "cannot be given beside `sm`, which says it"
        if rule.requires == "none" and (rule.sm or rule.sm_not or rule.otherwise):
            yield f"{key}.requires", "`none` holds for every target: give no `sm`, `sm-not` or `otherwise`"
        for name, text in (("reason", rule.reason), ("otherwise", rule.otherwise)):
            if text is not None and not (text.strip() and text.isprintable()):
                yield f"{key}.{name}", "must be one line of text"
