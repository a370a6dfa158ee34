"""Findings of the doctor, and how a report of them is shown: as text, the worst first, or as JSON."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence

from ..finding import SEVERITIES, Finding

_FILES = ("content", "extra", "missing")
#: How many findings of one id and severity are shown one by one: a tree without its files would give 39,000.
_SHOWN = 5


def group(one: Finding) -> str:
    """The check that a finding belongs to: its id up to the first dot, but for those of `compose verify`."""
    name = str(one["id"]).partition(".")[0]
    return "files" if name in _FILES else "env" if name == "serve" else name


def has_errors(found: Sequence[Finding]) -> bool:
    """Whether any of them is an error."""
    return any(one["severity"] == "error" for one in found)


def as_json(title: str, found: Sequence[Finding], checked: Sequence[str], **more: object) -> str:
    """One JSON object in one line: what was checked, every finding, the worst first, and `more`."""
    report = {"schema": 1, "bundle": title, **more, "checked": list(checked), "findings": _ordered(found)}
    # A file name that is not UTF-8 has surrogates, which only escapes can carry.
    return json.dumps(report)


def as_text(title: str, found: Sequence[Finding], checked: Sequence[str]) -> str:
    """Every finding with what to do about it, the checks that found no fault, and a count."""
    faulty = {group(one) for one in found if one["severity"] != "note"}
    fine = [name for name in checked if name not in faulty]
    lines = [title, *_lines(_ordered(found))]
    if fine:
        lines.append(f"ok: {', '.join(fine)}")
    lines.append(_tally(found))
    return "\n".join(lines).encode(errors="backslashreplace").decode()


def _ordered(found: Sequence[Finding]) -> list[Finding]:
    return sorted(found, key=lambda one: SEVERITIES.index(one["severity"]))


def _lines(found: Sequence[Finding]) -> Iterator[str]:
    totals = Counter((one["severity"], one["id"]) for one in found)
    shown: Counter[tuple[str, str]] = Counter()
    for one in found:
        kind = one["severity"], one["id"]
        shown[kind] += 1
        if shown[kind] <= _SHOWN:
            yield f"{one['severity']}: {one['id']}: {one['subject']}: {one['evidence']}"
            if one["fix"]:
                yield f"  fix: {one['fix']}"
        elif shown[kind] == totals[kind]:
            yield f"{one['severity']}: {one['id']}: and {totals[kind] - _SHOWN} more (--json lists all)"


def _tally(found: Sequence[Finding]) -> str:
    counts = Counter(one["severity"] for one in found)
    parts = [f"{counts[name]} {name}{'' if counts[name] == 1 else 's'}" for name in SEVERITIES]
    return f"{'not ready' if counts['error'] else 'ready'}: {', '.join(parts)}"
