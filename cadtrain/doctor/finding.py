"""What a check found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """How a finding stands."""

    OK = "ok"
    WARN = "warn"
    """Training works, but slower or with less, or something that is only sometimes needed is missing."""
    FAIL = "fail"
    """Training does not work until this is mended."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report: what was looked at, how it stands, what was seen, and what to do."""

    name: str
    verdict: Verdict
    evidence: str
    remedy: str = ""


def ok(name: str, evidence: str) -> Finding:
    """Nothing to do."""
    return Finding(name, Verdict.OK, evidence)


def warn(name: str, evidence: str, remedy: str) -> Finding:
    """Works, but could be better."""
    return Finding(name, Verdict.WARN, evidence, remedy)


def fail(name: str, evidence: str, remedy: str) -> Finding:
    """Must be mended."""
    return Finding(name, Verdict.FAIL, evidence, remedy)


@dataclass(frozen=True, slots=True)
class Report:
    """All findings, in the order of the checks."""

    findings: tuple[Finding, ...]

    @property
    def exit_code(self) -> int:
        """0, or 3 where anything failed."""
        return 3 if self.of(Verdict.FAIL) else 0

    def of(self, verdict: Verdict) -> list[Finding]:
        """The findings with this verdict."""
        return [finding for finding in self.findings if finding.verdict is verdict]

    def summary(self) -> str:
        """One line: whether training will work here."""
        failed, warned = self.of(Verdict.FAIL), self.of(Verdict.WARN)
        if failed:
            return f"Not ready: {_names(failed)} must be mended."
        if warned:
            return f"Ready to train; worth a look: {_names(warned)}."
        return "Ready to train."


def _names(findings: Sequence[Finding]) -> str:
    return ", ".join(dict.fromkeys(finding.name for finding in findings))
