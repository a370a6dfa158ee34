"""The head of a recipe, for tests that care for what comes after it."""

from __future__ import annotations

from collections.abc import Sequence


def head(*, sm: Sequence[int] = (90,)) -> str:
    """Everything that a recipe must have but components; tables may follow."""
    return f"""\
schema = 1
name = "small"
version = "1.0"
summary = "A test"
cuda = "12.8"
pythons = ["3.12"]
as-of = 2026-03-11T00:00:00Z
sm = {list(sm)}
"""
