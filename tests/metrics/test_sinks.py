"""The files that metrics go to."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from cadtrain.metrics.record import ValidationRecord
from cadtrain.metrics.sinks.jsonl import JsonlSink, drop_lines_after, read_metrics
from cadtrain.metrics.sinks.tensorboard import TensorBoardSink
from tests.metrics.records import run_facts, step_record


def steps_in(path: Path) -> list[object]:
    return [("v" if row.get("validation") else "") + str(row["step"]) for row in read_metrics(path)]


def write_run(path: Path, first: int, last: int) -> None:
    """Steps `first` + 1 to `last` of a run, with a validation after step 4."""
    sink = JsonlSink(path)
    sink.start(run_facts(first_step=first))
    for step in range(first + 1, last + 1):
        sink.step(step_record(step))
        if step == 4:
            sink.validation(ValidationRecord(4, "text", {"text": 1.0}, {"text": 8}, 0.1))
    sink.close()


def test_one_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_run(path, 0, 5)
    lines = path.read_text().splitlines()
    assert steps_in(path) == ["1", "2", "3", "4", "v4", "5"]
    assert json.loads(lines[2]) == step_record(3).to_json()


def test_a_line_is_on_disk_before_the_next_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.start(run_facts())
    sink.step(step_record(1))
    assert steps_in(path) == ["1"], "a run that is killed keeps what it has told"
    sink.close()


def test_a_loss_that_is_nan_leaves_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.start(run_facts())
    sink.step(step_record(1, loss=math.nan, grad_norm=math.inf))
    sink.validation(ValidationRecord(1, "text", {"text": math.nan}, {"text": 8}, 0.1))
    sink.close()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    rows = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert rows[0]["loss"] is None
    assert rows[1]["losses"] == {"text": None}


def test_a_resumed_run_repeats_no_step(tmp_path: Path) -> None:
    """Killed after step 7, resumed from the checkpoint of step 4: steps 5 to 7, and the validation at 4, are done again."""
    path = tmp_path / "metrics.jsonl"
    write_run(path, 0, 7)
    write_run(path, 4, 6)
    assert steps_in(path) == ["1", "2", "3", "4", "5", "6"]


def test_a_run_from_the_beginning_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_run(path, 0, 3)
    write_run(path, 0, 1)
    assert steps_in(path) == ["1"]


def test_a_last_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_run(path, 0, 4)
    whole = path.read_text()
    path.write_text(whole + whole.splitlines()[3][:40])
    assert steps_in(path) == ["1", "2", "3", "4", "v4"]
    write_run(path, 4, 5)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_dropping_lines_of_no_file_makes_none(tmp_path: Path) -> None:
    drop_lines_after(tmp_path / "none.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


def test_closing_before_the_start_is_quiet(tmp_path: Path) -> None:
    JsonlSink(tmp_path / "metrics.jsonl").close()
    TensorBoardSink(tmp_path / "tensorboard").close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_shows_every_scalar_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "tensorboard"
    for first, last in ((0, 5), (3, 6)):
        sink = TensorBoardSink(folder)
        sink.start(run_facts(first_step=first))
        for step in range(first + 1, last + 1):
            sink.step(step_record(step, loss=10.0 * first + step, grad_norm=None if step == 2 else 0.5))
        sink.validation(ValidationRecord(last, "text", {"text+point": 1.5}, {"text+point": 8}, 0.1))
        sink.close()
    assert list(folder.glob("events.out.tfevents.*"))
    events = EventAccumulator(str(folder))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(1, 1), (2, 2), (3, 3), (4, 34), (5, 35), (6, 36)], "steps that were done again show the second time"
    assert [event.step for event in events.Scalars("train/grad_norm")].count(2) == 0
    assert events.Scalars("rate/language")[0].value == pytest.approx(1e-3)
    assert events.Scalars("validation/text+point")[-1].value == 1.5
