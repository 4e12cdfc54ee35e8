"""What earlier runs left: ranks that nobody looks after, and checkpoints that were never finished."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

from cadtrain.checkpoint.layout import CHECKPOINTS, UNFINISHED
from cadtrain.doctor.finding import Finding, ok, warn
from cadtrain.launch.folder import LOCK_NAME
from cadtrain.launch.guard import MARK_VARIABLE
from cadtrain.units import format_bytes


def check_processes() -> Iterator[Finding]:
    """Ranks of this user whose launcher is gone."""
    orphans = sorted(_orphans(), key=lambda process: process.pid)
    if not orphans:
        yield ok("leftover processes", "none")
        return
    pids = " ".join(str(process.pid) for process in orphans)
    yield warn(
        "leftover processes",
        f"{len(orphans)} ranks without a launcher hold memory: {pids}",
        f"kill -9 {pids}",
    )


def _orphans() -> Iterator[psutil.Process]:
    """Processes of a launch (they carry its mark) that no launcher of the same launch stands above."""
    for process in psutil.process_iter():
        try:
            if process.uids().real != os.getuid() or not _is_rank(process.cmdline()):
                continue
            if MARK_VARIABLE in process.environ() and not any(_is_launcher(above) for above in process.parents()):
                yield process
        except psutil.Error:
            continue


def _is_rank(command: list[str]) -> bool:
    return "cadtrain" in command and "train" in command and "--run-dir" in command and not _is_launch_command(command)


def _is_launcher(process: psutil.Process) -> bool:
    return _is_launch_command(process.cmdline())


def _is_launch_command(command: list[str]) -> bool:
    return "deepspeed.launcher.launch" in command or "launch" in command


def check_unfinished(runs: Path) -> Iterator[Finding]:
    """Checkpoints under `runs` (a folder of run folders, or one run folder) whose writing was interrupted."""
    found = [
        path
        for pattern in (f"*/{CHECKPOINTS}/*{UNFINISHED}", f"{CHECKPOINTS}/*{UNFINISHED}")
        for path in runs.glob(pattern)
        if not _is_held(path.parent.parent)
    ]
    if not found:
        yield ok("unfinished checkpoints", f"none under {runs}")
        return
    size = sum(file.stat().st_size for path in found for file in path.rglob("*") if file.is_file())
    yield warn(
        "unfinished checkpoints",
        f"{len(found)} under {runs}, {format_bytes(size)}; resuming such a run removes its own",
        f"rm -r {' '.join(str(path) for path in found[:4])}{' …' if len(found) > 4 else ''}",
    )


def _is_held(run_dir: Path) -> bool:
    """Whether a launcher runs in this folder, so that what is unfinished there is being written."""
    try:
        with open(run_dir / LOCK_NAME, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except OSError:
        return True
