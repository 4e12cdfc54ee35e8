"""Arguments and options that several commands share, so that they read the same everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


@dataclass
class CliState:
    """What the options before the command say; it travels as `typer.Context.obj`."""

    debug: bool = False


ConfigArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="CONFIG",
        help="A YAML file, or the name of a preset. Default: the preset `demo`.",
        show_default=False,
    ),
]

SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set one value of the configuration, e.g. `--set curriculum.0.duration=20`. May be repeated.",
        show_default=False,
    ),
]

RunDirOption = Annotated[Path | None, typer.Option("--run-dir", help="Run folder. Default: runs/<name>-<time>.")]

ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on with the run in --run-dir, from its newest whole checkpoint.")
]

TimeLimitOption = Annotated[
    str | None,
    typer.Option(
        "--time-limit", metavar="TIME", help="Save and leave in time for this limit, e.g. 3h50m.", show_default=False
    ),
]

InitFromOption = Annotated[
    Path | None,
    typer.Option(
        "--init-from",
        metavar="RUN",
        help="Begin a new run with the weights of this run or checkpoint.",
        show_default=False,
    ),
]

StartStageOption = Annotated[
    str | None,
    typer.Option(
        "--start-stage", metavar="NAME", help="Begin a new run at this stage of the curriculum.", show_default=False
    ),
]

JsonOption = Annotated[
    bool,
    typer.Option("--json", help='Write one JSON document to stdout: the result, or `{"error": …}`.'),
]

OutFileOption = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="FILE", help="Write to FILE instead of stdout.", show_default=False),
]

ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]


def as_overrides(overrides: list[str] | None, **checkpoint: object) -> tuple[str, ...]:
    """The `--set` options, and what options like `--time-limit` stand for: `checkpoint.<name>=<value>` where one is given."""
    return (
        *(overrides or ()),
        *(f"checkpoint.{name}={value}" for name, value in checkpoint.items() if value is not None),
    )
