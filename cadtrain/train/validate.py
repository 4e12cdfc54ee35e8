"""Validation loss for each modality set."""

from __future__ import annotations

import time
from itertools import chain

import torch

from cadtrain.config.sections import StageConfig
from cadtrain.data.feed import Feed
from cadtrain.data.loader import ReadAhead
from cadtrain.distributed import Place, all_reduce
from cadtrain.metrics.record import ValidationRecord
from cadtrain.train.engine import Engine


def validate(
    engine: Engine, feed: Feed, stage: StageConfig, *, step: int, place: Place, max_samples: int
) -> ValidationRecord:
    """Mean loss of a target token for every modality set that the stage draws, each alone. Collective.

    The same samples every time, packed as in training, so the numbers of two stages can be compared.
    """
    started = time.perf_counter()
    losses: dict[str, float] = {}
    counts: dict[str, int] = {}
    for key in stage.probabilities():
        plans = list(
            feed.validation_plans(key, stage.probabilities(), world_size=place.world_size, max_samples=max_samples)
        )
        targets = sum(plan.num_targets for plan in plans)
        if not targets:
            continue
        total = torch.zeros((), dtype=torch.float32, device=engine.device)
        orders = chain.from_iterable(plan.for_rank(place.rank) for plan in plans)
        with ReadAhead(feed.make_pack, orders, num_workers=1) as packs:
            for pack in packs:
                total += engine.evaluate(pack)
        losses[key] = float(all_reduce(total)) / targets
        counts[key] = sum(plan.num_samples for plan in plans)
    return ValidationRecord(
        step=step, stage=stage.name, losses=losses, samples=counts, seconds=time.perf_counter() - started
    )
