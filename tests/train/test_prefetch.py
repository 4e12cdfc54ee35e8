"""ZeRO-3 gathers weights ahead of their use only while modules run in the order that DeepSpeed has recorded; they do.

DeepSpeed records the modules of one micro-step and throws the record away in the middle of a later one that differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from cadtrain.config.sections import COMPONENTS, Component, OptimConfig
from tests.train.ranks import RankPool
from tests.train.tiny import build, deepspeed_json, make_feed, model_config

TEXT = {"text": 1.0}
POINTS = {"text": 0.3, "text+point": 0.7}
ALL = {"text": 0.2, "text+point": 0.3, "text+image": 0.2, "text+point+image": 0.3}
STAGES: tuple[tuple[dict[str, float], tuple[Component, ...]], ...] = (
    (TEXT, ("language",)),
    (POINTS, ("language", "point_encoder", "point_projector")),
    (ALL, COMPONENTS),
)
STEPS, MICRO_STEPS = 3, 2
NUM_LAYERS = 2


class TraceWatch:
    """Counts, since it was last asked, what an engine's coordinator of gathered weights did."""

    def __init__(self, engine: Any) -> None:
        self.coordinator = engine._param_coordinator()
        self.thrown_away = 0
        self.in_vain = 0
        self.late = 0
        invalidate, fetch, compare = self.coordinator._invalidate_trace, self.coordinator.fetch_sub_module, self.coordinator.trace_prologue

        def count_invalidation() -> None:
            self.thrown_away += 1
            invalidate()

        def count_difference(module: Any) -> None:
            before = self.thrown_away
            compare(module)
            self.in_vain += self.thrown_away - before

        def count_late(module: Any, forward: bool) -> None:
            from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
            from deepspeed.utils import z3_leaf_module

            wanted = set(module.parameters(recurse=z3_leaf_module(module)))
            self.late += any(parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE for parameter in wanted)
            fetch(module, forward=forward)

        self.coordinator._invalidate_trace = count_invalidation
        self.coordinator.trace_prologue = count_difference
        self.coordinator.fetch_sub_module = count_late

    def take(self) -> dict[str, Any]:
        """`in_vain`: records thrown away amid a pass; `late`: modules whose weights were not even under way; `thrown_away`: all."""
        found = {"in_vain": self.in_vain, "thrown_away": self.thrown_away, "late": self.late, "is_complete": self.coordinator.is_complete_trace()}
        self.thrown_away = self.in_vain = self.late = 0
        return found


def _packs(feed: Any, probabilities: dict[str, float], rank: int, step: int) -> Iterator[Any]:
    """Packs of a step: each rank draws other modality sets than its peer, and sometimes nothing at all."""
    from cadtrain.data.feed import Draw, PackOrder

    sets = list(probabilities)
    for micro in range(MICRO_STEPS):
        number = MICRO_STEPS * step + micro
        draws = tuple(Draw((number + 5 * k) % 24, sets[(number * (rank + 1) + k) % len(sets)]) for k in range(1 + rank))
        is_empty = number % 5 == 3 * rank
        use_images, use_points = (any(what in key for key in sets) for what in ("image", "point"))
        yield feed.make_pack(PackOrder(0, () if is_empty else draws, use_images, use_points))


def _curriculum_on_rank(lora: bool, recompute: tuple[int, ...], evaluate_after: tuple[int, ...], evaluate_first: bool) -> list[list[Any]]:
    """All stages in one engine with next to no weight kept whole. What `TraceWatch` saw, each with its place."""
    from cadtrain.distributed import Place
    from cadtrain.train.engine import DeepSpeedEngine, init_process_group

    config, device = model_config(lora=lora), init_process_group()
    json = deepspeed_json(3)
    json["zero_optimization"] |= {"stage3_param_persistence_threshold": 32, "stage3_prefetch_bucket_size": 20_000}
    engine, feed = DeepSpeedEngine(build(config), config=json, optim=OptimConfig(), device=device), make_feed(config)
    watch, rank, seen = TraceWatch(engine), Place.from_environment().rank, []

    def evaluate(probabilities: dict[str, float], place: str) -> None:
        for pack in _packs(feed, probabilities, rank, step=7):
            engine.evaluate(pack)
            seen.append([place, watch.take()])

    for number, (probabilities, learning) in enumerate(STAGES):
        engine.set_learning(learning)
        engine.set_recompute(recompute[number])
        engine.set_rates({component: 1e-3 if component in learning else 0.0 for component in COMPONENTS})
        if evaluate_first:
            evaluate(probabilities, f"evaluation before stage {number}")
        for step in range(STEPS):
            for micro, pack in enumerate(_packs(feed, probabilities, rank, step)):
                engine.micro_step(pack, num_targets=60, is_last=micro == MICRO_STEPS - 1)
                seen.append([f"stage {number} micro-step {MICRO_STEPS * step + micro}", watch.take()])
            assert engine.step().was_applied
            if step in evaluate_after:
                evaluate(probabilities, f"evaluation in stage {number}")
    engine.close()
    return seen


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("recompute", [(0, 0, 0), (1, 0, 2), (2, 2, 2)])
def test_weights_are_gathered_ahead_in_every_micro_step_but_a_stages_first(two_ranks: RankPool, lora: bool, recompute: tuple[int, ...]) -> None:
    """Whatever the ranks' packs hold, with evaluation in between; a stage's first micro-step is the one that is recorded."""
    for seen in two_ranks.run(_curriculum_on_rank, lora, recompute, (0, 2), False):
        assert [place for place, found in seen if found["in_vain"]] == [], "a pass came in another order than was recorded"
        thrown_away = {place: found["thrown_away"] for place, found in seen if found["thrown_away"]}
        assert thrown_away == {"stage 1 micro-step 0": 1, "stage 2 micro-step 0": 1}, "once a change of stage"
        unrecorded = [place for place, found in seen if not found["is_complete"]]
        assert unrecorded == [f"stage {number} micro-step 0" for number in range(3)]
        late = {place: found["late"] for place, found in seen}
        first = [number for place, number in late.items() if place in unrecorded]
        assert min(first) >= 2 * NUM_LAYERS, "without a record each layer waits for its weights, forward and backward"
        assert max(number for place, number in late.items() if place not in unrecorded) <= 1, "the first of a pass alone"


def test_the_order_of_an_evaluation_is_not_taken_for_that_of_training(two_ranks: RankPool) -> None:
    """Where an evaluation comes first it is recorded and gathered ahead by; training then records its own, and no pass is in vain."""
    for seen in two_ranks.run(_curriculum_on_rank, False, (0, 0, 0), (), True):
        assert [place for place, found in seen if found["in_vain"]] == []
        assert [place for place, found in seen if not found["is_complete"]] == [
            place for number in range(3) for place in (f"evaluation before stage {number}", f"stage {number} micro-step 0")
        ]
