"""Ranges of a profile: which parts they name, that nothing of them stays, and that they change no number."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cadtrain.data.collate import Pack
from cadtrain.metrics.timeline import STEP, read_trace, step_profile
from cadtrain.train.profiling import RangedEngine, communication_of, kept_profile, part_range, ranged, watch_parts
from tests.train.tiny import build, make_feed, model_config

PARTS = {
    "embedding", "image encoder", "image projector", "point encoder", "point projector", "norms", "attention", "MLP", "rotary",
    "residual stream", "logits and loss",
}  # fmt: skip
"""Adapters without dropout are part of the layer that they stand beside."""


class PlainEngine:
    """A forward and a backward pass, and plain gradient descent."""

    device = torch.device("cpu")

    def __init__(self, model: Any) -> None:
        self.model = model

    def micro_step(self, pack: Pack, *, num_targets: int, is_last: bool) -> torch.Tensor:
        loss: torch.Tensor = self.model(**pack.model_inputs()).loss_sum
        (loss / num_targets).backward()
        return loss.detach()

    def step(self) -> Any:
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
        return SimpleNamespace(was_applied=True)


def _steps(recompute: str) -> tuple[PlainEngine, list[Pack]]:
    config = model_config(lora=True, recompute=recompute)
    feed = make_feed(config)
    plan = feed.plan_step(0, {"text+point+image": 1.0}, world_size=1)
    return PlainEngine(build(config)), [feed.make_pack(order) for order in plan.for_rank(0)][:2]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_every_part_has_its_time_and_the_losses_are_the_same(recompute: str, tmp_path: Path) -> None:
    engine, packs = _steps(recompute)
    num_hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in engine.model.modules())
    losses: list[float] = []

    with watch_parts(engine.model) as opened:
        watched = RangedEngine(engine, opened)

        def take() -> None:
            with part_range(STEP):
                for pack in islice(ranged(iter(packs)), len(packs)):
                    losses.append(float(watched.micro_step(pack, num_targets=100, is_last=False)))
                watched.step()

        kept_profile(take, tmp_path / "profile" / "rank_00.json.gz", steps=2)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in engine.model.modules()) == num_hooks
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["rank_00.json.gz"]

    found = step_profile(read_trace(tmp_path / "profile" / "rank_00.json.gz"))
    assert found.steps == 2
    wanted = PARTS | {"backward", "optimizer"} | ({"recompute"} if recompute == "full" else set())
    assert set(found.parts) - {"other"} == wanted
    assert found.parts["backward"] > found.parts["norms"]

    plain, packs = _steps(recompute)
    again = []
    for _ in range(3):
        again += [float(plain.micro_step(pack, num_targets=100, is_last=False)) for pack in packs]
        plain.step()
    assert losses == again


def test_an_error_in_a_step_closes_ranges_and_leaves_no_file(tmp_path: Path) -> None:
    engine, packs = _steps("none")

    def fail() -> None:
        with watch_parts(engine.model) as opened:
            RangedEngine(engine, opened).micro_step(packs[0], num_targets=0, is_last=True)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        kept_profile(fail, tmp_path / "profile" / "rank_00.json.gz", steps=1)
    assert list((tmp_path / "profile").iterdir()) == []


def test_one_process_has_no_collectives() -> None:
    engine, packs = _steps("none")
    results, times = communication_of(lambda: float(engine.micro_step(packs[0], num_targets=1, is_last=True)), steps=2)
    assert len(results) == 2
    assert (times.total, times.kinds, times.is_device) == (0, {}, False)
