"""Where a preparation stands, and how long the rest will take."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_TELL_EVERY_SECONDS = 0.1
_WINDOW_SECONDS = 120.0
"""The rate that the rest is reckoned with is that of the last two minutes: parts of one folder are alike, folders are not."""
_LOOK_EVERY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class PrepareProgress:
    """Where a preparation stands; counts are of inputs, `written` of rows, `resumed` of inputs from an earlier run.

    `failures` counts dropped parts by kind; `seconds` is since this run began; `recent_rate` is in inputs a second over the last two
    minutes, 0 before the first is done.
    """

    done: int
    total: int
    written: int
    resumed: int
    failures: dict[str, int]
    seconds: float
    recent_rate: float = 0.0

    @property
    def rate(self) -> float:
        """Inputs a second in this run."""
        return (self.done - self.resumed) / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Estimated time to the end, or None before the first input is done."""
        return (self.total - self.done) / self.recent_rate if self.recent_rate > 0 else None


Progress = Callable[[PrepareProgress], None]


def no_progress(_: PrepareProgress) -> None:
    """Takes progress and says nothing."""


class Tally:
    """Counts, and tells them at most ten times a second."""

    def __init__(self, total: int, progress: Progress, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = total
        self.resumed = self.written = 0
        self.failures: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self._progress, self._clock = progress, clock
        self._start = clock()
        self._told = 0.0
        self._done = 0
        self._looks: deque[tuple[float, int]] = deque()

    def resume(self, inputs: int, counts: Counter[str]) -> None:
        """Take over what earlier runs did: inputs, dropped parts by kind, and rows as `written`."""
        self._done = self.resumed = inputs
        self.failures = Counter({kind: number for kind, number in counts.items() if kind != "written"})
        self.written = counts["written"]
        # The workers start now; the time before says nothing about their pace.
        self._looks.clear()

    def take(self, rows: int, failures: Sequence[str], notes: Sequence[str]) -> None:
        """One more input is done."""
        self._done += 1
        self.written += rows
        self.failures.update(failures)
        self.notes.update(notes)
        if self._done == self.total or self._clock() - self._told >= _TELL_EVERY_SECONDS:
            self.tell()

    def tell(self) -> None:
        """Say where things stand."""
        now = self._told = self._clock()
        self._progress(
            PrepareProgress(
                self._done,
                self.total,
                self.written,
                self.resumed,
                dict(self.failures),
                now - self._start,
                self._rate(now),
            )
        )

    def _rate(self, now: float) -> float:
        looks = self._looks
        if not looks or now - looks[-1][0] >= _LOOK_EVERY_SECONDS:
            looks.append((now, self._done))
        while len(looks) > 2 and now - looks[1][0] >= _WINDOW_SECONDS:
            looks.popleft()
        then, done = looks[0]
        return (self._done - done) / (now - then) if now > then else 0.0
