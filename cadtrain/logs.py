"""A log file for every rank; rank 0's warnings also reach the console."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)-7s rank{rank} %(name)s: %(message)s"


def log_path(run_dir: Path, rank: int) -> Path:
    """`run/logs/rank_00.log`."""
    return run_dir / "logs" / f"rank_{rank:02d}.log"


def start_logging(run_dir: Path, rank: int) -> Path:
    """Send this process's log records to its rank's file; returns that file's path. Every rank calls it."""
    path = log_path(run_dir, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(FORMAT.format(rank=rank)))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    # Other libraries' compilers and probes talk at INFO; a rank's log is for the run.
    root.setLevel(logging.WARNING)
    for name in ("cadtrain", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.INFO)
    if rank == 0:
        console = logging.StreamHandler(sys.stderr)
        console.setLevel(logging.WARNING)
        console.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        # DeepSpeed and torch warn about choices that cadtrain made on purpose; they stay in the file.
        console.addFilter(lambda record: record.name.startswith("cadtrain"))
        root.addHandler(console)
    logging.captureWarnings(True)
    return path
