"""What a proof has to say about a tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

Severity = Literal["error", "warning", "note"]
#: The worst first.
SEVERITIES: Final[tuple[Severity, ...]] = get_args(Severity)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One fault, or one thing worth knowing, about one subject.

    `id` is stable and dotted (`closure.missing`); `subject` is a path in the prefix; `evidence` is what was seen, in
    one line; `fix` is what the reader can do, as an imperative sentence.
    """

    id: str
    severity: Severity
    subject: str
    evidence: str
    fix: str | None = None
