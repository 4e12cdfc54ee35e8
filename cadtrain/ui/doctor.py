"""How a machine's examination looks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from cadtrain.ui.tables import plain_table

if TYPE_CHECKING:
    from cadtrain.doctor.finding import Report

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def findings_view(report: Report) -> RenderableType:
    """Every check with its verdict, what was seen and how to mend it, and a last line that sums up."""
    rows = []
    for finding in report.findings:
        seen = Text(finding.evidence)
        if finding.remedy:
            seen.append(f"\n→ {finding.remedy}", style="cyan")
        rows.append((finding.name, Text(finding.verdict.value, style=_STYLES[finding.verdict.value]), seen))
    summary = Text(f"\n{report.summary()}", style="bold red" if report.exit_code else "bold green")
    return Group(plain_table(("check", "", "what was seen"), rows), summary)


def warnings_view(report: Report) -> RenderableType:
    """The warnings alone, one after another, as they stand above a run that starts nevertheless."""
    text = Text()
    for finding in report.findings:
        if finding.verdict.value == "warn":
            text.append(f"{finding.name}: ", style=_STYLES["warn"])
            text.append(finding.evidence)
            text.append(f"\n→ {finding.remedy}\n", style="cyan")
    text.rstrip()
    return text
