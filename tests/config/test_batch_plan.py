"""From samples and durations to optimizer steps."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cadtrain.config.batch_plan import BatchPlan, plan_batches, refuse_hopeless, stage_plans
from cadtrain.config.sections import RunConfig
from cadtrain.errors import ConfigError


def config(*durations: str, batch: int = 16, warmups: tuple[str, ...] = ()) -> RunConfig:
    stages: list[dict[str, Any]] = [
        {"name": f"s{i}", "duration": duration, "modalities": {"text": 1}, "warmup": warmups[i] if warmups else 0}
        for i, duration in enumerate(durations)
    ]
    return RunConfig.model_validate(
        {
            "model": {"language": {"config": {"model_type": "qwen3"}}},
            "curriculum": stages,
            "batch": {"global_batch_size": batch},
        }
    )


def test_stages_follow_one_another() -> None:
    plan = plan_batches(
        config("10 steps", "1 epoch", "1.5 epochs", warmups=("2", "0.5 epochs", "3")), world_size=2, num_samples=100
    )
    assert plan.steps_per_epoch == 7  # 6 full batches and a short one, which is trained as well
    assert [(s.first_step, s.last_step, s.warmup_steps) for s in plan.stages] == [(0, 10, 2), (10, 17, 4), (17, 27, 3)]
    assert plan.total_steps == 27


@pytest.mark.parametrize(("samples", "steps"), [(1, 1), (15, 1), (16, 1), (17, 2), (32, 2)])
def test_the_short_last_batch_counts(samples: int, steps: int) -> None:
    assert plan_batches(config("1 step"), world_size=1, num_samples=samples).steps_per_epoch == steps


def test_every_step_has_its_stage() -> None:
    plan = plan_batches(config("2 steps", "3 steps"), world_size=1, num_samples=10)
    assert [plan.stage_at(step).name for step in range(6)] == ["s0", "s0", "s1", "s1", "s1", "s1"]
    with pytest.raises(ValueError, match="negative"):
        plan.stage_index(-1)


def test_a_plan_survives_json() -> None:
    plan = plan_batches(config("2 steps", "1 epoch"), world_size=3, num_samples=77)
    assert BatchPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_all_faults_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        plan_batches(config("0.01 epochs", "2 steps", batch=2, warmups=("0", "1 epoch")), world_size=4, num_samples=20)
    assert [fault.where for fault in caught.value.faults] == [
        "batch.global_batch_size",
        "curriculum.0.duration",
        "curriculum.1.warmup",
    ]


def test_a_warm_up_longer_than_its_stage_is_told_with_both_and_the_way_out() -> None:
    with pytest.raises(ConfigError) as caught:
        plan_batches(config("1 epoch", warmups=("50 steps",)), world_size=1, num_samples=100)
    (fault,) = caught.value.faults
    assert str(fault) == (
        "curriculum.0.warmup: 50 steps is longer than stage 's0', whose duration is 1 epoch: an epoch is 7 steps of 16 samples. "
        "Use at most 7 steps, or a longer curriculum.0.duration."
    )


@pytest.mark.parametrize(
    ("duration", "warmup", "is_hopeless"),
    [
        ("1 epoch", "8 steps", True),  # 7 steps, and fewer with fewer samples
        ("1 epoch", "7 steps", False),
        ("3 steps", "1 epoch", True),  # half of the samples are 4 steps
        ("4 steps", "1 epoch", False),  # 4 steps, if half of the samples are too long
    ],
)
def test_only_what_no_share_of_long_samples_mends_is_refused_before_the_start(
    duration: str, warmup: str, is_hopeless: bool
) -> None:
    run = config(duration, warmups=(warmup,))
    if is_hopeless:
        with pytest.raises(ConfigError, match=r"curriculum\.0\.warmup"):
            refuse_hopeless(run, world_size=1, num_samples=100)
    else:
        refuse_hopeless(run, world_size=1, num_samples=100)
    assert len(stage_plans(run, 100)) == 1
    refuse_hopeless(run, world_size=1, num_samples=0)  # whoever opens that dataset says so


@given(
    batch=st.integers(1, 500),
    samples=st.integers(1, 10**6),
    epochs=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    world_size=st.integers(1, 8),
)
def test_whole_epochs_see_every_sample_on_any_number_of_ranks(
    batch: int, samples: int, epochs: list[int], world_size: int
) -> None:
    plan = plan_batches(
        config(*(f"{n} epochs" for n in epochs), batch=max(batch, world_size)),
        world_size=world_size,
        num_samples=samples,
    )
    assert plan.total_steps == sum(epochs) * plan.steps_per_epoch
    assert (
        (plan.steps_per_epoch - 1) * plan.global_batch_size < samples <= plan.steps_per_epoch * plan.global_batch_size
    )
    assert all(left.last_step == right.first_step for left, right in zip(plan.stages, plan.stages[1:], strict=False))
