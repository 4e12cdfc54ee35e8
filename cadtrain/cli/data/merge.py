"""`cadtrain data merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cadtrain.cli.data.common import OverwriteOption, interruptible, show_summary
from cadtrain.cli.options import JsonOption


def merge(
    out: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="The folder that was given to `prepare` as --out.", show_default=False),
    ],
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make one dataset of the shards of `data prepare --shard`.

    Files are renamed, not copied; only those that hold duplicates are written anew. The result is what one process would have made. If a shard is missing or not finished, nothing is changed and the error names it.

    Examples:

      cadtrain data merge omnicad

      cadtrain data merge omnicad --json | jq .manifest.counts
    """
    from cadtrain.data.writing.merge import merge as run_merge

    with interruptible():
        summary = run_merge(out, overwrite=overwrite)
    show_summary(summary, as_json)
