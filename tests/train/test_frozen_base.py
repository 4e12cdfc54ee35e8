"""Under LoRA and ZeRO-3 the frozen weights cost their gathering and nothing else; adapters are not even gathered."""

from __future__ import annotations

from typing import Any

import pytest

from cadtrain.config.deepspeed_config import build_deepspeed_config
from cadtrain.config.sections import COMPONENTS, Component, OptimConfig
from tests.train.ranks import RankPool
from tests.train.tiny import build, deepspeed_json, make_feed, model_config

MICRO_STEPS = 3
KEPT_WHOLE = 512
"""Between the widest adapter (4 x 64) and the smallest matrix that they stand beside (16 x 32 is kept too, 32 x 32 is not)."""


def _reductions_on_rank(learning: tuple[Component, ...]) -> dict[str, Any]:
    """Elements that a step of three micro-steps sends for reduction, by where they are caught, and what the weights look like after it."""
    import deepspeed.comm.comm as comm
    import deepspeed.runtime.zero.stage3 as stage3

    from cadtrain.distributed import Place
    from cadtrain.train.engine import DeepSpeedEngine, init_process_group

    config, device = model_config(lora=True), init_process_group()
    json = deepspeed_json(3)
    json["zero_optimization"]["stage3_param_persistence_threshold"] = KEPT_WHOLE
    engine, feed = DeepSpeedEngine(build(config), config=json, optim=OptimConfig(), device=device), make_feed(config)
    engine.set_learning(learning)
    engine.set_rates({component: 1e-3 if component in learning else 0.0 for component in COMPONENTS})
    handed, sent = [], []
    scatter, whole, all_reduce = stage3.reduce_scatter_coalesced, comm.cdb.reduce_scatter_tensor, comm.cdb.all_reduce

    def hand(tensors: list[Any], *arguments: Any) -> Any:
        handed.extend(tensor.numel() for tensor in tensors)
        return scatter(tensors, *arguments)

    def send_scattered(*, input_tensor: Any, **named: Any) -> Any:
        sent.append(input_tensor.numel())
        return whole(input_tensor=input_tensor, **named)

    def send(tensor: Any, *arguments: Any, **named: Any) -> Any:
        sent.append(tensor.numel())
        return all_reduce(tensor, *arguments, **named)

    stage3.reduce_scatter_coalesced, comm.cdb.reduce_scatter_tensor, comm.cdb.all_reduce = hand, send_scattered, send
    try:
        order = feed.plan_step(0, {"text+point+image": 1.0}, world_size=2).for_rank(Place.from_environment().rank)[0]
        for micro in range(MICRO_STEPS):
            engine.micro_step(feed.make_pack(order), num_targets=60, is_last=micro == MICRO_STEPS - 1)
        in_backward = sum(sent)
        assert engine.step().was_applied
    finally:
        stage3.reduce_scatter_coalesced, comm.cdb.reduce_scatter_tensor, comm.cdb.all_reduce = scatter, whole, all_reduce
    weights = {
        name: {
            "numel": int(p.ds_numel), "is_frozen": name in engine.frozen_names(), "has_gradient": p.grad is not None,
            "is_whole": p.ds_status.name == "AVAILABLE",
        }
        for name, p in engine.model.named_parameters()
    }  # fmt: skip
    learns = sum(int(p.ds_numel) for component in learning for p in engine._trainable[component])
    engine.close()
    return {"handed": sum(handed), "in_backward": in_backward, "in_step": sum(sent) - in_backward, "learns": learns, "weights": weights}


@pytest.mark.parametrize("learning", [("language",), COMPONENTS], ids=["adapters", "all that can learn"])
def test_frozen_weights_take_part_in_no_reduction(two_ranks: RankPool, learning: tuple[Component, ...]) -> None:
    """What is reduced in a micro-step is the gradient of what learns, to the element; the step itself adds norms alone."""
    for found in two_ranks.run(_reductions_on_rank, learning):
        frozen = sum(weight["numel"] for weight in found["weights"].values() if weight["is_frozen"])
        assert frozen > 5 * found["learns"] or learning == COMPONENTS, "else the test says little"
        assert found["handed"] == MICRO_STEPS * found["learns"]
        assert found["handed"] <= found["in_backward"] < found["handed"] + frozen // 10, "an odd tensor is padded"
        assert found["in_step"] < 100
        assert not any(weight["has_gradient"] for weight in found["weights"].values() if weight["is_frozen"])


def test_adapters_stay_whole_and_the_weights_beside_them_do_not(two_ranks: RankPool) -> None:
    """So an adapter of two tensors a layer adds no gathering of tiny tensors."""
    for found in two_ranks.run(_reductions_on_rank, COMPONENTS):
        adapters = {name: weight for name, weight in found["weights"].items() if "lora_" in name}
        assert len(adapters) == 2 * 7 * 2, "two for each linear layer of both decoder layers"
        assert all(weight["is_whole"] for weight in adapters.values())
        matrices = [weight for name, weight in found["weights"].items() if weight["is_frozen"] and weight["numel"] > KEPT_WHOLE]
        assert matrices
        assert not any(weight["is_whole"] for weight in matrices)


@pytest.mark.parametrize(("hidden", "widest", "rank"), [(4096, 12288, 32), (5120, 17408, 16)])
def test_the_threshold_that_is_written_keeps_adapters_of_common_ranks_whole(hidden: int, widest: int, rank: int) -> None:
    """Qwen3-8B at rank 32, Qwen3-14B at rank 16; no matrix of theirs is kept."""
    zero = build_deepspeed_config(zero_stage=3, hidden_size=hidden).to_dict()["zero_optimization"]
    assert rank * widest <= zero["stage3_param_persistence_threshold"] < hidden * 1024
