"""What the programs for serving have to say: findings, and the refusal that ends them."""

from __future__ import annotations

from collections.abc import Sequence

from ..finding import Finding

#: Exit statuses. 3 and 4 are those of the vLLM preflight script that these programs are modelled on; 10 to 15 are
#: those of a host below the bundle's floors.
HOST, USAGE, PORT_OF_OTHER, PORT_UNKNOWN, PORT_OWN, MODEL, GPU = 1, 2, 3, 4, 5, 6, 7


class Refusal(Exception):  # noqa: N818  # not a fault of the program
    """The server will not be started. `findings` say why, `status` is the program's exit status."""

    def __init__(self, status: int, *findings: Finding) -> None:
        super().__init__("; ".join(one["evidence"] for one in findings))
        self.status = status
        self.findings = findings


def shown(findings: Sequence[Finding]) -> str:
    """Lines for a person, each with its end. A subject that the evidence names is not said twice."""
    lines = []
    for one in findings:
        subject = "" if one["subject"] in one["evidence"] else f"{one['subject']}: "
        lines.append(f"{one['severity'].upper()}: {subject}{one['evidence']}\n")
        if one["fix"]:
            lines.append(f"  fix: {one['fix']}\n")
    return "".join(lines)
