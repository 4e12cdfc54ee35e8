"""The norm in one reduction is DeepSpeed's own, and steps without a finite one are still left out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from cadtrain.config.sections import COMPONENTS
from tests.train.ranks import RankPool
from tests.train.tiny import make_engine, make_feed, model_config

MODALITIES = {"text": 0.2, "text+point": 0.3, "text+image": 0.2, "text+point+image": 0.3}


def _steps_on_rank(stage: int, precision: str, at_once: bool) -> dict[str, Any]:
    from cadtrain.distributed import Place
    from cadtrain.train.grad_norm import take_norms_at_once

    config = model_config()
    engine, feed = make_engine(config, stage, precision=precision, clipping=0.05), make_feed(config)
    if at_once:
        take_norms_at_once(engine._engine.optimizer, stage)
    engine.set_learning(COMPONENTS)
    engine.set_rates(dict.fromkeys(COMPONENTS, 1e-3))
    norms, applied = [], []
    for number, scale in enumerate((1.0, 1.0, math.nan, math.inf, 1.0)):
        plan = feed.plan_step(number, MODALITIES, world_size=2)
        orders = plan.for_rank(Place.from_environment().rank)
        for micro, order in enumerate(orders):
            targets = plan.num_targets / scale if math.isinf(scale) else plan.num_targets * scale
            targets = targets or 1e-45  # the gradient overflows
            engine.micro_step(feed.make_pack(order), num_targets=targets, is_last=micro == len(orders) - 1)  # type: ignore[arg-type]
        result = engine.step()
        norms.append(result.grad_norm)
        applied.append(result.was_applied)
    weights = {name: value for name, value in engine.full_state() if "projector" in name}
    engine.close()
    return {"norms": norms, "applied": applied, "weights": weights}


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (2, "bf16"), (2, "fp32"), (3, "bf16"), (3, "fp32")])
def test_norm_clipping_and_skipping_are_deepspeeds_own(two_ranks: RankPool, stage: int, precision: str) -> None:
    ours = two_ranks.run(_steps_on_rank, stage, precision, True)[0]
    theirs = two_ranks.run(_steps_on_rank, stage, precision, False)[0]
    assert ours["applied"] == theirs["applied"] == [True, True, False, False, True]
    finite = [norm for norm in theirs["norms"] if math.isfinite(norm)]
    assert len(finite) == 3
    assert min(finite) > 0.05, "nothing would be clipped"
    assert [norm for norm in ours["norms"] if math.isfinite(norm)] == pytest.approx(finite, rel=1e-5)
    for name, value in theirs["weights"].items():
        # A norm that differs in its last digits moves a bf16 weight to its neighbour here and there.
        near = {"rtol": 1e-2, "atol": 1e-4} if precision == "bf16" else {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(ours["weights"][name], value, **near)
