"""`cadtrain data inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cadtrain.cli.data.common import LEAST_SECONDS, interruptible
from cadtrain.cli.exit_codes import ExitCode
from cadtrain.cli.options import JsonOption

if TYPE_CHECKING:
    from cadtrain.data.inspect import PreparedScan, RawScan

_MOST_THUMBNAILS = 300


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="A prepared dataset, an Omni-CAD folder, a folder of DeepCAD or Fusion 360 JSON files, or one such file.",
            show_default=False,
        ),
    ],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            "-t",
            metavar="DIR",
            help="Measure lengths in tokens: a folder with tokenizer.json, or `byte` for the demo's tokenizer.",
            show_default=False,
        ),
    ] = None,
    codec: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Written form whose tokens are counted. Default: as stored, `compact` for raw designs.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        str, typer.Option(metavar="TOKENS", help="Say how many samples these numbers of tokens keep.")
    ] = "512,1024,2048,4096",
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a page with charts and pictures, in one file.", show_default=False),
    ] = None,
    thumbnails: Annotated[
        int, typer.Option(min=0, max=_MOST_THUMBNAILS, metavar="N", help="Designs pictured on the page.")
    ] = 48,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Read only this many designs: spread over a folder; the first of each split of a dataset.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", "-w", min=1, metavar="N", help="Processes. Default: one for each core.", show_default=False
        ),
    ] = None,
    time_limit: Annotated[
        float,
        typer.Option(
            "--time-limit", min=LEAST_SECONDS, metavar="SECONDS", help="A picture that takes longer is left out."
        ),
    ] = 20.0,
    as_json: JsonOption = False,
) -> None:
    """Show what a dataset or a folder of designs holds.

    Counts, modalities, lengths, operations, failures, duplicates, and designs on both sides of the split.

    Raw designs are read as `data prepare` would read them; no solid is built but for the pictures of --html. Where nothing can be read, the exit code is 2.

    Examples:

      cadtrain data inspect Omni-CAD --limit 5000

      cadtrain data inspect omnicad -t models/qwen3-8b --budget 1024,2048

      cadtrain data inspect omnicad --html omnicad.html

      cadtrain data inspect omnicad --json | jq .splits.train.sequence_lengths
    """
    from cadtrain.cad.codec import get_codec
    from cadtrain.data.inspect import LengthOptions, inspect_path, parse_budgets, resolve_tokenizer
    from cadtrain.data.synth.make import usable_cores
    from cadtrain.errors import UsageError
    from cadtrain.ui.inspect.progress import inspection_progress

    if codec is not None:
        get_codec(codec)
        if tokenizer is None:
            raise UsageError("a codec to count tokens in, but no tokenizer.", where="--codec", hint="Add --tokenizer.")
    lengths = LengthOptions(
        tokenizer=resolve_tokenizer(tokenizer) if tokenizer else None,
        label=tokenizer or "",
        codec=codec,
        budgets=parse_budgets(budget),
    )
    if html is not None and (html.is_dir() or not html.parent.is_dir()):
        reason = "is a folder" if html.is_dir() else "is in a folder that does not exist"
        raise UsageError(f"the page {reason}.", where=f"--html {html}", hint="Give the file to write.")
    with interruptible("Stopped; nothing was written.", hint=None):
        with inspection_progress("designs") as progress:
            scan = inspect_path(path, lengths, limit=limit, workers=workers or usable_cores(), progress=progress)
        if html is not None:
            _write_page(scan, html, thumbnails, workers or usable_cores(), time_limit)
    _show(scan, as_json)
    if not scan.report.has_designs:
        raise typer.Exit(ExitCode.USAGE)


def _write_page(scan: RawScan | PreparedScan, html: Path, thumbnails: int, workers: int, time_limit: float) -> None:
    from cadtrain.data.inspect import make_gallery
    from cadtrain.ui.console import err
    from cadtrain.ui.html.document import write_page
    from cadtrain.ui.inspect.page import inspection_page
    from cadtrain.ui.inspect.progress import inspection_progress

    with inspection_progress("pictures") as progress:
        cards = make_gallery(scan, thumbnails, workers=workers, time_limit_seconds=time_limit, progress=progress)
    size = write_page(html, inspection_page(scan.report, cards))
    err().print(f"page: {html} ({size})", markup=False, soft_wrap=True)


def _show(scan: RawScan | PreparedScan, as_json: bool) -> None:
    from dataclasses import asdict

    from cadtrain.ui.console import out, print_json
    from cadtrain.ui.inspect.terminal import inspection_view

    if as_json:
        print_json(asdict(scan.report))
    else:
        out().print(inspection_view(scan.report, out().width))
