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
class Wishes:
    """What a rank has to say after a step; `StepOutcome` says what each means."""

    stop_signal: int = 0
    is_due: bool = False
    is_writing: bool = False


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
    is_writing: bool
    """Whether some rank still writes a checkpoint behind the training."""


def train_step(
    engine: Engine,
    plan: StepPlan,
    packs: Iterator[Pack],
    *,
    seed: int,
    wishes: Callable[[], Wishes],
) -> StepOutcome:
    """Run a step's micro-steps, reduce the loss and the ranks' wishes in one message, update the weights. Collective."""
    # Dropout is keyed by the step, so a resumed run draws what an uninterrupted one would have drawn.
    torch.manual_seed(seed)
    loss_sum = torch.zeros((), dtype=torch.float32, device=engine.device)
    targets = max(1, plan.num_targets)
    for number in range(len(plan.packs)):
        loss_sum += engine.micro_step(next(packs), num_targets=targets, is_last=number == len(plan.packs) - 1)
    result = engine.step()
    total = float(all_reduce(loss_sum.double()))
    told = agree_on(wishes(), engine.device)
    return StepOutcome(total / targets, result, told.stop_signal, told.is_due, told.is_writing)


def pass_over(plan: StepPlan, packs: Iterator[Pack], *, wishes: Callable[[], Wishes], engine: Engine) -> StepOutcome:
    """A step whose samples are not trained on; the weights stay as they are. Collective."""
    for _ in plan.packs:
        next(packs)
    told = agree_on(wishes(), engine.device)
    return StepOutcome(float("nan"), StepResult(float("nan"), False), told.stop_signal, told.is_due, told.is_writing)


def agree_on(wishes: Wishes, device: torch.device) -> Wishes:
    """What any rank wishes, in one message. Collective."""
    told = torch.tensor([wishes.stop_signal, wishes.is_due, wishes.is_writing], dtype=torch.int64).to(device)
    stop_signal, is_due, is_writing = all_reduce(told, op="max").tolist()
    return Wishes(int(stop_signal), bool(is_due), bool(is_writing))


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed of its own for each (run, step, rank)."""
    return (seed * 1_000_003 + step * 65_537 + rank * 2_654_435_761) % (2**63)
