"""A progress bar for work over many designs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cadtrain.ui.console import err
from cadtrain.units import format_seconds

if TYPE_CHECKING:
    from cadtrain.data.inspect import Progress

_LINE_EVERY_SECONDS = 30.0


@contextmanager
def inspection_progress(label: str) -> Iterator[Progress]:
    """A callback that shows how far it is on stderr: a bar on a terminal, a line every half minute elsewhere."""
    console = err()
    start = time.monotonic()
    if not console.is_terminal:
        yield _line_teller(label, start)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
        TextColumn("{task.fields[talk]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(label, total=None, talk="")

        def tell(done: int, total: int) -> None:
            progress.update(bar, total=total, completed=done, talk=_talk(done, total, start))

        yield tell


def _line_teller(label: str, start: float) -> Progress:
    last = start

    def tell(done: int, total: int) -> None:
        nonlocal last
        if done < total and time.monotonic() - last >= _LINE_EVERY_SECONDS:
            last = time.monotonic()
            err().print(f"{label}: {done}/{total}, {_talk(done, total, start)}", markup=False)

    return tell


def _talk(done: int, total: int, start: float) -> str:
    seconds = time.monotonic() - start
    if not done or not seconds:
        return ""
    rate = done / seconds
    return f"{rate:.0f}/s, {format_seconds((total - done) / rate)} left"
