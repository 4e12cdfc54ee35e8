"""What a launched rank leaves behind where Python cannot: stacks of all threads, and what native libraries write.

`logs/rank_NN.stacks.txt` gets the stacks when the launcher asks for them (SIGUSR2, to a rank that hangs) and when native code
crashes. `logs/rank_NN.native.txt` gets what libraries write past Python (NCCL, torch's C++, compilers).
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from pathlib import Path

from cadtrain.logs import log_path

STACKS = ".stacks.txt"
NATIVE = ".native.txt"


def keep_traces(run_dir: Path, rank: int) -> None:
    """Open both files and take SIGUSR2. Call once in a launched rank, before anything heavy is imported."""
    path = log_path(run_dir, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    stacks = open(path.with_suffix(STACKS), "w", encoding="utf-8")  # noqa: SIM115, open as long as the process lives
    faulthandler.enable(stacks, all_threads=True)
    faulthandler.register(signal.SIGUSR2, stacks, all_threads=True)
    _send_native_to(path.with_suffix(NATIVE))


def _send_native_to(path: Path) -> None:
    """Give file descriptor 2 to `path`; Python's own stderr stays where it was."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with open(path, "wb") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = os.fdopen(terminal, "w", buffering=1, encoding="utf-8", errors="backslashreplace")
