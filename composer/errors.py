"""Every error that composer raises on purpose.

    ComposerError
    |-- RecipeError        2   a recipe, a target or a command line that cannot be meant
    |-- LockError          3   the lock is missing, stale, malformed or unsatisfiable
    |-- FetchError         4   an index or a download failed
    |   `-- IntegrityError 4   bytes arrived (or were cached) that are not the locked ones
    |-- BuildError         5   compiling something failed
    |-- WheelError         6   a wheel that breaks its specification or our limits
    |-- ElfError           7   a shared object that cannot be read or edited safely
    |-- CollisionError     8   two distributions want the same path
    |-- VerifyError        9   a bundle that is not what its manifest says
    `-- HostError         10   this machine lacks something (disk, permission, interpreter)

The number is the exit code of `compose`; interruption is 130. A library caller catches ComposerError and nothing
else: foreign exceptions are translated at the edge where they appear.
"""

from __future__ import annotations

from collections.abc import Sequence


class ComposerError(Exception):
    """What went wrong, where, why, and what to do about it.

    Parameters
    ----------
    what: the fault in one clause, no trailing full stop.
    where: the thing at fault: a file, a dotted recipe path, a distribution, a URL.
    why: the evidence, when it is not already in `what`.
    fix: what the reader can do next, as an imperative sentence.
    reference: a specification or issue that explains the rule.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        why: str | None = None,
        fix: str | None = None,
        reference: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.why = why
        self.fix = fix
        self.reference = reference

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        extra = [
            f"  {label}: {text}"
            for label, text in (("why", self.why), ("fix", self.fix), ("see", self.reference))
            if text
        ]
        return "\n".join([head, *extra])

    @classmethod
    def collect(cls, faults: Sequence[ComposerError]) -> None:
        """Raise nothing for no faults, the fault itself for one, and one error that lists them all for more."""
        if not faults:
            return
        if len(faults) == 1:
            raise faults[0]
        raise cls(f"{len(faults)} faults", why="\n" + "\n".join(f"- {fault}" for fault in faults))


class RecipeError(ComposerError):
    """A recipe, a target or a command line that cannot be meant."""

    exit_code = 2


class LockError(ComposerError):
    """The lock is missing, stale, malformed or unsatisfiable."""

    exit_code = 3


class FetchError(ComposerError):
    """An index or a download failed."""

    exit_code = 4


class IntegrityError(FetchError):
    """Bytes that are not the locked ones."""


class BuildError(ComposerError):
    """Compiling something failed."""

    exit_code = 5


class WheelError(ComposerError):
    """A wheel that breaks its specification or our limits."""

    exit_code = 6


class ElfError(ComposerError):
    """A shared object that cannot be read or edited safely."""

    exit_code = 7


class CollisionError(ComposerError):
    """Two distributions want the same path."""

    exit_code = 8


class VerifyError(ComposerError):
    """A bundle that is not what its manifest says."""

    exit_code = 9


class HostError(ComposerError):
    """This machine lacks something: disk, permission, an interpreter."""

    exit_code = 10
