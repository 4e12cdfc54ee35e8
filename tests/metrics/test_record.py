"""Metric lines, and handing them to several sinks."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from cadtrain.metrics.record import CompositeSink, NullSink, ValidationRecord
from tests.metrics.records import run_facts, step_record


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_become_null(bad: float) -> None:
    row = step_record(loss=bad, grad_norm=bad).to_json()
    assert row["loss"] is None
    assert row["grad_norm"] is None
    assert json.loads(json.dumps(row, allow_nan=False))["rates"] == {"language": 1e-3, "image_projector": 0.0}


def test_finite_numbers_stay_as_they_are() -> None:
    row = step_record(7, memory_gib=3.5).to_json()
    assert (row["step"], row["loss"], row["grad_norm"], row["memory_gib"]) == (7, 2.5, 0.7, 3.5)
    assert step_record(grad_norm=None).to_json()["grad_norm"] is None


def test_a_validation_marks_its_line_and_writes_null_for_nan() -> None:
    row = ValidationRecord(4, "text", {"text": 1.25, "text+point": math.nan}, {"text": 8, "text+point": 8}, 0.3).to_json()
    assert row["validation"] is True
    assert row["losses"] == {"text": 1.25, "text+point": None}
    json.dumps(row, allow_nan=False)


def test_a_composite_hands_everything_to_all() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.calls: list[tuple[str, tuple[Any, ...]]] = []

        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: self.calls.append((name, arguments))

    recorders = [Recorder(), Recorder()]
    sink = CompositeSink([recorders[0], NullSink(), recorders[1]])  # type: ignore[list-item]
    record, facts, validation = step_record(), run_facts(), ValidationRecord(1, "text", {}, {}, 0.0)
    sink.start(facts)
    sink.step(record)
    sink.validation(validation)
    sink.note("a stage begins")
    sink.close()
    expected = [("start", (facts,)), ("step", (record,)), ("validation", (validation,)), ("note", ("a stage begins",)), ("close", ())]
    assert recorders[0].calls == recorders[1].calls == expected
