"""From durations and batch sizes to whole optimizer steps: pure arithmetic, the same on every rank.

`plan` shows it, the start banner shows it, the trainer follows it, and it is saved beside the run.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import asdict, dataclass
from typing import Any

from cadtrain.config.sections import RunConfig
from cadtrain.errors import ConfigError, Fault


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage in optimizer steps, counted from the start of the run."""

    name: str
    first_step: int
    last_step: int
    """Exclusive: the next stage's first step."""
    warmup_steps: int

    @property
    def num_steps(self) -> int:
        """Optimizer steps of this stage."""
        return self.last_step - self.first_step


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How samples become optimizer steps, and steps become stages."""

    world_size: int
    global_batch_size: int
    """Samples an optimizer step, over all ranks."""
    micro_batch_tokens: int
    """Token budget of one pack on one rank; how many packs a rank needs for its share depends on its samples."""
    num_samples: int
    """Samples an epoch."""
    steps_per_epoch: int
    """Rounded up: the short batch at the end of an epoch is trained as well."""
    stages: tuple[StagePlan, ...]

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole curriculum."""
        return self.stages[-1].last_step

    def stage_index(self, step: int) -> int:
        """Index of the stage that optimizer step `step` (0-based) belongs to; the last stage for steps past the end."""
        if step < 0:
            raise ValueError(f"step must not be negative, found {step}")
        return min(bisect_right([stage.last_step for stage in self.stages], step), len(self.stages) - 1)

    def stage_at(self, step: int) -> StagePlan:
        """The stage that optimizer step `step` (0-based) belongs to."""
        return self.stages[self.stage_index(step)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, `total_steps` included for readers."""
        return {**asdict(self), "stages": [asdict(stage) for stage in self.stages], "total_steps": self.total_steps}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BatchPlan:
        """The plan that `to_dict` wrote."""
        fields = {key: value for key, value in values.items() if key != "total_steps"}
        return cls(**{**fields, "stages": tuple(StagePlan(**stage) for stage in fields["stages"])})


def plan_batches(config: RunConfig, *, world_size: int, num_samples: int) -> BatchPlan:
    """The optimizer steps of a run over `num_samples` training samples on `world_size` ranks.

    Raises `ConfigError` where a batch leaves ranks without a sample, a stage rounds to no step, or a warm-up is
    longer than its stage.
    """
    if faults := _faults(config, world_size, num_samples):
        raise ConfigError(faults)
    batch = config.batch
    return BatchPlan(
        world_size,
        batch.global_batch_size,
        batch.micro_batch_tokens,
        num_samples,
        steps_in_epoch(config, num_samples),
        stage_plans(config, num_samples),
    )


def refuse_hopeless(config: RunConfig, *, world_size: int, num_samples: int) -> None:
    """Raise the `ConfigError` of `plan_batches` before a run is started, where a dataset has `num_samples` for training.

    Which of them are too long to be trained on is known only to the ranks. So a fault counts that is there with all samples and
    with half of them; what lies between is left to the ranks, and so is a dataset without any.
    """
    if num_samples < 1:
        return
    with_half = {fault.where for fault in _faults(config, world_size, max(1, num_samples // 2))}
    if faults := [fault for fault in _faults(config, world_size, num_samples) if fault.where in with_half]:
        raise ConfigError(faults)


def steps_in_epoch(config: RunConfig, num_samples: int) -> int:
    """Optimizer steps of an epoch, the last with what is left."""
    return -(-num_samples // config.batch.global_batch_size)


def stage_plans(config: RunConfig, num_samples: int) -> tuple[StagePlan, ...]:
    """The stages one after the other, whether or not they can be trained so."""
    steps_per_epoch = steps_in_epoch(config, num_samples)
    stages: list[StagePlan] = []
    first = 0
    for stage in config.curriculum:
        last = first + stage.duration.in_steps(steps_per_epoch)
        stages.append(StagePlan(stage.name, first, last, stage.warmup.in_steps(steps_per_epoch)))
        first = last
    return tuple(stages)


def _faults(config: RunConfig, world_size: int, num_samples: int) -> list[Fault]:
    """What makes a run over so many samples on so many ranks impossible."""
    if world_size < 1 or num_samples < 1:
        raise ValueError(f"world_size and num_samples must be positive, found {world_size} and {num_samples}")
    faults = []
    size = config.batch.global_batch_size
    if size < world_size:
        what = f"{size} samples a step leave some of {world_size} ranks without one."
        faults.append(Fault("batch.global_batch_size", what, f"Use at least {world_size}, or fewer ranks."))
    epoch = f"an epoch is {steps_in_epoch(config, num_samples)} steps of {size} samples"
    for index, (stage, span) in enumerate(zip(config.curriculum, stage_plans(config, num_samples), strict=True)):
        if span.num_steps < 1:
            what = f"{stage.duration} is no whole step: {epoch}."
            faults.append(Fault(f"curriculum.{index}.duration", what, "Lengthen the stage or use smaller batches."))
        elif span.warmup_steps > span.num_steps:
            what = f"{stage.warmup} is longer than stage {stage.name!r}, whose duration is {stage.duration}: {epoch}."
            hint = f"Use at most {span.num_steps} steps, or a longer curriculum.{index}.duration."
            faults.append(Fault(f"curriculum.{index}.warmup", what, hint))
    return faults
