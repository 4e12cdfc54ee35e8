"""`cadtrain data prepare`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from cadtrain.data.writing.pipeline import ShardSummary, Summary


class DuplicatesChoice(StrEnum):
    """What becomes of parts with equal sequences; `cadtrain.data.writing.duplicates` says what each does."""

    OUT_OF_TEST = "out-of-test"
    OUT_OF_TRAIN = "out-of-train"
    DROP = "drop"
    KEEP = "keep"


def prepare(
    root: Annotated[
        Path,
        typer.Option(
            "--root",
            "-r",
            metavar="DIR",
            help="Folder with json/, and txt/, pcd/, img/ where they exist.",
            show_default=False,
        ),
    ],
    out: OutOption,
    num_points: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Points stored of each part; training draws some of them anew each time."
        ),
    ] = 4096,
    views: Annotated[int, typer.Option(min=0, max=8, metavar="N", help="Views stored of each part.")] = 8,
    image_size: Annotated[
        int, typer.Option(min=LEAST_PIXELS, metavar="PIXELS", help="Side of the stored views.")
    ] = 224,
    no_points: Annotated[bool, typer.Option("--no-points", help="Store no points.")] = False,
    no_images: Annotated[bool, typer.Option("--no-images", help="Store no views.")] = False,
    split_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Published split: Omni-CAD's raw_train_test_split.json or DeepCAD's train_val_test_split.json. "
            "Default: 90 / 5 / 5 by a hash of the document.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Only this many parts, spread over the folder.", show_default=False),
    ] = None,
    prefixes: Annotated[
        bool,
        typer.Option("--prefixes", help="Also make a part of each state of a design after one of its extrusions."),
    ] = False,
    duplicates: Annotated[
        DuplicatesChoice,
        typer.Option(
            help="Equal sequences. out-of-test: none of train in test and validation; out-of-train: none of those in train; "
            "drop: each once; keep: all stay."
        ),
    ] = DuplicatesChoice.OUT_OF_TEST,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Only share I of N, counted from 0, for array jobs; `cadtrain data merge` makes one dataset of all.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the points' draw.")] = 0,
    sampling: SamplingOption = Sampling.AREA,
    workers: WorkersOption = None,
    time_limit: TimeLimitOption = 60.0,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Prepare Omni-CAD, DeepCAD or Fusion 360 designs for training.

    Captions, point clouds (.npy or .npz, flat or in shards) and views (flat <id>_000.png or in folders) are taken from the folder; what is missing is made from the designs with the CAD kernel.

    Variants of one document always fall into one split. A part that cannot be used is left out; failures.jsonl in the output has its file and the reason. An interrupted run goes on where it stopped when it is started again with the same options.

    Examples:

      cadtrain data prepare -r Omni-CAD -o omnicad --split-file split.json

      cadtrain data prepare --root Omni-CAD --out trial --limit 200 --views 2

      cadtrain data prepare --root Omni-CAD --out text --no-points --no-images

      cadtrain data prepare -r raw -o ds --shard $SLURM_ARRAY_TASK_ID/16
    """
    from cadtrain.data.prepare.parts import PrepareOptions, prepare_shard
    from cadtrain.data.prepare.parts import prepare as run_prepare
    from cadtrain.data.synth.make import usable_cores
    from cadtrain.data.writing.pipeline import Workers
    from cadtrain.data.writing.share import Shard
    from cadtrain.ui.data import preparation_progress

    options = PrepareOptions(
        num_points=0 if no_points else num_points,
        num_views=0 if no_images else views,
        image_size=image_size,
        sampling=sampling.value,
        seed=seed,
        limit=limit,
        split_file=split_file,
        prefixes=prefixes,
        duplicates=duplicates.value,
    )
    share = Shard.parse(shard) if shard is not None else None
    processes = Workers(workers or usable_cores(), time_limit)
    summary: Summary | ShardSummary
    with interruptible(), preparation_progress("parts") as progress:
        if share is None:
            summary = run_prepare(root, out, options, processes, overwrite=overwrite, progress=progress)
        else:
            summary = prepare_shard(root, out, options, processes, share, overwrite=overwrite, progress=progress)
    show_summary(summary, as_json)
