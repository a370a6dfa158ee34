"""Markers of requirements, for the target and not for the machine that composes."""

from __future__ import annotations

import pytest
from packaging.requirements import Requirement

from composer.errors import WheelError
from composer.model.marker import counts
from composer.steps.resolve import marker_environment

ARM = marker_environment("3.13", "aarch64")


@pytest.mark.parametrize(
    ("text", "extras", "expected"),
    [
        ("a", ("",), True), ("a; platform_machine == 'aarch64'", ("",), True),
        ("a; python_version < '3.13'", ("",), False),
        ("a; extra == 'fast'", ("",), False), ("a; extra == 'fast'", ("", "fast"), True),
    ],
)  # fmt: skip
def test_it_counts_for_the_target(text: str, extras: tuple[str, ...], expected: bool) -> None:
    assert counts(Requirement(text), ARM, extras) is expected


def test_without_extras_the_plain_distribution_is_meant() -> None:
    assert counts(Requirement("a; os_name == 'posix'"), ARM)


def test_a_marker_that_compares_what_has_no_order() -> None:
    with pytest.raises(WheelError, match="says nothing") as caught:
        counts(Requirement("a; os_name ~= 'x'"), ARM)
    assert "os_name" in str(caught.value)
