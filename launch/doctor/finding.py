"""Hold what a check has found: whether it is well, and what to do where it is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

OK, WARNING, FAILED = "ok", "warning", "failed"
STYLES = {OK: None, WARNING: "yellow", FAILED: "red"}
HEADS = ["check", "state", "found", "cure"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Hold the answer of one check.

    Attributes:
        check: what was looked at.
        state: ``ok``; ``warning``: a job runs, but not as well as it could, or not in every way of starting it;
            ``failed``: it would not run.
        found: what was seen.
        cure: what to type or change, in one line; empty where all is well.
    """

    check: str
    state: str
    found: str
    cure: str = ""

    def __post_init__(self) -> None:
        assert (self.state == OK) == (self.cure == ""), f"{self.check}: {self.state} with the cure {self.cure!r}"

    def row(self) -> list[str]:
        """Return the cells of a table under ``HEADS``."""
        return [self.check, self.state, self.found, self.cure]


def has_failed(findings: Sequence[Finding]) -> bool:
    """Return whether any check says that a job would not run."""
    return any(finding.state == FAILED for finding in findings)
