"""The options of a measurement, which `train` and `launch` share."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pathlib import Path

    from cadtrain.config.measure import MeasureRequest


class ProfileRanks(StrEnum):
    """Values of `--profile-ranks`."""

    FIRST = "0"
    ALL = "all"


PANEL = "Measuring (saves no checkpoint)"

Bench = Annotated[
    int | None,
    typer.Option(
        "--bench", min=1, metavar="N", help="Time N optimizer steps, report, and end.", show_default=False,
        rich_help_panel=PANEL,
    ),
]  # fmt: skip
BenchWarmup = Annotated[
    int, typer.Option("--bench-warmup", min=1, metavar="N", help="Steps before the timed ones.", rich_help_panel=PANEL)
]
BenchStage = Annotated[
    str | None,
    typer.Option(
        "--bench-stage", metavar="NAME", help="Stage of the curriculum to measure. Default: the first.",
        show_default=False, rich_help_panel=PANEL,
    ),
]  # fmt: skip
BenchTokens = Annotated[
    str | None,
    typer.Option(
        "--bench-tokens", metavar="LENGTHxROWS",
        help="Measure on full packs of random tokens, e.g. 4096x2, as other trainers are measured.",
        show_default=False, rich_help_panel=PANEL,
    ),
]  # fmt: skip
Profile = Annotated[
    bool,
    typer.Option("--profile", help="Profile a few steps: a trace to open and a table of where a step goes.", rich_help_panel=PANEL),
]  # fmt: skip
ProfileSteps = Annotated[
    int, typer.Option("--profile-steps", min=1, max=20, metavar="N", help="Steps of the profile.", rich_help_panel=PANEL)
]
ProfileRanksOption = Annotated[
    ProfileRanks, typer.Option("--profile-ranks", help="Whose profiles are kept.", rich_help_panel=PANEL)
]


def measure_request(
    bench: int | None, warmup: int, stage: str | None, tokens: str | None, profile: bool, profile_steps: int,
    profile_ranks: ProfileRanks, *, resume: bool, as_json: bool = False,
) -> MeasureRequest | None:  # fmt: skip
    """What the options ask for; None for a training run. Raises `UsageError` for options that need `--bench` or `--profile`.

    `as_json` is True where a training run has no report that it could print.
    """
    from cadtrain.config.measure import MeasureRequest, TokenRows
    from cadtrain.errors import UsageError

    if bench is None and not profile:
        for name, is_given in (("--bench-stage", stage), ("--bench-tokens", tokens), ("--json", as_json)):
            if is_given:
                raise UsageError("means nothing by itself.", where=name, hint="Add --bench N or --profile.")
        return None
    if resume:
        raise UsageError(
            "a measurement goes on with no run.", where="--resume", hint="Measure without it, in a folder of its own."
        )
    return MeasureRequest(
        steps=bench or 0,
        warmup=warmup,
        stage=stage,
        rows=None if tokens is None else TokenRows.parse(tokens),
        profile_steps=profile_steps if profile else 0,
        profiles_all_ranks=profile_ranks is ProfileRanks.ALL,
    )


def refuse_with(request: MeasureRequest | None, option: str) -> None:
    """Raise `UsageError` where a measurement and `option` were asked for together."""
    from cadtrain.errors import UsageError

    if request is not None:
        raise UsageError("does not go with --bench or --profile.", where=option, hint="Leave one of them away.")


@contextlib.contextmanager
def run_dir_for(run_dir: Path | None, request: MeasureRequest) -> Iterator[tuple[Path | None, bool]]:
    """The folder of a measurement and whether it stays: `run_dir`; or where none is given and no profile is to be kept, one
    that goes away if all goes well, for the report is printed."""
    import shutil
    import tempfile
    from pathlib import Path

    if run_dir is not None or request.profile_steps:
        yield run_dir, True
        return
    folder = Path(tempfile.mkdtemp(prefix="cadtrain-bench-"))
    try:
        yield folder, False
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # nothing was started; what ranks left behind stays where they failed
    shutil.rmtree(folder, ignore_errors=True)


def show_results(run_dir: Path, request: MeasureRequest, *, stays: bool, as_json: bool) -> None:
    """Print on stdout what the ranks of a finished measurement left in `run_dir`: one JSON document, or tables.

    `stays`: whether the folder will be there afterwards.
    """
    from cadtrain.checkpoint.layout import write_atomically
    from cadtrain.config.measure import PROFILE_NAME, REPORT_NAME, SUMMARY_NAME, SUMMARY_TEXT_NAME
    from cadtrain.ui.bench import profile_tables, report_tables
    from cadtrain.ui.console import as_text, err, out, print_json

    found: dict[str, Any] = {"run_dir": str(run_dir)} if stays else {}
    tables: list[Any] = []
    if request.steps:
        found["bench"] = json.loads((run_dir / REPORT_NAME).read_text(encoding="utf-8"))
        tables += report_tables(found["bench"])
    if request.profile_steps:
        folder = run_dir / PROFILE_NAME
        found["profile"] = json.loads((folder / SUMMARY_NAME).read_text(encoding="utf-8"))
        tables += (profile := list(profile_tables(found["profile"])))
        write_atomically(folder / SUMMARY_TEXT_NAME, as_text(profile))
        err().print(f"Open {folder}/rank_*.json.gz at ui.perfetto.dev or chrome://tracing.", markup=False)
    if as_json:
        print_json(found)
        return
    for table in tables:
        out().print(table)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 operations a second of a device by its data sheet; None where it is in no table."""
    from cadtrain.plan.rates import find_gpu

    gpu = find_gpu(device_name)
    return None if gpu is None else gpu.teraflops * 1e12
