"""How an export looks: a bar while it runs, then what was written, remarked and missed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from cadtrain.ui.console import err
from cadtrain.ui.inspect.words import several

if TYPE_CHECKING:
    from cadtrain.data.export.designs import ExportSummary

_MOST_NOTES = 20


@contextmanager
def export_progress() -> Iterator[Callable[[int, int], None]]:
    """A callback for (done, total) that shows a bar on stderr, on a terminal only."""
    columns = (TextColumn("exporting"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err(), transient=True, disable=not err().is_terminal) as progress:
        bar = progress.add_task("exporting", total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)


def export_view(summary: ExportSummary) -> RenderableType:
    """How many files, remarks on them, and a line for every design that failed; print it with `soft_wrap`, for paths stay whole."""
    parts: list[RenderableType] = [Text(_headline(summary))]
    notes = [f"{design.name}: {note}" for design in summary.designs for note in design.notes]
    if notes:
        more = [f"and {len(notes) - _MOST_NOTES} more remarks; --json lists all"] if len(notes) > _MOST_NOTES else []
        parts.append(Text("\n".join([*notes[:_MOST_NOTES], *more]), style="yellow"))
    if summary.failed:
        lines = [_failure_line(d.name, d.failure.reason) for d in summary.failed if d.failure]
        parts += [Text(), Text("not written:", style="bold"), *(Text(line) for line in lines)]
    return Group(*parts)


def _headline(summary: ExportSummary) -> str:
    total, failed = len(summary.designs), len(summary.failed)
    missed = f"{failed} of {several(total, 'design')} failed"
    if failed == total:
        return f"0 files; {missed}"
    done = f"{several(summary.num_files, 'file')} of {several(total - failed, 'design')} in {summary.out}"
    return f"{done}; {missed}" if failed else done


def _failure_line(name: str, reason: str) -> str:
    return reason if reason.startswith(name) else f"{name}: {reason}"
