"""The console of a run: a line for what happened, and on a terminal one line that moves."""

from __future__ import annotations

import time
from typing import Any

from cadtrain.metrics.record import RunFacts, StepRecord, ValidationRecord
from cadtrain.ui.console import err
from cadtrain.units import format_seconds

SECONDS_BETWEEN_LINES = 5.0
"""Where stderr is no terminal, at most one step line in this time, so that logs stay readable."""


class TrainingConsole:
    """Rank 0's view of a run on stderr. Source of time left: the mean step time of the last 20 records."""

    def __init__(self) -> None:
        self._progress: Any = None
        self._task: Any = None
        self._facts: RunFacts | None = None
        self._last_line = 0.0
        self._recent: list[float] = []
        self._last_stage = ""

    def start(self, facts: RunFacts) -> None:
        """Show what will run."""
        from rich.markup import escape
        from rich.table import Table

        self._facts = facts
        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_column(style="bold")
        table.add_column()
        for label, text in facts.lines:
            table.add_row(label, escape(text))
        err().print(table)
        if err().is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._progress = Progress(*columns, console=err(), transient=True)
            self._task = self._progress.add_task(
                "starting", total=facts.total_steps, completed=facts.first_step, text=""
            )
            self._progress.start()

    def step(self, record: StepRecord) -> None:
        """Move the bar, or now and then write a line."""
        assert self._facts is not None
        self._recent = [*self._recent[-19:], record.seconds]
        left = (self._facts.total_steps - record.step) * sum(self._recent) / len(self._recent)
        memory = f"  {record.memory_gib:.1f} GiB" if record.memory_gib is not None else ""
        skipped = f"  {record.skipped_steps} skipped" if record.skipped_steps else ""
        text = (
            f"loss {record.loss:.4f}  lr {record.lr:.2e}  {record.tokens_per_second:,.0f} tok/s{memory}{skipped}"
            f"  {format_seconds(left)} left"
        )
        if self._progress is not None:
            self._progress.update(
                self._task, completed=record.step, description=f"[bold]{record.stage}[/bold]", text=text
            )
            return
        ends = any(record.step == last for _, last in self._facts.stages)
        if ends or record.stage != self._last_stage or time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line, self._last_stage = time.monotonic(), record.stage
            self._print(f"step {record.step}/{self._facts.total_steps}  {record.stage}  {text}")

    def validation(self, record: ValidationRecord) -> None:
        """Write the losses."""
        losses = ", ".join(f"{key} {loss:.4f}" for key, loss in record.losses.items())
        where = f"validation at step {record.step} ({record.stage})"
        self._print(f"{where}: {losses or 'no sample fits'} ({format_seconds(record.seconds)})")

    def note(self, text: str) -> None:
        """Write it."""
        self._print(text)

    def rewind(self, step: int) -> None:
        """Move the bar back."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._progress is not None:
            self._progress.stop()

    def _print(self, text: str) -> None:
        console = self._progress.console if self._progress is not None else err()
        console.print(text, markup=False, highlight=False, soft_wrap=True)
