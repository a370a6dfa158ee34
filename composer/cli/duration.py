"""A length of time on the command line."""

from __future__ import annotations

import re
from typing import Any

import click

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


class Duration(click.ParamType[float]):
    """`90m`, `1.5h`, `2d`, or a number of seconds; the value is in seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:  # noqa: ANN401
        """Seconds, or click's own error."""
        found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)([smhd]?)", str(value).strip().lower())
        if found is None:
            self.fail(f"{value!r} is not a length of time such as 90m, 1.5h or 0", param, ctx)
        return float(found[1]) * _UNITS[found[2]]
