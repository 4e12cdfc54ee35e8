"""`cadtrain data export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cadtrain.cli.data.common import LEAST_PIXELS, LEAST_SECONDS, WorkersOption, interruptible
from cadtrain.cli.options import ForceOption, JsonOption

_STOPPED = "Stopped. Designs that were done are written."
_AGAIN = "Start the same command again with --force, or with the inputs that are left."


def export(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FILE",
            help="Designs (.json of DeepCAD, Omni-CAD or Fusion 360 Gallery), DeepCAD's vectors (.npy, .h5), or texts that "
            "hold one sequence.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for the files; made if need be.")
    ] = Path(),
    formats: Annotated[
        str,
        typer.Option(
            "--format",
            "-f",
            metavar="LIST",
            help="What to write, with commas between: step, stl, glb, png, cadquery (.py), deepcad17 (.npy, int64 N x 17), "
            "json (DeepCAD's), text (.txt, the compact grammar).",
        ),
    ] = "step",
    text: Annotated[
        list[str] | None,
        typer.Option("--text", metavar="SEQUENCE", help="A sequence text. May be repeated.", show_default=False),
    ] = None,
    dataset: Annotated[
        Path | None,
        typer.Option("--dataset", metavar="DIR", help="A prepared dataset to take --id from.", show_default=False),
    ] = None,
    ids: Annotated[
        list[str] | None,
        typer.Option("--id", metavar="ID", help="A part of --dataset. May be repeated.", show_default=False),
    ] = None,
    quantized: Annotated[
        bool, typer.Option("--quantized", help="Round designs to the 8-bit grid first, as the model sees them.")
    ] = False,
    views: Annotated[
        int,
        typer.Option(min=1, max=8, metavar="N", help="Pictures of each design; several are named <stem>_000.png …."),
    ] = 1,
    image_size: Annotated[int, typer.Option(min=LEAST_PIXELS, metavar="PIXELS", help="Side of the pictures.")] = 512,
    size: Annotated[
        float | None,
        typer.Option(
            "--size",
            metavar="MM",
            help="Longest side of the solid. Default: the design's own; 100 where a sequence has no size.",
            show_default=False,
        ),
    ] = None,
    workers: WorkersOption = None,
    time_limit: Annotated[
        float,
        typer.Option(
            "--time-limit", min=LEAST_SECONDS, metavar="SECONDS", help="A design that takes longer is given up."
        ),
    ] = 60.0,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write designs as files for other programs.

    A file appears whole or not at all, under the input's name. What fails is listed at the end with its reason; the others are written all the same, and the exit code is 2 (unreadable input) or 4 (no solid).

    Examples:

      cadtrain data export -f step,png -o shapes raw/json/*/*.json

      cadtrain data export -f deepcad17 -o vectors designs/*.json

      cadtrain data export --dataset ds --id 0000/00000071_00005 -f stl

      cadtrain data export --text "Sa68,92,122,120C128,128,19ENO140." -f glb
    """
    from dataclasses import asdict

    from cadtrain.data.export.designs import export
    from cadtrain.data.export.options import ExportOptions, parse_formats
    from cadtrain.data.export.source import dataset_sources, file_sources, text_sources
    from cadtrain.data.synth.make import usable_cores
    from cadtrain.data.writing.pipeline import Workers
    from cadtrain.errors import UsageError
    from cadtrain.ui.console import out as console
    from cadtrain.ui.console import print_json
    from cadtrain.ui.export import export_progress, export_view

    if bool(dataset) != bool(ids):
        raise UsageError("--dataset and --id go together.", hint="`cadtrain data inspect DIR` looks into a dataset.")
    options = ExportOptions(
        formats=parse_formats(formats), quantized=quantized, num_views=views, image_size=image_size, size_mm=size
    )
    machine = Workers(workers or usable_cores(), time_limit)
    sources = [*file_sources(files or ()), *text_sources(text or ())]
    if dataset is not None:
        sources += dataset_sources(dataset, ids or ())
    with interruptible(_STOPPED, hint=_AGAIN), export_progress() as progress:
        summary = export(
            sources,
            out,
            options,
            workers=machine.count,
            time_limit_seconds=machine.time_limit_seconds,
            force=force,
            progress=progress,
        )
    if as_json:
        designs = [asdict(d) | {"files": [str(file) for file in d.files]} for d in summary.designs]
        counts = {"files": summary.num_files, "failed": len(summary.failed), "failures": summary.failures}
        print_json({"out": str(out), **counts, "designs": designs})
    else:
        console().print(export_view(summary), soft_wrap=True)
    if summary.exit_code:
        raise typer.Exit(summary.exit_code)
