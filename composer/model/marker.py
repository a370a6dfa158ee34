"""Whether a requirement counts for a target: its environment marker (PEP 508), and the extras that are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from packaging.markers import UndefinedComparison, UndefinedEnvironmentName
from packaging.requirements import Requirement

from composer.errors import WheelError


def counts(wanted: Requirement, environment: Mapping[str, str], extras: Iterable[str] = ("",)) -> bool:
    """Whether `wanted` holds in the environment with any of the extras, of which "" stands for none.

    environment: all marker variables but `extra`. Raises WheelError for a marker that compares what has no order.
    """
    if wanted.marker is None:
        return True
    try:
        return any(wanted.marker.evaluate({**environment, "extra": extra}) for extra in extras)
    except (UndefinedComparison, UndefinedEnvironmentName) as fault:
        raise WheelError(f"the marker of {str(wanted)!r:.200} says nothing", where="METADATA", why=str(fault),
                         fix="Take another release, or replace the requirement in the recipe.") from fault  # fmt: skip
