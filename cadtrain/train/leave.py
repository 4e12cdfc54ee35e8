"""Reasons to save and leave besides a signal: a file named `STOP` in the run folder, and an end of the allotted time.

Rank 0 looks after every step and tells the others with the step's own message, so all leave after the same step.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

STOP_FILE = "STOP"
LEAST_MARGIN_SECONDS = 60.0
ASSUMED_BYTES_PER_SECOND = 200e6
"""A disk's rate for the first save's time, before one was measured: that of a busy network disk."""


class LeaveWatch:
    """Knows when rank 0 should ask for the end: `reason()` is empty until then."""

    def __init__(
        self,
        run_dir: Path | None = None,
        *,
        time_limit_seconds: float | None = None,
        environ: Mapping[str, str] = {},
        saved_bytes: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`time_limit_seconds` counts from here; SLURM_JOB_END_TIME in `environ` (seconds since 1970) ends the time as well."""
        self._stop_file = run_dir / STOP_FILE if run_dir is not None else None
        self._clock = clock
        self._ends: dict[float, str] = {}
        if (slurm := environ.get("SLURM_JOB_END_TIME", "")).isdecimal():
            self._ends[float(slurm)] = "the end of the SLURM job"
        if time_limit_seconds is not None:
            self._ends[clock() + time_limit_seconds] = "the time limit"
        self._save_seconds = saved_bytes / ASSUMED_BYTES_PER_SECOND
        self._is_measured = False
        self._step_seconds = 0.0
        self._last_step = 0.0

    def note_save(self, seconds: float) -> None:
        """Take in how long a save took: the longest one counts."""
        self._save_seconds = max(seconds, self._save_seconds if self._is_measured else 0.0)
        self._is_measured = True

    def reason(self) -> str:
        """Why the run should be saved and left now, or nothing. Call once a step."""
        now = self._clock()
        if self._last_step:
            self._step_seconds = max(now - self._last_step, 0.9 * self._step_seconds)
        self._last_step = now
        if self._stop_file is not None and self._stop_file.exists():
            return f"the file {self._stop_file.name} in the run folder"
        end = min(self._ends, default=None)
        # Another step, then a save that may take twice as long as any before, must still find room.
        if end is not None and now + self._step_seconds + 2 * self._save_seconds + LEAST_MARGIN_SECONDS >= end:
            return f"{self._ends[end]}, in {max(0.0, end - now):.0f} s"
        return ""

    def clear(self) -> None:
        """Remove the stop file once it was heeded, so that the resumed run does not stop at once."""
        if self._stop_file is not None:
            self._stop_file.unlink(missing_ok=True)


def watch_for(run_dir: Path, *, time_limit_seconds: float | None, saved_bytes: int, is_main: bool) -> LeaveWatch:
    """Rank 0's watch over `run_dir` and the time; the other ranks', which never has a reason.

    Under `cadtrain launch` the limit counts from the launch (CADTRAIN_LAUNCH_TIME), else from here.
    """
    if not is_main:
        return LeaveWatch()
    began = os.environ.get("CADTRAIN_LAUNCH_TIME")
    if time_limit_seconds is not None and began is not None:
        # The limit holds for the launch, its start-up and its restarts included.
        time_limit_seconds -= time.time() - float(began)
    watch = LeaveWatch(run_dir, time_limit_seconds=time_limit_seconds, environ=os.environ, saved_bytes=saved_bytes)
    watch.clear()
    return watch
