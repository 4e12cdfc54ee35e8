"""Rates and the time that is left."""

from __future__ import annotations

import io
from collections import Counter

import pytest
from rich.console import Console

from cadtrain.data.writing.progress import PrepareProgress, Tally
from cadtrain.ui.data import preparation_progress


class _Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def _run(tally: Tally, clock: _Clock, number: int, seconds_each: float) -> None:
    for _ in range(number):
        clock.now += seconds_each
        tally.take(1, [], [])


def test_the_rest_is_reckoned_with_the_pace_of_the_last_two_minutes() -> None:
    clock, told = _Clock(), list[PrepareProgress]()
    tally = Tally(100_000, told.append, clock)
    tally.resume(10_000, Counter(written=9_000, schema=1_000))
    tally.tell()
    assert told[-1].seconds_left is None
    assert (told[-1].done, told[-1].written, told[-1].failures) == (10_000, 9_000, {"schema": 1_000})
    _run(tally, clock, 10_000, 0.1)  # 1000 s of quick parts
    assert told[-1].recent_rate == pytest.approx(10, rel=0.02)
    assert told[-1].rate == pytest.approx(10, rel=0.02)  # what was there before is not counted
    _run(tally, clock, 300, 1.0)  # then a folder of slow ones
    tally.tell()
    assert told[-1].recent_rate == pytest.approx(1, rel=0.02)
    assert told[-1].rate > 7
    assert told[-1].seconds_left == pytest.approx(79_700, rel=0.02)


def test_a_standstill_shows() -> None:
    clock, told = _Clock(), list[PrepareProgress]()
    tally = Tally(1000, told.append, clock)
    tally.tell()
    _run(tally, clock, 100, 0.1)
    clock.now += 100
    tally.tell()
    assert told[-1].recent_rate == pytest.approx(100 / 110, rel=0.02)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (
            PrepareProgress(150, 1000, 140, 50, {"schema": 2, "time_limit": 8}, 20.0, recent_rate=5.0),
            "150/1000 5.0/s, 2 min 50 s left, 50 from before, left out: 8 time_limit, 2 schema",
        ),
        (PrepareProgress(151, 1000, 140, 0, {}, 20.0, recent_rate=0.25), "151/1000 15.0/min, 56 min 36 s left"),
        (PrepareProgress(50, 1000, 50, 50, {}, 0.0), "50/1000 starting workers, 50 from before"),
    ],
)
def test_the_bar_says_how_fast_how_long_and_what_failed(
    state: PrepareProgress, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=140, color_system=None)
    monkeypatch.setattr("cadtrain.ui.data.err", lambda: console)
    with preparation_progress("parts") as tell:
        tell(state)
    assert words in " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
