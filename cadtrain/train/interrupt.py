"""Signals that ask the run to stop: noted when they come, acted upon at the next step's end on all ranks.

Alone in a shell, a second signal ends the process at once. Under `cadtrain launch` repeats are ignored: a scheduler may
signal the launcher and every rank, so the same wish arrives twice, and it is the launcher who kills.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

_ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Remembers the first stop signal; a second one of any kind ends the process at once, unless a launcher looks after it."""

    def __init__(self) -> None:
        self.signal_number = 0
        self._is_launched = "CADTRAIN_LAUNCH_ID" in os.environ
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in _ASKING:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_number and self._is_launched:
            return
        if self.signal_number:
            # The user means it. A save under way stays a `.tmp` folder, so nothing whole is torn.
            os._exit(128 + number)
        self.signal_number = number


def die_with_parent() -> None:
    """Ask the kernel to end this process when its launcher dies, so that no rank is orphaned (Linux only)."""
    import ctypes
    import sys

    if sys.platform != "linux":
        return
    parent = os.getppid()
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)
