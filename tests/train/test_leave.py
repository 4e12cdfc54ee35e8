"""When a run leaves by itself: the stop file and the end of its time."""

from __future__ import annotations

from pathlib import Path

import pytest

from cadtrain.train.leave import LEAST_MARGIN_SECONDS, LeaveWatch, watch_for


class Clock:
    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_without_a_limit_or_a_file_there_is_no_reason(tmp_path: Path) -> None:
    assert LeaveWatch(tmp_path, environ={"SLURM_JOB_END_TIME": "soon"}).reason() == ""
    assert LeaveWatch().reason() == ""


def test_a_stop_file_is_a_reason_until_it_is_cleared(tmp_path: Path) -> None:
    watch = LeaveWatch(tmp_path)
    (tmp_path / "STOP").touch()
    assert watch.reason() == "the file STOP in the run folder"
    watch.clear()
    assert watch.reason() == ""
    assert not (tmp_path / "STOP").exists()


@pytest.mark.parametrize(
    ("limit", "environ", "name"),
    [(3600.0, {}, "the time limit"), (None, {"SLURM_JOB_END_TIME": "1003600"}, "the end of the SLURM job"),
     (3600.0, {"SLURM_JOB_END_TIME": "1009999"}, "the time limit"), (9000.0, {"SLURM_JOB_END_TIME": "1003600"}, "the end of the SLURM job")],
)  # fmt: skip
def test_it_leaves_in_time_for_a_step_and_a_save(limit: float | None, environ: dict[str, str], name: str) -> None:
    """At 3600 s, with steps of 10 s and a save of 40 s: not before 3450 s, not after 3460 s."""
    clock = Clock()
    watch = LeaveWatch(time_limit_seconds=limit, environ=environ, clock=clock)
    watch.note_save(40.0)
    left = None
    while left is None and clock.now < 1_004_000:
        clock.now += 10
        if reason := watch.reason():
            left = clock.now - 1_000_000
            assert reason.startswith(f"{name}, in ")
    assert left == 3600 - LEAST_MARGIN_SECONDS - 2 * 40 - 10


def test_before_the_first_save_its_time_follows_from_its_size() -> None:
    clock = Clock()
    watch = LeaveWatch(time_limit_seconds=3600, saved_bytes=100 * 10**9, clock=clock)
    clock.now += 3600 - LEAST_MARGIN_SECONDS - 2 * 500 - 1
    assert not watch.reason()
    clock.now += 2
    assert watch.reason()
    watch.note_save(5.0)
    assert not watch.reason(), "a measured save takes the place of the assumed one"


def test_only_the_main_rank_looks_and_a_file_of_an_earlier_run_is_removed(tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()
    other = watch_for(tmp_path, time_limit_seconds=1.0, saved_bytes=0, is_main=False)
    assert other.reason() == ""
    assert (tmp_path / "STOP").exists()
    main = watch_for(tmp_path, time_limit_seconds=None, saved_bytes=0, is_main=True)
    assert main.reason() == ""
    assert not (tmp_path / "STOP").exists()
