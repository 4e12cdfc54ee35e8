"""What the commands of `cadtrain data` that make datasets share: options, the summary, the answer to Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cadtrain.data.writing.pipeline import ShardSummary, Summary

LEAST_PIXELS = 14
"""Smallest `--image-size`: one patch of the image towers."""
LEAST_SECONDS = 0.1
"""Smallest `--time-limit`."""

OutOption = Annotated[
    Path, typer.Option("--out", "-o", metavar="DIR", help="The dataset's folder.", show_default=False)
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers", "-w", min=1, metavar="N", help="Kernel processes. Default: one for each core.", show_default=False
    ),
]
TimeLimitOption = Annotated[
    float,
    typer.Option(
        "--time-limit", min=LEAST_SECONDS, metavar="SECONDS", help="A part that takes longer is left out and counted."
    ),
]


class Sampling(StrEnum):
    """How `--sampling` spreads points."""

    AREA = "area"
    FARTHEST = "farthest"


SamplingOption = Annotated[
    Sampling,
    typer.Option(
        "--sampling",
        help="How points are drawn from a solid: evenly at random (area), or each as far as can be from the others "
        "(farthest), which takes longer.",
    ),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace the output folder, once the new dataset is whole.")
]


@contextmanager
def interruptible(
    message: str = "Stopped. What is finished is kept beside the output folder.",
    hint: str | None = "Start the same command again: it goes on where it stopped.",
) -> Iterator[None]:
    """Ctrl-C and SIGTERM, as a cluster sends it at the end of the allotted time, end with a word about what is kept."""
    from cadtrain.errors import Interrupted

    def stop(number: int, _: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    received: list[int] = []
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(
            message,
            hint=hint,
            signal_number=received[0] if received else signal.SIGINT,
        ) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def show_summary(summary: Summary | ShardSummary, as_json: bool) -> None:
    """Print what a preparation did, as text or as JSON."""
    from dataclasses import asdict

    from cadtrain.data.writing.pipeline import ShardSummary
    from cadtrain.ui.console import out, print_json
    from cadtrain.ui.data import shard_text, summary_text

    if as_json:
        values = asdict(summary) | {"out": str(summary.out)}
        for left in values.get("leftovers", ()):
            left["folder"] = str(left["folder"])
        print_json(values)
    elif isinstance(summary, ShardSummary):
        out().print(shard_text(summary))
    else:
        out().print(summary_text(summary))
