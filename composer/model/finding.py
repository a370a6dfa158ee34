"""What a proof has to say about a tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]


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
