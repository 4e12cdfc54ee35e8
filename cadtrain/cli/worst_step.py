"""The worst pack of a configuration, stepped by the run's own ranks: for `plan --calibrate` and for comparing plans with machines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cadtrain.config.sections import RunConfig
    from cadtrain.launch.planning import LaunchPlan, LaunchRequest
    from cadtrain.launch.supervise import LaunchOutcome
    from cadtrain.plan.memory import Choice, RankMemory
    from cadtrain.plan.worst_pack import WorstPack
    from cadtrain.train.worst_step import MeasuredMemory

OTHERS_LIMIT = 2 * 2**30
"""Bytes of a GPU that may be taken before the ranks start; drivers keep less for themselves."""


@dataclass(frozen=True)
class WorstStep:
    """What was measured, and what had been predicted for it."""

    config: RunConfig
    """With the decided ZeRO stage, and the precision that the ranks took."""
    device: str
    """Name of the GPU; `CPU` where ranks ran without one."""
    num_ranks: int
    choice: Choice
    pack: WorstPack
    ranks: tuple[MeasuredMemory, ...]
    driver_bytes: int
    """Of the device's memory what CUDA does not show: the driver's own."""
    seconds: float
    """From the start of the ranks to their end."""

    @property
    def predicted(self) -> RankMemory:
        """Of a rank, as `cadtrain plan` has it."""
        return self.pack.option.memory

    @property
    def worst(self) -> MeasuredMemory:
        """The rank that took most."""
        return max(self.ranks, key=lambda found: found.reserved)

    @property
    def context(self) -> int:
        """Measured bytes outside of the allocator, of the rank that had most."""
        return max(found.outside for found in self.ranks) + self.driver_bytes


@dataclass(frozen=True)
class PlannedStep:
    """A step that may be taken."""

    launch: LaunchPlan
    config: RunConfig
    """With the decided ZeRO stage, and the precision that the ranks will take."""
    pack: WorstPack


def plan_worst_step(request: LaunchRequest, *, worker: str = "") -> PlannedStep:
    """The worst pack of the configuration of `request`, with what would start ranks for it; starts nothing.

    `worker` is a module that ends in `train.worst_step.main`; by default that itself. Raises as `plan_launch` does.
    """
    from cadtrain.launch.planning import plan_launch
    from cadtrain.plan.worst_pack import worst_pack
    from cadtrain.train.worst_step import MODULE

    plan = plan_launch(request, worker=(worker or MODULE,))
    config, gpus = plan.config, plan.devices.gpus
    if not gpus and config.precision == "auto":
        config = config.model_copy(update={"precision": "fp32"})
    memory = min((gpu.memory_total for gpu in gpus), default=0)
    pack = worst_pack(config, plan.devices.num_ranks, memory, kernels="cuda" if gpus else "cpu")
    return PlannedStep(plan, config, pack)


def take_worst_step(step: PlannedStep, *, announce: Callable[[str], None]) -> WorstStep:
    """Start the ranks of `step`, and wait for them. Called from the main thread.

    Raises `TrainingError` with the first failing rank's words. On a machine without GPUs the ranks run on the CPU.
    """
    from cadtrain.launch.start import start
    from cadtrain.launch.supervise import GracePeriods
    from cadtrain.train.worst_step import Request, read_results, write_request

    plan, pack, devices = step.launch, step.pack, step.launch.devices
    write_request(plan.run_dir, Request(asdict(pack.shape), pack.learning, pack.recomputed))
    choice = pack.option.choice
    announce(f"{choice.describe()} on {devices.describe()}: stage {pack.stage}, {pack.shape.tokens:,} tokens a pack")
    # Ranks have nothing to save: they need no time to leave.
    outcome = start(plan, announce=announce, grace=GracePeriods(stop=5.0, failure=2.0), stdout=2)
    _check_outcome(outcome)
    results = read_results(plan.run_dir)
    return WorstStep(
        config=step.config, device=devices.gpus[0].name if devices.gpus else "CPU", num_ranks=devices.num_ranks, choice=choice,
        pack=pack, ranks=tuple(results), driver_bytes=_driver_bytes(plan, results), seconds=outcome.seconds,
    )  # fmt: skip


def check_idle(plan: LaunchPlan) -> None:
    """Refuse GPUs that hold others' memory, which would be taken for this run's; raises `EnvironmentFault`."""
    from cadtrain.errors import EnvironmentFault
    from cadtrain.units import format_bytes

    for gpu in plan.devices.gpus:
        taken = gpu.memory_total - gpu.memory_free
        if taken > OTHERS_LIMIT:
            raise EnvironmentFault(
                f"{format_bytes(taken)} of its memory are in use, so a measured step would say nothing.", where=f"GPU {gpu.id}",
                hint="Name idle ones with CUDA_VISIBLE_DEVICES; `cadtrain doctor` shows who holds this one.",
            )  # fmt: skip


def _check_outcome(outcome: LaunchOutcome) -> None:
    from cadtrain.errors import Interrupted, TrainingError
    from cadtrain.launch.reasons import Kind

    if outcome.signal_number is not None:
        raise Interrupted("the measured step was stopped", signal_number=outcome.signal_number)
    failure, explanation = outcome.failure, outcome.explanation
    if failure is None and not outcome.exit_code:
        return
    words = f"rank {failure.rank}: {failure.type}: {failure.message}" if failure else f"exit code {outcome.exit_code}"
    kind = f" ({explanation.kind})" if explanation else ""
    hint = None if explanation is None else " ".join(explanation.remedies) or None
    if explanation is not None and explanation.kind == Kind.GPU_MEMORY:
        hint = (
            "Measure with a smaller batch.micro_batch_tokens, which corrects larger packs as well, or another --zero."
        )
    raise TrainingError(f"the measured step failed{kind}: {words}", hint=hint)


def _driver_bytes(plan: LaunchPlan, results: Sequence[MeasuredMemory]) -> int:
    """What NVML counts as the device's memory and CUDA does not."""
    shown = [found.device_total for found in results if found.device_total]
    return max(0, min(gpu.memory_total for gpu in plan.devices.gpus) - min(shown)) if plan.devices.gpus and shown else 0
