"""`cadtrain doctor`: what is wrong with this machine and how to mend it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cadtrain.cli.options import JsonOption


def doctor(
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out the all-reduce, the write test and DeepSpeed's import.")
    ] = False,
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=1, help="Ranks that a run would have. Default: every visible GPU.")
    ] = None,
    run_folder: Annotated[Path, typer.Option("--run-dir", help="Where runs will be written.")] = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Check GPUs, driver, NCCL, memory, compilers, shared memory and disks; say what is wrong and how to mend it.

    Ends with 0, or with 3 where something must be mended before training works here.
    """
    from cadtrain.doctor.checks import examine
    from cadtrain.ui.console import err, out, print_json
    from cadtrain.ui.doctor import findings_view

    with err().status("looking") as status:
        report = examine(
            quick=quick, num_ranks=gpus, run_folder=run_folder, watch=lambda text: status.update(f"looking at {text}")
        )
    if as_json:
        rows = [asdict(finding) for finding in report.findings]
        print_json({"ready": report.exit_code == 0, "summary": report.summary(), "findings": rows})
    else:
        out().print(findings_view(report))
    if report.exit_code:
        raise typer.Exit(report.exit_code)
