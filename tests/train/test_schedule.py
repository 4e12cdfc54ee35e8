"""Rates and starts, step by step, over a curriculum of three stages."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from cadtrain.config.batch_plan import BatchPlan, StagePlan
from cadtrain.config.sections import COMPONENTS, StageConfig
from cadtrain.train.schedule import CurriculumSchedule, decay_factor

PROJECTORS = {"image_projector": 5.0, "point_projector": 5.0}


def schedule_of(*stages: dict[str, Any]) -> CurriculumSchedule:
    """Stages given by their fields; `steps` and `warmup` are counts."""
    configs, plans, first = [], [], 0
    for number, fields in enumerate(stages):
        steps, warmup = fields.pop("steps"), fields.pop("warmup", 0)
        configs.append(StageConfig.model_validate({"name": f"s{number}", "duration": steps, "warmup": warmup, **fields}))
        plans.append(StagePlan(f"s{number}", first, first + steps, warmup))
        first += steps
    return CurriculumSchedule(tuple(configs), BatchPlan(1, 8, 160, 24, 3, tuple(plans)))


def three_stages() -> CurriculumSchedule:
    """Text for 10 steps, then points for 10, then everything for 20; peaks 1e-3, 2e-3, 1e-3."""
    return schedule_of(
        {"steps": 10, "warmup": 4, "modalities": {"text": 1}, "learning_rate": 1e-3, "schedule": "linear", "final_ratio": 0.5},
        {"steps": 10, "warmup": 5, "modalities": {"text": 0.3, "text+point": 0.7}, "learning_rate": 2e-3, "schedule": "constant"},
        {"steps": 20, "modalities": {"text+point+image": 1}, "learning_rate": 1e-3, "schedule": "cosine", "final_ratio": 0.1},
    )


def test_stage_borders() -> None:
    schedule = three_stages()
    assert schedule.total_steps == 40
    assert [schedule.stage_index(step) for step in (0, 9, 10, 19, 20, 39)] == [0, 0, 1, 1, 2, 2]
    assert [done for done in range(41) if schedule.is_stage_end(done)] == [10, 20, 40]
    with pytest.raises(IndexError, match="40"):
        schedule.stage_index(40)


def test_components_start_when_a_stage_first_uses_them() -> None:
    schedule = three_stages()
    assert {c: schedule.first_stage(c) for c in COMPONENTS} == {
        "language": 0, "point_encoder": 1, "point_projector": 1, "image_encoder": 2, "image_projector": 2,
    }  # fmt: skip
    starts = {step: schedule.starting_components(step) for step in range(40)}
    assert {step: names for step, names in starts.items() if names} == {
        0: ["language"], 10: ["point_encoder", "point_projector"], 20: ["image_encoder", "image_projector"],
    }  # fmt: skip


def test_a_component_with_multiplier_0_waits_for_its_stage() -> None:
    schedule = schedule_of(
        {"steps": 3, "modalities": {"text+point": 1}, "multipliers": {"language": 0, "point_encoder": 0}},
        {"steps": 3, "modalities": {"text+point": 1}, "multipliers": {"point_encoder": 0}},
    )
    assert schedule.first_stage("language") == 1
    assert schedule.first_stage("point_encoder") is None
    assert schedule.first_stage("image_projector") is None
    assert schedule.starting_components(0) == ["point_projector"]
    assert schedule.starting_components(3) == ["language"]
    assert [component for component in COMPONENTS if schedule.learns(0, component)] == ["point_projector"]
    assert [component for component in COMPONENTS if schedule.learns(1, component)] == ["language", "point_projector"]


def test_the_rate_is_0_exactly_where_a_component_does_not_learn() -> None:
    schedule = three_stages()
    for step in range(40):
        rates = schedule.rates(step)
        assert set(rates) == set(COMPONENTS)
        for component in COMPONENTS:
            assert (rates[component] > 0) == schedule.learns(schedule.stage_index(step), component), (step, component)


def test_the_first_warm_up_rises_from_0_to_the_peak() -> None:
    schedule = three_stages()
    assert [schedule.rate(step, "language") for step in range(5)] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3])


def test_a_later_warm_up_rises_from_where_the_last_stage_ended() -> None:
    """The language model from half of 1e-3; the projector, which is new, from 0 to five times the stage's rate."""
    schedule = three_stages()
    assert schedule.rate(9, "language") == pytest.approx(0.5e-3)
    language = [0.5e-3 + 1.5e-3 * n / 5 for n in range(1, 6)]
    assert [schedule.rate(step, "language") for step in range(10, 15)] == pytest.approx(language)
    assert [schedule.rate(step, "point_projector") for step in range(10, 15)] == pytest.approx([2e-3 * n for n in range(1, 6)])
    assert [schedule.rate(step, "point_projector") for step in range(15, 20)] == [1e-2] * 5


@pytest.mark.parametrize("warmup", [3, 4])
def test_a_stage_that_is_nearly_all_warm_up_ends_at_its_peak(warmup: int) -> None:
    schedule = schedule_of(
        {"steps": 4, "warmup": warmup, "modalities": {"text": 1}, "learning_rate": 1e-3, "final_ratio": 0.1},
        {"steps": 4, "warmup": 2, "modalities": {"text": 1}, "learning_rate": 1e-3, "final_ratio": 0.1},
    )
    assert [schedule.rate(step, "language") for step in range(3, 6)] == pytest.approx([1e-3, 1e-3, 1e-3])


def test_after_a_rest_a_component_rises_from_0() -> None:
    schedule = schedule_of(
        {"steps": 4, "modalities": {"text+point": 1}, "learning_rate": 1e-3},
        {"steps": 4, "modalities": {"text": 1}, "learning_rate": 1e-3},
        {"steps": 4, "warmup": 2, "modalities": {"text+point": 1}, "learning_rate": 1e-3},
    )
    assert schedule.rate(5, "point_projector") == 0
    assert schedule.rate(8, "point_projector") == pytest.approx(0.5 * 5e-3)
    assert schedule.starting_components(8) == [], "its optimizer state is kept"


def test_cosine_falls_from_the_peak_to_its_final_ratio() -> None:
    schedule = three_stages()
    rates = [schedule.rate(step, "language") for step in range(20, 40)]
    assert rates[0] == pytest.approx(1e-3)
    assert (rates[9] + rates[10]) / 2 == pytest.approx(1e-3 * 0.55), "half way"
    assert all(later < earlier for earlier, later in pairwise(rates))
    assert rates[-1] == pytest.approx(1e-4), "the last step has the final rate"
    assert schedule.rate(30, "image_projector") == pytest.approx(5 * rates[10])


@pytest.mark.parametrize(
    ("shape", "values"), [("constant", (1.0, 1.0, 1.0)), ("linear", (1.0, 0.6, 0.2)), ("cosine", (1.0, 0.6, 0.2))]
)
def test_decay(shape: str, values: tuple[float, ...]) -> None:
    assert [decay_factor(shape, progress, 0.2) for progress in (0.0, 0.5, 1.0)] == pytest.approx(values)
    assert decay_factor(shape, 1.7, 0.2) == decay_factor(shape, 1.0, 0.2)
