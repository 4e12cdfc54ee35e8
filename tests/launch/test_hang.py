"""When a run counts as hung, which rank lags, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cadtrain.heartbeat import STEPPING, Beat, Heartbeat, heartbeat_path, module_label
from cadtrain.launch.hang import (
    SLOW_PHASE_LIMIT,
    HangLimit,
    HangWatch,
    Place,
    lagging,
    read_place,
    stacks_path,
)

DUMP = '''Thread 0x00007f01 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 327 in wait
  File "/x/cadtrain/data/loader.py", line 60 in _work

Current thread 0x00007f02 (most recent call first):
  File "/v/site-packages/torch/distributed/distributed_c10d.py", line 3016 in all_reduce
  File "/v/site-packages/torch/distributed/c10d_logger.py", line 81 in wrapper
  File "/x/cadtrain/distributed.py", line 62 in all_reduce
  File "/x/cadtrain/train/step.py", line 53 in train_step
  File "/x/cadtrain/__main__.py", line 5 in <module>
'''


def beat(rank: int, marks: int = 9, *, phase: str = STEPPING, longest: float = 2.0) -> Beat:
    return Beat(rank, marks, phase, 4, 1, longest, 0.0, "")


def test_the_limit_follows_the_steps_and_the_phase() -> None:
    assert HangLimit().of([beat(0), beat(1, longest=3.0)]) == 300.0
    assert HangLimit().of([beat(0, longest=90.0), beat(1)]) == 900.0
    assert HangLimit().of([beat(0), beat(1, phase="saving a checkpoint")]) == SLOW_PHASE_LIMIT
    assert HangLimit().of([beat(0), None]) == SLOW_PHASE_LIMIT
    assert HangLimit().of([beat(0, longest=0.0)]) == SLOW_PHASE_LIMIT, "before the end of the warm-up"
    assert HangLimit(7.0).of([beat(0), None]) == 7.0
    assert HangLimit(0.0).of([beat(0)]) == float("inf")


def test_one_rank_that_moves_is_enough(tmp_path: Path) -> None:
    beats = [Heartbeat(heartbeat_path(tmp_path, rank), rank) for rank in range(2)]
    for heartbeat in beats:
        heartbeat.phase("loading")
    watch = HangWatch(tmp_path, HangLimit(20.0))
    start = watch._looked_at
    assert not watch.is_hung([0, 1], now=start + 2)
    beats[0].begin_micro_step(1, 1)
    assert not watch.is_hung([0, 1], now=start + 15)
    beats[0].enter(module_label("layers.1"))
    assert not watch.is_hung([0, 1], now=start + 30)
    assert not watch.is_hung([0, 1], now=start + 45)
    assert watch.is_hung([0, 1], now=start + 51)
    rank, text = watch.describe()
    assert rank == 1
    assert text.splitlines()[0] == "no rank has moved for 21 s."
    assert text.splitlines()[2] == "rank 1: loading  <- lags"


def test_a_launcher_that_was_stopped_does_not_blame_its_ranks(tmp_path: Path) -> None:
    Heartbeat(heartbeat_path(tmp_path, 0)).phase("loading")
    watch = HangWatch(tmp_path, HangLimit(20.0))
    start = watch._looked_at
    assert not watch.is_hung([0], now=start + 2)
    assert not watch.is_hung([0], now=start + 5000)
    assert not watch.is_hung([0], now=start + 5015)
    assert watch.is_hung([0], now=start + 5025)


def test_a_launcher_that_starts_no_rank_hangs_itself(tmp_path: Path) -> None:
    watch = HangWatch(tmp_path, HangLimit(20.0))
    assert not watch.is_hung([], now=watch._looked_at + 15)
    assert watch.is_hung([], now=watch._looked_at + 15)
    assert watch.describe() == (-1, "no rank has started in 30 s: DeepSpeed's launcher hangs.")


def test_who_lags() -> None:
    waits, elsewhere, unknown = Place("all_reduce", "c", "t", True), Place("", "c", "t", True), Place()
    assert lagging({0: beat(0), 1: beat(1)}, {0: waits, 1: elsewhere}) == {1}
    assert lagging({0: beat(0), 1: beat(1)}, {0: waits, 1: unknown}) == {1}, "a stopped process writes no stacks"
    assert lagging({0: beat(0, 8), 1: beat(1, 9)}, {0: waits, 1: waits}) == {0}
    assert lagging({0: beat(0), 1: beat(1)}, {0: waits, 1: waits}) == set()
    assert lagging({0: beat(0), 1: None}, {0: unknown, 1: unknown}) == {1}


def test_the_place_is_the_main_threads(tmp_path: Path) -> None:
    path = stacks_path(tmp_path, 0)
    path.write_text("Fatal things before\n" + DUMP)
    place = read_place(path)
    assert place.collective == "all_reduce"
    assert place.describe() == "; waits in all_reduce, from cadtrain/distributed.py:62 all_reduce"


@pytest.mark.parametrize("text", ["", "noise", "Current thread 0x1 (most recent call first):\n", "Current thread 0x1"])
def test_a_dump_without_frames_says_nothing(tmp_path: Path, text: str) -> None:
    path = stacks_path(tmp_path, 0)
    path.write_text(text)
    assert read_place(path).describe() == ""
    assert read_place(tmp_path / "nothing") == Place()
