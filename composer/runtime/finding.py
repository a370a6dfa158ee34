"""Findings of the bundle's programs, in the form of `composer.model.finding.Finding`."""

from typing import Any

#: `id`, `severity`, `subject`, `evidence` (one line) and `fix` (an imperative sentence, or None).
Finding = dict[str, Any]
#: The worst first.
SEVERITIES = ("error", "warning", "note")


def finding(severity: str, id_: str, subject: str, evidence: str, fix: str | None = None) -> Finding:
    """One finding; `evidence` becomes one line."""
    return {"id": id_, "severity": severity, "subject": subject, "evidence": " ".join(evidence.split()), "fix": fix}


def error(id_: str, subject: str, evidence: str, fix: str | None = None) -> Finding:
    """What keeps the bundle from serving."""
    return finding("error", id_, subject, evidence, fix)


def warning(id_: str, subject: str, evidence: str, fix: str | None = None) -> Finding:
    """What makes it serve badly, or fail one day."""
    return finding("warning", id_, subject, evidence, fix)


def note(id_: str, subject: str, evidence: str, fix: str | None = None) -> Finding:
    """What is worth knowing."""
    return finding("note", id_, subject, evidence, fix)
