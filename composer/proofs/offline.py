"""Prove that plain serving needs neither a network nor a compiler of the host, and say what is made at first use."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from composer.model.finding import Finding
from composer.model.globs import matches
from composer.model.runtime import NETWORK, RuntimeWork


def check_offline(
    rows: Iterable[RuntimeWork], paths: Collection[str], stack: Collection[str], *, sms: Sequence[int], python: str
) -> tuple[Finding, ...]:
    """One finding for each row that holds for any of the SMs, in their order, but for what was made ahead.

    An error, when plain serving needs what the bundle does not hold, or a warning, when there is another way to serve;
    a note, when only who asks for something does, or when all that is needed is there. paths: all files of the bundle;
    stack: normalised names of its distributions.
    """
    site = f"lib/python{python}/site-packages/"
    return tuple(
        _finding(row, sorted(_lacking(row, paths, site)))
        for row in rows
        if any(map(row.applies, sms)) and row.of in stack and not _is_made(row, paths, site)
    )


def _is_made(row: RuntimeWork, paths: Collection[str], site: str) -> bool:
    return bool(row.unless) and any(
        matches(path.removeprefix(site), pattern) for path in paths if path.startswith(site) for pattern in row.unless
    )


def _lacking(row: RuntimeWork, paths: Collection[str], site: str) -> Iterator[str]:
    """What the bundle does not hold. Its programs are in bin/, which is on PATH where it serves."""
    for need in row.needs:
        path = f"{site}{need}" if "/" in need else f"bin/{need}"
        if need == NETWORK or path not in paths:
            yield need


def _finding(row: RuntimeWork, lacking: list[str]) -> Finding:
    kept = f", kept in {row.cache}" if row.cache else ""
    if not lacking:
        return Finding(
            id="offline.compiles", severity="note", subject=row.of,
            evidence=f"{row.what}: made at first use with {', '.join(row.needs)}{kept}; {row.reason}",
        )  # fmt: skip
    needs = f"{row.what}: made at first use with {' and '.join(lacking)}, which the bundle does not hold"
    if row.asked_by:
        return Finding(
            id="offline.on-request", severity="note", subject=row.of,
            evidence=f"{needs}{kept}; only for {row.asked_by}: {row.reason}",
        )  # fmt: skip
    ahead = f"Add what has it made ahead: {', '.join(row.unless)}."
    fix = ahead if row.unless else None if row.instead else "Patch it, or drop the distribution."
    otherwise = f"; {row.instead} serves without" if row.instead else ""
    return Finding(
        id="offline.needs", severity="warning" if row.instead else "error", subject=row.of,
        evidence=f"{needs}; {row.reason}{otherwise}", fix=fix,
    )  # fmt: skip
