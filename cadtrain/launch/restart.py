"""Start a failed run again from its last checkpoint: when that is worth it, how long to wait, and the record of it."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cadtrain.checkpoint.layout import CHECKPOINTS, list_steps
from cadtrain.launch.folder import LOGS_NAME, START_FILES
from cadtrain.launch.reasons import ALWAYS_WORTH_A_RESTART, WORTH_A_RESTART_AFTER_PROGRESS, Explanation
from cadtrain.launch.supervise import SIGNALS

RESTARTS_NAME = "restarts.jsonl"
STOP_FILE = "STOP"
"""As in `cadtrain.train.leave`: who asks the run to leave does not want it started again."""


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """How often and how soon a failed run is started again."""

    max_restarts: int = 0
    first_wait_seconds: float = 10.0
    longest_wait_seconds: float = 300.0

    def wait_seconds(self, failures_without_progress: int) -> float:
        """Twice as long after each start that came no further."""
        doubled: float = self.first_wait_seconds * 2 ** max(0, failures_without_progress - 1)
        return min(doubled, self.longest_wait_seconds)


def newest_step(run_dir: Path) -> int:
    """Step of the newest finished checkpoint, 0 for none."""
    return max(list_steps(run_dir / CHECKPOINTS), default=0)


def reason_against(explanation: Explanation, *, has_progressed: bool) -> str:
    """Why another start would not help; empty where it may."""
    if explanation.kind in ALWAYS_WORTH_A_RESTART:
        return ""
    if explanation.kind in WORTH_A_RESTART_AFTER_PROGRESS:
        return "" if has_progressed else f"no checkpoint was written since the last start ({explanation.kind})"
    return f"the next start would end the same way ({explanation.kind})"


def argv_to_resume(argv: Sequence[str], port: int) -> tuple[str, ...]:
    """The launcher's command for going on with the same run, over a free port."""
    again = [re.sub(r"^--master_port=\d+$", f"--master_port={port}", argument) for argument in argv]
    return tuple(again if again[-1] == "--resume" else [*again, "--resume"])


def keep_logs(run_dir: Path) -> Path:
    """Move what a failed start left for reading out of the next one's way, into `logs/start_01` or the next that is free."""
    logs, number = run_dir / LOGS_NAME, 1
    while (kept := logs / f"start_{number:02d}").exists():
        number += 1
    kept.mkdir(parents=True)
    for pattern in START_FILES:
        for path in logs.glob(pattern):
            path.replace(kept / path.name)
    return kept


def record_restart(run_dir: Path, **facts: Any) -> None:
    """Append a line to `restarts.jsonl`."""
    row = {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), **facts}
    with open(run_dir / RESTARTS_NAME, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def wait_for_restart(run_dir: Path, seconds: float, *, poll: float = 0.2) -> int | None:
    """Wait; the number of a signal that ended the wait (SIGTERM for a stop file), or None when the time is over.

    Must be called from the main thread.
    """
    end = time.monotonic() + seconds
    with _noted_signals() as received:
        while True:
            if received:
                return received[0]
            if (run_dir / STOP_FILE).exists():
                (run_dir / STOP_FILE).unlink(missing_ok=True)
                return signal.SIGTERM
            left = end - time.monotonic()
            if left <= 0:
                return None
            time.sleep(min(poll, left))


@contextlib.contextmanager
def _noted_signals() -> Iterator[list[int]]:
    received: list[int] = []
    note: Callable[[int, object], None] = lambda number, frame: received.append(number)  # noqa: E731
    previous = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def launch_time() -> dict[str, str]:
    """The variable that tells ranks when the launch began: a time limit holds for all of its starts together."""
    return {"CADTRAIN_LAUNCH_TIME": os.environ.get("CADTRAIN_LAUNCH_TIME", repr(time.time()))}
