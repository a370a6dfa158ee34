"""What a stack compiles or downloads where it serves: data of a recipe, which no file says by itself."""

from __future__ import annotations

from collections.abc import Iterator

from packaging.utils import is_normalized_name

from composer.errors import RecipeError
from composer.model._strict import Record
from composer.model.globs import compile_glob

#: As something needed: what an airgapped host does not have.
NETWORK = "network"


class RuntimeWork(Record, frozen=True, kw_only=True):
    """Something that is made at first use on the host.

    of: the distribution that does it. needs: files below site-packages (with a `/`), programs, or `network`. unless:
    globs below site-packages; a file that matches means that it was made ahead. cache: the variable of the folder where
    the result is kept. asked-by: what a user does to get there; without it plain serving does. instead: what a user
    can do to serve without. sm, sm-not: targets.
    """

    what: str
    of: str
    reason: str
    needs: tuple[str, ...]
    unless: tuple[str, ...] = ()
    cache: str | None = None
    asked_by: str | None = None
    instead: str | None = None
    sm: tuple[int, ...] = ()
    sm_not: tuple[int, ...] = ()

    def applies(self, sm: int) -> bool:
        """Whether the row holds for a target SM."""
        return (not self.sm or sm in self.sm) and sm not in self.sm_not


def runtime_faults(row: RuntimeWork) -> Iterator[tuple[str, str]]:
    """(key, fault) of every value that cannot be meant."""
    if not is_normalized_name(row.of):
        yield "of", f"{row.of!r} is not a normalised name"
    if not row.needs:
        yield "needs", "must name at least one file or program"
    for number, pattern in enumerate(row.unless):
        try:
            compile_glob(pattern)
        except RecipeError as fault:
            yield f"unless[{number}]", fault.what
    if row.cache is not None and not (row.cache.isidentifier() and row.cache.isupper()):
        yield "cache", f"{row.cache!r} is not the name of a variable"
