"""One optimizer step over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from cadtrain.data.collate import Pack
from cadtrain.data.feed import StepPlan
from cadtrain.distributed import all_reduce
from cadtrain.train.engine import Engine, StepResult


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What all ranks know after a step."""

    loss: float
    """Mean cross entropy (nats) of a target token over all ranks; may be nan or inf."""
    result: StepResult
    stop_signal: int
    """A signal that some rank was sent, 0 if none."""
    is_due: bool
    """Whether rank 0's clock says that a checkpoint is due."""


def train_step(
    engine: Engine,
    plan: StepPlan,
    packs: Iterator[Pack],
    *,
    seed: int,
    stop_signal: Callable[[], int],
    is_due: Callable[[], bool],
) -> StepOutcome:
    """Run a step's micro-steps, reduce the loss and the ranks' wishes in one message, update the weights. Collective."""
    # Dropout is keyed by the step, so a resumed run draws what an uninterrupted one would have drawn.
    torch.manual_seed(seed)
    loss_sum = torch.zeros((), dtype=torch.float32, device=engine.device)
    targets = max(1, plan.num_targets)
    for number in range(len(plan.packs)):
        loss_sum += engine.micro_step(next(packs), num_targets=targets, is_last=number == len(plan.packs) - 1)
    result = engine.step()
    told = torch.zeros(3, dtype=torch.float64)
    told[0], told[1], told[2] = float(loss_sum), float(stop_signal()), float(is_due())
    told = told.to(engine.device)
    total = all_reduce(told[:1].clone())
    wishes = all_reduce(told[1:].clone(), op="max")
    return StepOutcome(float(total[0]) / targets, result, int(wishes[0]), bool(wishes[1]))


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed of its own for each (run, step, rank)."""
    return (seed * 1_000_003 + step * 65_537 + rank * 2_654_435_761) % (2**63)
