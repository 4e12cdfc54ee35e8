"""The options of `cadtrain launch`, so that the command's signature can be read at a glance."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class ZeroChoice(StrEnum):
    """Values of `--zero`."""

    AUTO = "auto"
    ZERO = "0"
    ONE = "1"
    TWO = "2"
    THREE = "3"


Gpus = Annotated[
    str | None,
    typer.Option(
        "--gpus",
        metavar="N|LIST",
        help="Number of ranks, or GPUs by index or UUID, e.g. `0,2,3`. Default: every visible GPU.",
        show_default=False,
    ),
]
Zero = Annotated[ZeroChoice | None, typer.Option("--zero", help="ZeRO stage; auto takes the fastest that fits.")]
Offload = Annotated[
    bool, typer.Option("--offload", help="Keep optimizer states (and, in stage 3, weights) in host memory.")
]
GpuMemory = Annotated[
    str | None,
    typer.Option(
        "--gpu-memory",
        metavar="SIZE",
        help="Plan for, and let ranks take, no more than this of each GPU, e.g. 48GB.",
        show_default=False,
    ),
]
MaxRestarts = Annotated[
    int,
    typer.Option(
        "--max-restarts", min=0, metavar="N", help="Start a failed run again from its last checkpoint, N times at most."
    ),
]
HangTimeout = Annotated[
    str | None,
    typer.Option(
        "--hang-timeout",
        metavar="TIME",
        help="End a run in which no rank moves for this long; `off` waits for ever. Default: 10 times the longest "
        "step, at least 5m; 2h while loading or saving.",
        show_default=False,
    ),
]
Hostfile = Annotated[
    Path | None,
    typer.Option(
        "--hostfile", metavar="FILE", help="Run on the hosts in FILE (`host slots=N` a line).", show_default=False
    ),
]
Nodes = Annotated[
    int | None,
    typer.Option("--nodes", min=1, metavar="N", help="Run on N hosts of this SLURM job.", show_default=False),
]
SshCommand = Annotated[
    str | None,
    typer.Option(
        "--ssh-command",
        metavar="TEMPLATE",
        help="How to run a command on a host. Default: `ssh {host} {command}`, or srun with --nodes.",
        show_default=False,
    ),
]
Port = Annotated[
    int | None,
    typer.Option(
        "--port", min=1, max=65535, help="Port over which several hosts meet. Default: a free one.", show_default=False
    ),
]
Sbatch = Annotated[
    bool,
    typer.Option("--sbatch", help="Print a SLURM script for this run; start nothing. --gpus are those of a node."),
]
Preflight = Annotated[
    bool, typer.Option("--preflight/--no-preflight", help="Look at the machine first, as `cadtrain doctor` does.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be started; start and write nothing.")]
