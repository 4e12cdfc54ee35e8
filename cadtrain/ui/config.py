"""How configurations look: reasons of values, findings of a lint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from cadtrain.config.deepspeed_lint import Finding
from cadtrain.ui.tables import plain_table

_LARGE = 1_000_000


def reasons_table(rows: Sequence[tuple[str, Any, str]]) -> Table:
    """(dotted key, value, why) as a table; the keys of a block stand below its name."""
    shown: list[tuple[str, str, str]] = []
    block = ""
    for key, value, why in rows:
        name, _, last = key.rpartition(".")
        if name and name != block:
            shown.append((name, "", ""))
        block = name
        shown.append((f"  {last}" if name else last, _as_json(value), why))
    return plain_table(("key", "value", "why"), shown)


def findings_text(path: Path, findings: Sequence[Finding]) -> Text:
    """One line a finding, errors and warnings in the order of the file, and their count."""
    if not findings:
        return Text(f"{path}: nothing to mend.")
    text = Text()
    for finding in findings:
        text.append(f"{finding.level:<7} ", style="red" if finding.level == "error" else "yellow")
        text.append(finding.fault.where, style="bold")
        text.append(f": {finding.fault.message}")
        if finding.fault.hint:
            text.append(f" {finding.fault.hint}", style="cyan")
        text.append("\n")
    errors = sum(finding.level == "error" for finding in findings)
    return text.append(f"{_counted(errors, 'error')}, {_counted(len(findings) - errors, 'warning')}.")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _as_json(value: Any) -> str:
    is_large = isinstance(value, int) and not isinstance(value, bool) and value >= _LARGE
    return f"{value:_}" if is_large else json.dumps(value)
