"""What `launch` and `doctor` do with hosts: which, how they are reached, and a job that asks SLURM for them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cadtrain.errors import UsageError

if TYPE_CHECKING:
    from cadtrain.launch.hosts import Host, RemoteShell


def choose_hosts(
    hostfile: Path | None, nodes: int | None, gpus: str | None, ssh_command: str | None
) -> tuple[tuple[Host, ...], RemoteShell]:
    """The hosts of a run over several (none for this host alone), and the shell that reaches them.

    Raises `UsageError` for options that do not go together, and what reading the hostfile raises.
    """
    from cadtrain.launch.hosts import PLAIN_SSH, SRUN, RemoteShell, read_hostfile, slurm_hosts

    if hostfile is not None and nodes is not None:
        raise UsageError("--hostfile and --nodes both name hosts.", hint="Give one of them.")
    if hostfile is not None:
        if gpus is not None:
            raise UsageError(
                "--gpus has no meaning with --hostfile.", where="--gpus", hint="Write slots=N in the hostfile."
            )
        return read_hostfile(hostfile), RemoteShell(ssh_command) if ssh_command else PLAIN_SSH
    if nodes is not None:
        return slurm_hosts(nodes, _slots(gpus)), RemoteShell(ssh_command or SRUN)
    if ssh_command is not None:
        raise UsageError("--ssh-command needs hosts.", hint="Add --hostfile FILE or --nodes N.")
    return (), PLAIN_SSH


def _slots(gpus: str | None) -> int:
    """Ranks a node: --gpus, else what SLURM gave, else the GPUs visible here, else one."""
    from cadtrain.launch.devices import find_gpus, parse_gpus

    asked = parse_gpus(gpus)
    if isinstance(asked, tuple):
        raise UsageError(
            f"{gpus} names GPUs of one host.", where="--gpus", hint="Give a number: each node takes its first N."
        )
    given = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return asked or (int(given) if given.isdecimal() and int(given) else 0) or len(find_gpus()) or 1


@dataclass(frozen=True, slots=True)
class JobWishes:
    """What was asked for on the command line, besides the configuration."""

    run_dir: Path | None
    nodes: int | None
    gpus: str | None
    time_limit: str | None
    hostfile: Path | None
    zero: str | None
    offload: bool
    gpu_memory: str | None
    max_restarts: int
    hang_timeout: str | None

    def words(self) -> list[str]:
        """The options that each start of the run gets."""
        found = [f"--zero={self.zero}"] if self.zero else []
        found += ["--offload"] if self.offload else []
        found += [f"--gpu-memory={self.gpu_memory}"] if self.gpu_memory else []
        found += [f"--max-restarts={self.max_restarts}"] if self.max_restarts else []
        return found + ([f"--hang-timeout={self.hang_timeout}"] if self.hang_timeout else [])


def print_sbatch(config: str | None, overrides: tuple[str, ...], wishes: JobWishes) -> None:
    """Write a SLURM script to stdout. Raises `UsageError` where it could not work, and what loading the config raises."""
    from cadtrain.config.load import load_run_config
    from cadtrain.launch.devices import parse_gpus
    from cadtrain.launch.planning import DEFAULT_CONFIG
    from cadtrain.launch.slurm import JobRequest, sbatch_script
    from cadtrain.ui.console import print_text

    gpus, nodes = parse_gpus(wishes.gpus), wishes.nodes or 1
    if not isinstance(gpus, int):
        raise UsageError(
            "a job needs the number of GPUs of a node.", where="--gpus", hint="Add --gpus N, e.g. --gpus 4."
        )
    if wishes.run_dir is None:
        raise UsageError(
            "a job that goes on after its time needs a fixed run folder.",
            hint="Add --run-dir, on a disk that all nodes see.",
        )
    if wishes.hostfile is not None:
        raise UsageError("SLURM chooses the hosts of a job.", where="--hostfile", hint="Give --nodes N in its place.")
    loaded = load_run_config(config or DEFAULT_CONFIG, list(overrides)).config
    places = [f"--run-dir={wishes.run_dir}", *([f"--nodes={nodes}"] if nodes > 1 else []), f"--gpus={gpus}"]
    words, sets = wishes.words(), [f"--set={text}" for text in overrides]
    try:
        job = JobRequest(loaded.name, wishes.run_dir, nodes, gpus, wishes.time_limit or "24h")
        script = sbatch_script(
            job, [*([config] if config else []), *places, *words, *sets], [*places, "--resume", *words]
        )
    except ValueError as error:
        raise UsageError(f"{error}.", where="--time-limit") from error
    print_text(script)
