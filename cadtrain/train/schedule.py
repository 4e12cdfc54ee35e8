"""Learning rates: one curve for each component, made of the stages' pieces.

Pure functions of the step, so a resumed run has the rates of an uninterrupted one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cadtrain.config.batch_plan import BatchPlan
from cadtrain.config.sections import COMPONENTS, Component, StageConfig


def decay_factor(shape: str, progress: float, final_ratio: float) -> float:
    """Share of the peak at `progress` in [0, 1] after the warm-up, from 1 down to `final_ratio`."""
    progress = min(max(progress, 0.0), 1.0)
    if shape == "constant":
        return 1.0
    fall = progress if shape == "linear" else 0.5 * (1.0 - math.cos(math.pi * progress))
    return 1.0 - (1.0 - final_ratio) * fall


@dataclass(frozen=True, slots=True)
class CurriculumSchedule:
    """Stages on the step axis, and each component's rate at each step."""

    stages: tuple[StageConfig, ...]
    plan: BatchPlan

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.plan.total_steps

    def stage_index(self, step: int) -> int:
        """Number of the stage that 0-based `step` belongs to."""
        for number, stage in enumerate(self.plan.stages):
            if step < stage.last_step:
                return number
        raise IndexError(f"step {step} is behind the run's {self.total_steps} steps")

    def is_stage_end(self, steps_done: int) -> bool:
        """Whether a stage has just ended after `steps_done` steps."""
        return any(stage.last_step == steps_done for stage in self.plan.stages)

    def learns(self, stage: int, component: Component) -> bool:
        """Whether `component` has a rate above 0 in stage number `stage` and takes part in it."""
        return self.stages[stage].multiplier(component) > 0 and self._is_used(stage, component)

    def first_stage(self, component: Component) -> int | None:
        """Number of the stage in which `component` first learns."""
        return next((n for n in range(len(self.stages)) if self.learns(n, component)), None)

    def starting_components(self, step: int) -> list[Component]:
        """Components whose learning begins with 0-based `step`: their optimizer state starts there."""
        number = self.stage_index(step)
        if step != self.plan.stages[number].first_step:
            return []
        return [component for component in COMPONENTS if self.first_stage(component) == number]

    def rate(self, step: int, component: Component) -> float:
        """Learning rate of `component` in 0-based optimizer step `step`.

        In the warm-up the rate rises from where the component's last stage left it, 0 where it is new.
        """
        number = self.stage_index(step)
        if not self.learns(number, component):
            return 0.0
        stage, span = self.stages[number], self.plan.stages[number]
        peak = stage.learning_rate * stage.multiplier(component)
        done = step - span.first_step
        if done < span.warmup_steps:
            start = self._rate_before(number, component)
            return start + (peak - start) * (done + 1) / span.warmup_steps
        length = span.num_steps - span.warmup_steps
        # The first step after the warm-up has the peak, the last one the final rate.
        progress = (done - span.warmup_steps) / max(1, length - 1)
        return peak * decay_factor(stage.schedule, progress, stage.final_ratio)

    def rates(self, step: int) -> dict[Component, float]:
        """Rates of all components in 0-based optimizer step `step`."""
        return {component: self.rate(step, component) for component in COMPONENTS}

    def _rate_before(self, number: int, component: Component) -> float:
        return self.rate(self.plan.stages[number].first_step - 1, component) if number else 0.0

    def _is_used(self, number: int, component: Component) -> bool:
        stage = self.stages[number]
        if component == "language":
            return True
        return stage.uses("image" if component.startswith("image") else "point")
