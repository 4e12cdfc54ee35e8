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
    bench: Annotated[
        bool, typer.Option("--bench", help="Measure, too: collectives by message size, matrix products, copies.")
    ] = False,
    gpus: Annotated[
        str | None,
        typer.Option(
            "--gpus",
            metavar="N|LIST",
            help="What a run would take: a number, or GPUs by index or UUID. Default: every visible GPU.",
            show_default=False,
        ),
    ] = None,
    run_folder: Annotated[Path, typer.Option("--run-dir", help="Where runs are, and will be written.")] = Path("runs"),
    port: Annotated[
        int | None,
        typer.Option("--port", min=1, max=65535, help="Port over which ranks will meet.", show_default=False),
    ] = None,
    hostfile: Annotated[
        Path | None,
        typer.Option(
            "--hostfile", metavar="FILE", help="Ask the hosts in FILE, too, as launch would.", show_default=False
        ),
    ] = None,
    ssh_command: Annotated[
        str | None,
        typer.Option(
            "--ssh-command",
            metavar="TEMPLATE",
            help="How to run a command on a host. Default: `ssh {host} {command}`.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check GPUs, driver, NCCL, memory, compilers, shared memory and disks; say what is wrong and how to mend it.

    Ends with 0, or with 3 where something must be mended before training works here.

    Examples:

      cadtrain doctor --quick

      cadtrain doctor --bench --gpus 0,1 --json
    """
    from cadtrain.cli.hosts import choose_hosts
    from cadtrain.doctor.checks import Scope, examine
    from cadtrain.errors import UsageError
    from cadtrain.launch.devices import parse_gpus
    from cadtrain.ui.console import err, out, print_json
    from cadtrain.ui.doctor import findings_view

    if quick and bench:
        raise UsageError("--quick leaves out what --bench measures.", hint="Give one of them.")
    hosts, shell = choose_hosts(hostfile, None, None, ssh_command)
    scope = Scope(quick, bench, parse_gpus(gpus), run_folder, port, hosts, shell)
    with err().status("looking") as status:
        report = examine(scope, watch=lambda text: status.update(f"looking at {text}"))
    if as_json:
        rows = [asdict(finding) for finding in report.findings]
        print_json({"ready": report.exit_code == 0, "summary": report.summary(), "findings": rows})
    else:
        out().print(findings_view(report))
    if report.exit_code:
        raise typer.Exit(report.exit_code)
