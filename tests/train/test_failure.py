"""What a failing rank leaves for the launcher."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from cadtrain.errors import (
    CadtrainError,
    CheckpointError,
    ConfigError,
    EnvironmentFault,
    Fault,
    Interrupted,
    TrainingError,
)
from cadtrain.train.failure import write_failure


def failure_of(run_dir: Path, error: BaseException, rank: int = 3) -> dict[str, object]:
    try:
        raise error
    except BaseException as raised:
        write_failure(run_dir, rank, raised)
    return dict(json.loads((run_dir / "logs" / f"rank_{rank:02d}.error.json").read_text()))


def test_the_record_says_who_what_when_and_where(tmp_path: Path) -> None:
    before = time.time()
    record = failure_of(tmp_path, TrainingError("no finite gradient", where="runs/x", hint="Lower the rate."))
    assert (record["rank"], record["type"], record["exit_code"]) == (3, "TrainingError", 4)
    assert record["message"] == "runs/x: no finite gradient. Lower the rate."
    assert before <= float(str(record["time"])) <= time.time()
    assert "in failure_of" in str(record["traceback"])
    assert "test_failure.py" in str(record["traceback"])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CheckpointError("x"), 4), (ConfigError([Fault("a", "b")]), 2), (EnvironmentFault("x"), 3), (Interrupted("x", signal_number=15), 143),
        (CadtrainError("x"), 4), (RuntimeError("CUDA out of memory"), 4), (KeyboardInterrupt(), 4),
    ],
)  # fmt: skip
def test_the_exit_code_is_that_of_the_error(tmp_path: Path, error: BaseException, code: int) -> None:
    assert failure_of(tmp_path, error)["exit_code"] == code


def test_an_error_without_words_is_named(tmp_path: Path) -> None:
    assert failure_of(tmp_path, AssertionError())["message"] == "AssertionError"


def test_the_cause_is_in_the_traceback(tmp_path: Path) -> None:
    error = RuntimeError("outer")
    error.__cause__ = ValueError("the reason")
    assert "ValueError: the reason" in str(failure_of(tmp_path, error)["traceback"])


def test_ranks_write_apart_and_nothing_else_is_left(tmp_path: Path) -> None:
    for rank in (0, 11):
        failure_of(tmp_path, RuntimeError(f"of {rank}"), rank)
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["rank_00.error.json", "rank_11.error.json"]
