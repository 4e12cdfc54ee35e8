"""How preparations look: a progress bar, a summary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from cadtrain.data.manifest import MOVED
from cadtrain.ui.console import err
from cadtrain.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from cadtrain.data.writing.costs import CostSummary
    from cadtrain.data.writing.pipeline import PrepareProgress, ShardSummary, Summary
    from cadtrain.data.writing.pipeline import Progress as Tell

_LINE_EVERY_SECONDS = 30.0


@contextmanager
def preparation_progress(label: str) -> Iterator[Tell]:
    """A callback that shows a preparation on stderr: a bar on a terminal, a line every half minute elsewhere."""
    console = err()
    if not console.is_terminal:
        yield _line_teller(label)
        return
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
        TextColumn("{task.fields[talk]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(label, total=None, talk="starting kernel workers")

        def tell(state: PrepareProgress) -> None:
            progress.update(bar, total=state.total, completed=state.done, talk=_talk(state))

        yield tell


def _line_teller(label: str) -> Tell:
    last = [0.0]

    def tell(state: PrepareProgress) -> None:
        if state.done and state.done < state.total and state.seconds - last[0] >= _LINE_EVERY_SECONDS:
            last[0] = state.seconds
            err().print(f"{label}: {state.done}/{state.total}, {_talk(state)}", markup=False)

    return tell


def _talk(state: PrepareProgress) -> str:
    words = ["starting workers" if state.done == state.resumed else _pace(state.recent_rate)]
    if state.seconds_left is not None:
        words.append(f"{format_seconds(state.seconds_left)} left")
    if state.resumed:
        words.append(f"{state.resumed} from before")
    if state.failures:
        words.append(f"left out: {_counted(state.failures)}")
    return ", ".join(words)


def _pace(rate: float) -> str:
    """Inputs a second, or a minute where that is less than one a second."""
    return f"{rate:.1f}/s" if rate >= 1 else f"{rate * 60:.1f}/min"


def summary_text(summary: Summary) -> RenderableType:
    """What a preparation did, in a few lines."""
    manifest = summary.manifest
    counts = ", ".join(f"{number} {split}" for split, number in manifest.counts.items())
    lines = [f"{summary.written} parts in {summary.out}: {counts}"]
    if summary.is_reused and not summary.was_compared:
        lines.append("It is one dataset already; no finished shards lie beside it. Nothing was done.")
    elif summary.is_reused:
        lines.append("It was there already, made from the same inputs with the same options; nothing was done.")
    else:
        pace = f", {summary.parts_per_second:.1f} parts/s" if summary.inputs > summary.resumed else ""
        resumed = f", {summary.resumed} inputs from earlier runs" if summary.resumed else ""
        lines.append(f"{format_seconds(summary.seconds)}{pace}{resumed}")
    if manifest.failures:
        lines.append(f"left out: {_counted(manifest.failures)} (failures.jsonl has file and reason)")
    notes = {kind: number for kind, number in summary.notes.items() if kind != MOVED}
    moved = summary.notes.get(MOVED, 0)
    if notes:
        lines.append("used in spite of a fault: " + _counted(notes))
    if moved:
        lines.append(f"moved to another split, where an equal design is: {moved} (failures.jsonl names them)")
    if "file" in manifest.captions or "described" in manifest.captions:
        from_files, made = (manifest.captions.get(source, 0) for source in ("file", "described"))
        lines.append(f"captions: {from_files} from files, {made} made from sequences")
    lines += _cost_lines(summary.costs)
    lines += [
        f"{left.folder} ({format_bytes(left.num_bytes)}) was left by a run with other options: delete it if not wanted"
        for left in summary.leftovers
    ]
    return Text("\n".join(lines))


def shard_text(summary: ShardSummary) -> RenderableType:
    """What one process of an array job did, and what is left to do."""
    out, shard = summary.out, summary.shard
    lines = [
        f"shard {shard.index}/{shard.count} of {out} is finished: {summary.written} parts of {summary.inputs} inputs"
    ]
    resumed = f", {summary.resumed} inputs from earlier runs" if summary.resumed else ""
    lines.append(f"{format_seconds(summary.seconds)}{resumed}")
    if summary.failures:
        lines.append(f"left out: {_counted(summary.failures)}")
    if summary.notes:
        lines.append(f"used in spite of a fault: {_counted(summary.notes)}")
    if summary.blocks_left:
        lines.append(f"Left to the other shards: {summary.blocks_left} of {summary.num_blocks} blocks.")
    else:
        lines.append(f"All shards are finished. Next: cadtrain data merge {out}")
    return Text("\n".join(lines))


def _counted(numbers: dict[str, int]) -> str:
    return ", ".join(
        f"{number} {kind}" for kind, number in sorted(numbers.items(), key=lambda pair: (-pair[1], pair[0]))
    )


def _cost_lines(costs: CostSummary | None) -> list[str]:
    if costs is None:
        return []
    memory = f"; most memory of a worker {format_bytes(costs.peak_memory_mib * 2**20)}" if costs.peak_memory_mib else ""
    slowest = ", ".join(
        f"{part} {_short(seconds)}" + (f" ({kind})" if kind else "") for part, seconds, _, kind in costs.slowest[:3]
    )
    return [
        f"a part took {_short(costs.median_seconds)} (median), {_short(costs.p99_seconds)} (p99){memory}",
        f"slowest: {slowest} (costs.parquet has all)",
    ]


def _short(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
