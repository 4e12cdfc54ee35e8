"""What `cadtrain plan --calibrate` does: measure the worst pack with the run's own ranks, and keep what it teaches."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cadtrain.cli.worst_step import WorstStep
    from cadtrain.plan.calibration import CalibrationResult


def calibrate_plan(
    config: str | None, gpus: int | None, zero: str | None, overrides: Sequence[str] | None, *, offload: bool
) -> CalibrationResult:
    """Measure and, on GPUs, keep the correction in the cache folder.

    Raises `EnvironmentFault` where others use the GPUs or a figure is too far from its prediction, `TrainingError` where the
    ranks fail, and as `plan_launch` does.
    """
    from cadtrain.cli.worst_step import check_idle, plan_worst_step, take_worst_step
    from cadtrain.launch.planning import LaunchRequest
    from cadtrain.ui.console import err

    with tempfile.TemporaryDirectory(prefix="cadtrain-calibrate-") as name:
        request = LaunchRequest(
            config=config,
            gpus=gpus,
            zero=zero,
            offload=offload,
            overrides=tuple(overrides or ()),
            run_dir=Path(name) / "run",
        )
        step = plan_worst_step(request)
        check_idle(step.launch)
        taken = take_worst_step(step, announce=lambda text: err().print(text, markup=False))
    return result_of(taken)


def result_of(step: WorstStep) -> CalibrationResult:
    """The correction that `step` teaches; kept where it was taken on GPUs."""
    from cadtrain.data.synth.make import cache_folder
    from cadtrain.plan.calibration import CalibrationResult, Corrections, Measured, calibrate, key_of, store

    worst, tokens = step.worst, step.pack.shape.tokens
    measured = Measured(worst.held, worst.allocated, worst.reserved, step.context)
    key = key_of(step.device, step.pack.census, element_bytes=step.pack.element_bytes, num_ranks=step.num_ranks)
    found = calibrate(key, step.choice, step.predicted, measured, num_ranks=step.num_ranks, tokens=tokens)
    corrected = Corrections({found.sharing: found}).memory(step.choice, step.predicted)
    return CalibrationResult(
        calibration=found, choice=step.choice, stage=step.pack.stage, predicted=step.predicted, measured=measured,
        corrected=corrected, path=store(found, cache_folder()) if worst.has_allocator else None, seconds=step.seconds,
    )  # fmt: skip
