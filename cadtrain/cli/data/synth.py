"""`cadtrain data synth`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from cadtrain.cli.data.common import (
    LEAST_PIXELS,
    OutOption,
    OverwriteOption,
    Sampling,
    SamplingOption,
    TimeLimitOption,
    WorkersOption,
    interruptible,
    show_summary,
)
from cadtrain.cli.options import JsonOption


class CaptionLength(StrEnum):
    """How long captions are."""

    SHORT = "short"
    LONG = "long"
    BOTH = "both"


class Difficulty(StrEnum):
    """Which parts are drawn."""

    SIMPLE = "simple"
    FULL = "full"


def synth(
    out: OutOption,
    count: Annotated[int, typer.Option("--count", "-n", min=1, metavar="N", help="Number of parts.")] = 512,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="The same seed gives the same parts.")] = 0,
    num_points: Annotated[
        int, typer.Option(min=0, metavar="N", help="Points stored of each part; 0 stores none.")
    ] = 2048,
    views: Annotated[int, typer.Option(min=0, max=8, metavar="N", help="Rendered views of each part.")] = 2,
    image_size: Annotated[int, typer.Option(min=LEAST_PIXELS, metavar="PIXELS", help="Side of the views.")] = 224,
    sampling: SamplingOption = Sampling.AREA,
    captions: Annotated[
        CaptionLength, typer.Option(help="One clause, or sizes and places of everything, or half of the parts each.")
    ] = CaptionLength.BOTH,
    difficulty: Annotated[
        Difficulty, typer.Option(help="simple: none of the longer parts; full: parts as real ones are.")
    ] = Difficulty.FULL,
    workers: WorkersOption = None,
    time_limit: TimeLimitOption = 60.0,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make procedural parts with true captions; needs no download.

    Plates, blocks, brackets, flanges, housings and more. Their shapes, sizes and numbers of steps are distributed like those of real parts; the same seed gives the same parts.

    An interrupted run goes on where it stopped when it is started again.

    Examples:

      cadtrain data synth --out parts

      cadtrain data synth --count 20000 --views 8 --workers 16 --out parts20k
    """
    from cadtrain.data.synth.make import synthesize, usable_cores
    from cadtrain.ui.data import preparation_progress

    with interruptible(), preparation_progress("parts") as progress:
        summary = synthesize(
            count,
            out,
            seed=seed,
            num_points=num_points,
            num_views=views,
            image_size=image_size,
            sampling=sampling.value,
            captions=captions.value,
            difficulty=difficulty.value,
            workers=workers or usable_cores(),
            time_limit_seconds=time_limit,
            overwrite=overwrite,
            progress=progress,
        )
    show_summary(summary, as_json)
