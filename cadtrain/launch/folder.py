"""A run folder before its ranks start: made, refused or resumed, and held by one launcher at a time."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cadtrain.checkpoint.layout import write_atomically
from cadtrain.errors import EnvironmentFault, UsageError

CONFIG_NAME = "config.yaml"
ENVIRONMENT_NAME = "environment.json"
LOGS_NAME = "logs"
START_FILES = ("rank_*.error.json", "rank_*.stacks.txt", "rank_*.native.txt", "rank_*.heartbeat", "nccl_trace_*")
"""What is of one start of the ranks, in `logs/`; `rank_NN.log` is appended to by each."""
LOCK_NAME = ".launch.lock"


def default_run_dir(name: str, now: datetime.datetime | None = None) -> Path:
    """`runs/<name>-<YYYYmmdd-HHMMSS>` under the working directory."""
    return Path("runs") / f"{name}-{(now or datetime.datetime.now()):%Y%m%d-%H%M%S}"


def check_run_dir(run_dir: Path, *, resume: bool) -> None:
    """Raise `UsageError` where `run_dir` holds a run that is not to be resumed, or none that could be."""
    holds_run = (run_dir / CONFIG_NAME).is_file()
    if run_dir.exists() and not run_dir.is_dir():
        raise UsageError("is a file, not a run folder.", where=str(run_dir), hint="Give another --run-dir.")
    if holds_run and not resume:
        raise UsageError(
            f"already holds a run ({CONFIG_NAME}).",
            where=str(run_dir),
            hint="Add --resume to go on with it, or give another --run-dir.",
        )
    if resume and not holds_run:
        raise UsageError(
            f"there is no run to resume: {CONFIG_NAME} is missing.",
            where=str(run_dir),
            hint="Check --run-dir, or leave --resume away to start a new run.",
        )


def prepare_run_dir(run_dir: Path, config_yaml: str, environment: Mapping[str, Any]) -> None:
    """Make the folder and write `config.yaml` and `environment.json`.

    A configuration that a resumed run replaces is kept beside it as `config.<n>.yaml`; what the ranks of an earlier
    start left for the launcher is removed, so that what is read after this one is of this one. Raises `EnvironmentFault`
    where the folder cannot be written.
    """
    try:
        (run_dir / LOGS_NAME).mkdir(parents=True, exist_ok=True)
        for pattern in START_FILES:
            for stale in (run_dir / LOGS_NAME).glob(pattern):
                stale.unlink()
        _keep_replaced(run_dir / CONFIG_NAME, config_yaml)
        write_atomically(run_dir / CONFIG_NAME, config_yaml)
        write_atomically(run_dir / ENVIRONMENT_NAME, json.dumps(environment, indent=2) + "\n")
    except OSError as error:
        raise EnvironmentFault(
            f"cannot be written: {error.strerror or error}.",
            where=str(run_dir),
            hint="Give a --run-dir on a disk with room that you may write to.",
        ) from error


def _keep_replaced(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8") == text:
        return
    number = 1
    while (kept := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    os.replace(path, kept)


@contextlib.contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Hold the run folder while its ranks run; raises `UsageError` where another launcher holds it.

    The lock goes with the process, so a killed launcher leaves none behind. On a file system without locks
    nothing is held.
    """
    with open(run_dir / LOCK_NAME, "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UsageError(
                    "another `cadtrain launch` is running in this folder.",
                    where=str(run_dir),
                    hint="Stop it first, or give another --run-dir.",
                ) from error
        yield
