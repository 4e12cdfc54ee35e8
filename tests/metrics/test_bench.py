"""From measured steps to a report."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cadtrain.metrics.bench import BenchReport, Communication, MeasuredStep

STEPS = (
    MeasuredStep(1.0, 4, 1000, 300, ((300, 200), (250, 250)), 2e15, (0.1, 0.3)),
    MeasuredStep(3.0, 4, 1200, 400, ((400, 300), (300, 200)), 3e15, (0.0, 0.5)),
    MeasuredStep(1.0, 2, 600, 100, ((300, 300),), 1e15, (0.1, 0.0)),
)
REPORT = BenchReport(
    facts={"run": "x"}, num_ranks=2, steps=STEPS, warmup_seconds=(5.0,), micro_batch_tokens=400, peak_flops=1e15, no_flops="",
    memory_allocated_gib=None, memory_reserved_gib=None, losses=(2.0, 1.0), communication=Communication(2, 1.5, 0.3, 0.1, {"all-gather": 0.3}),
    no_communication="",
)  # fmt: skip


def test_rates_are_over_all_time_or_the_median_of_steps() -> None:
    mean, median = REPORT.mean_rates(), REPORT.median_rates()
    assert mean.tokens == 2800 / 5
    assert median.tokens == 600
    assert median.target_tokens == pytest.approx(400 / 3)
    assert mean.samples == 2
    assert REPORT.mfu(mean) == pytest.approx(6e15 / 5 / 2e15)
    assert REPORT.mfu(median) == pytest.approx(1e15 / 2e15)


def test_fill_imbalance_and_waits() -> None:
    assert REPORT.pack_fill == 2800 / (10 * 400)
    assert STEPS[0].imbalance == (300 + 250) / (250 + 250)
    assert STEPS[2].imbalance == 1.0
    assert REPORT.data_wait_shares() == (pytest.approx((0.2 + 0.8) / 2 / 5), pytest.approx(0.8 / 5))


def test_the_report_is_json_and_says_why_something_is_null() -> None:
    found = json.loads(json.dumps(REPORT.to_json(), allow_nan=False))
    assert found["mean"]["tokens_per_second_per_gpu"] == 280
    assert found["step_seconds"] == {"median": 1.0, "min": 1.0, "max": 3.0, "total": 5.0}
    assert found["model_flops_per_step"] == 2e15
    assert found["model_flops_per_token"] == pytest.approx(6e15 / 2800)
    assert found["each_step"][1]["rank_tokens"] == [[400, 300], [300, 200]]
    assert found["no_mfu"] == ""
    blind = replace(REPORT, peak_flops=None).to_json()
    assert blind["mean"]["mfu"] is None
    assert "no peak" in blind["no_mfu"]
    uncounted = replace(REPORT, no_flops="experts").to_json()
    assert (uncounted["mean"]["mfu"], uncounted["model_flops_per_step"], uncounted["no_mfu"]) == (None, None, "experts")
