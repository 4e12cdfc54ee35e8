"""How the encoding of features looks: its size before it starts, a progress bar, a summary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from cadtrain.ui.console import err
from cadtrain.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from cadtrain.data.features.manifest import FeatureManifest
    from cadtrain.train.encode import EncodeProgress, EncodeSummary

_LINE_EVERY_SECONDS = 30.0
_WORDS = {"image": "views", "point": "draws of points"}


def plan_text(plan: FeatureManifest, device: str) -> str:
    """What is going to be written, before it is."""
    lines = []
    for kind, encoded in plan.encoded.items():
        count = sum(kinds[kind] for kinds in plan.rows.values())
        row = plan.row_bytes(kind)
        lines.append(
            f"{count:,} {_WORDS[kind]} of {encoded.tokens} tokens of {encoded.width}: "
            f"{format_bytes(row)} each, {format_bytes(count * row)}"
        )
    return "\n".join([*lines, f"{format_bytes(plan.total_bytes)} in {plan.dtype} altogether, encoded on {device}"])


@contextmanager
def encoding_progress(label: str) -> Iterator[Callable[[EncodeProgress], None]]:
    """A callback that shows an encoding on stderr: a bar on a terminal, a line every half minute elsewhere."""
    console = err()
    if not console.is_terminal:
        yield _line_teller(label)
        return
    with _bar(talk="{task.fields[talk]}") as progress:
        bar = progress.add_task(label, total=None, talk="reading weights")

        def tell(state: EncodeProgress) -> None:
            progress.update(bar, total=state.total, completed=state.done, talk=_talk(state))

        yield tell


@contextmanager
def checking_progress(num_files: int) -> Iterator[Callable[[str], None]]:
    """A callback that is told the name of each file that was read; shows a bar on a terminal."""
    if not err().is_terminal:
        yield lambda name: None
        return
    with _bar(talk="{task.fields[name]}") as progress:
        bar = progress.add_task("files", total=num_files, name="")
        yield lambda name: progress.update(bar, advance=1, name=name)


def summary_text(summary: EncodeSummary) -> Text:
    """What an encoding did, and how it is used."""
    manifest = summary.manifest
    made = manifest.total_rows - summary.resumed
    pace = f", {made / summary.seconds:,.0f}/s" if made and summary.seconds else ""
    resumed = f", {summary.resumed:,} from earlier runs" if summary.resumed else ""
    return Text(
        f"{manifest.total_rows:,} features ({format_bytes(manifest.total_bytes)}) in {summary.out}\n"
        f"{format_seconds(summary.seconds)}{pace}{resumed}\n"
        f"Train with --set data.features={summary.out}"
    )


def _bar(*, talk: str) -> Progress:
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn(talk),
    )  # fmt: skip
    return Progress(*columns, console=err(), transient=True)


def _line_teller(label: str) -> Callable[[EncodeProgress], None]:
    last = [0.0]

    def tell(state: EncodeProgress) -> None:
        if state.done < state.total and state.seconds - last[0] >= _LINE_EVERY_SECONDS:
            last[0] = state.seconds
            err().print(f"{label}: {state.done}/{state.total}, {_talk(state)}", markup=False)

    return tell


def _talk(state: EncodeProgress) -> str:
    made = state.done - state.resumed
    if not made or not state.seconds:
        return "starting"
    rate = made / state.seconds
    words = [f"{rate:,.1f}/s", f"{format_seconds((state.total - state.done) / rate)} left"]
    return ", ".join([*words, f"{state.resumed} from before"] if state.resumed else words)
