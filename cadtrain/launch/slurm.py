"""A script for SLURM that trains, saves ahead of the end of its time, puts itself back into the queue, and goes on."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cadtrain.units import parse_seconds

AHEAD_SECONDS = 300
"""How long before the end SLURM asks the run to save and leave."""
CORES_PER_GPU = 8


@dataclass(frozen=True, slots=True)
class JobRequest:
    """What the job asks of SLURM. `time` is any length of time that cadtrain reads; it raises `ValueError` where it is none."""

    name: str
    run_dir: Path
    nodes: int
    gpus: int
    """GPUs a node; 0 for CPU ranks."""
    time: str = "24h"


def sbatch_script(job: JobRequest, first: Sequence[str], again: Sequence[str]) -> str:
    """The script: `first` starts the run, `again` goes on with it. Both are command lines without `cadtrain launch`."""
    seconds = int(parse_seconds(job.time))
    hours, rest = divmod(seconds, 3600)
    gpus = [f"#SBATCH --gpus-per-node={job.gpus}", f"#SBATCH --cpus-per-task={job.gpus * CORES_PER_GPU}"]
    header = [
        f"#SBATCH --job-name={job.name}",
        f"#SBATCH --nodes={job.nodes}",
        "#SBATCH --ntasks-per-node=1",
        *(gpus if job.gpus else ["#SBATCH --cpus-per-task=8"]),
        f"#SBATCH --time={hours}:{rest // 60:02d}:{rest % 60:02d}",
        f"#SBATCH --signal=B:USR1@{min(AHEAD_SECONDS, max(60, seconds // 4))}   # asks this script, which asks the run",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        f"#SBATCH --output={job.name}-%j.out",
    ]
    return _SCRIPT.format(
        header="\n".join(header), run=shlex.quote(str(job.run_dir)), first=shlex.join(first), again=shlex.join(again)
    )


_SCRIPT = """#!/bin/bash
{header}
# Add what your cluster wants: --partition, --account, --mem. Activate the environment that holds cadtrain here.
set -u
RUN={run}

if [ -e "$RUN/config.yaml" ]; then
  cadtrain launch {again} &
else
  cadtrain launch {first} &
fi
launch=$!
trap 'kill -USR1 "$launch"' USR1
cancelled=0
trap 'cancelled=1; kill -TERM "$launch"' TERM

# A signal ends `wait` early: wait until the launcher is gone, then ask for its exit code, which bash remembers.
while kill -0 "$launch" 2>/dev/null; do wait "$launch"; done
wait "$launch"
code=$?

# 138: saved after SIGUSR1. 143: saved by itself ahead of the end of its time. There is more to do, unless it was cancelled.
if [ "$cancelled" -eq 0 ] && {{ [ "$code" -eq 138 ] || [ "$code" -eq 143 ]; }}; then
  [ -e "$RUN/checkpoints/latest" ] && scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""
