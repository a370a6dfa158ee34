"""What a recipe asks of hosts beside what its files ask for."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Final, Literal

from composer.model._strict import Record

#: Characters of a reason, which every start of a bundle on such a host reads.
_LONGEST: Final = 200


class HostFloor(Record, frozen=True, kw_only=True):
    """The oldest L4T (Jetson Linux: 36 is JetPack 6, 38 is JetPack 7) for GPUs that only Jetson modules have.

    It holds for a bundle that is for GPUs of `sm` only: others are on hosts without L4T.
    """

    name: Literal["L4T"]
    version: str
    sm: tuple[int, ...]
    reason: str

    def applies(self, sms: Collection[int]) -> bool:
        """Whether it holds for a bundle with these GPU architectures."""
        return set(sms) <= set(self.sm)


def host_floor_faults(floors: Sequence[HostFloor], known: Collection[int]) -> Iterator[tuple[str, str]]:
    """(dotted path, fault) of every value that cannot be meant. known: the SMs that the recipe serves or refuses."""
    for index, one in enumerate(floors):
        if not re.fullmatch(r"\d{1,3}(\.\d{1,3}){0,2}", one.version, re.ASCII):
            yield f"floor[{index}].version", f"{one.version!r} is not a release such as '36' or '36.4'"
        if strange := [sm for sm in one.sm if sm not in known]:
            yield f"floor[{index}].sm", f"{', '.join(map(str, strange))} is not an SM of this recipe"
        if not one.reason.isprintable() or not 0 < len(one.reason) <= _LONGEST:
            yield f"floor[{index}].reason", f"must be one line of at most {_LONGEST} characters"
        if not one.sm:
            yield f"floor[{index}].sm", "must name the SMs that it is for"
