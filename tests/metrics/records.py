"""Records for tests of what takes them."""

from __future__ import annotations

from typing import Any

from cadtrain.metrics.record import RunFacts, StepRecord


def step_record(step: int = 1, **changes: Any) -> StepRecord:
    """A plausible step."""
    values: dict[str, Any] = {
        "step": step, "stage": "text", "epoch": 0, "loss": 2.5, "lr": 1e-3, "rates": {"language": 1e-3, "image_projector": 0.0},
        "grad_norm": 0.7, "samples": 8, "tokens": 400, "target_tokens": 120, "tokens_per_second": 800.0, "seconds": 0.5,
        "elapsed_seconds": 0.5 * step, "data_wait_seconds": 0.01, "micro_steps": 2, "memory_gib": None, "memory_reserved_gib": None,
        "skipped_steps": 0,
    }  # fmt: skip
    return StepRecord(**{**values, **changes})


def run_facts(first_step: int = 0, total_steps: int = 10) -> RunFacts:
    """A run of two stages."""
    return RunFacts("demo", "runs/demo", total_steps, first_step, (("text", 4), ("all", total_steps)), (("model", "2 [M] parameters"),))
