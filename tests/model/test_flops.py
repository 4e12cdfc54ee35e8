"""Counted operations against hand counts, against torch's own counter, and against the formula that other trainers use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cadtrain.config.sections import COMPONENTS, LanguageModelConfig, LoraConfig, ModelConfig
from cadtrain.errors import UsageError
from cadtrain.model.flops import ModelFlops, PackContent, Work, count_flops
from cadtrain.model.footprint import meta_model
from tests.train.tiny import build, make_feed, model_config

QWEN3_8B = {
    "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
}  # fmt: skip
LAYER = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 12288
"""Weights of one layer's matrices: q and o, k and v, the three of the MLP."""
HEAD = 4096 * 151936


def _flops(lora: LoraConfig | None = None, learning: tuple[str, ...] = ("language",)) -> ModelFlops:
    language = LanguageModelConfig(config=QWEN3_8B, tokenizer="bytes", lora=lora)
    model = meta_model(ModelConfig(language=language, image=None, point=None), codec="compact", element_bytes=2)
    return count_flops(model, learning, num_points=2048)  # type: ignore[arg-type]


def test_qwen3_8b_by_hand_where_everything_learns() -> None:
    flops = _flops()
    assert flops.token == Work(2.0 * 36 * LAYER, 4.0 * 36 * LAYER)
    assert flops.target == Work(2.0 * HEAD, 4.0 * HEAD)
    assert flops.pair == Work(4.0 * 36 * 32 * 128, 8.0 * 36 * 32 * 128)
    assert flops.view == flops.cloud == Work()


def test_qwen3_8b_by_hand_under_adapters() -> None:
    rank = 16
    adapters = rank * ((4096 + 4096) * 2 + (4096 + 1024) * 2 + 3 * (4096 + 12288))
    flops = _flops(LoraConfig(rank=rank, alpha=32.0))
    assert flops.token == Work(2.0 * 36 * (LAYER + adapters), 2.0 * 36 * LAYER + 4.0 * 36 * adapters)
    assert flops.target == Work(2.0 * HEAD, 2.0 * HEAD)


def test_a_frozen_language_model_still_passes_gradients_on() -> None:
    """With nothing of it learning, a decoder costs 4 a weight: the projectors before it need the gradient."""
    assert _flops(learning=()).token == Work(2.0 * 36 * LAYER, 2.0 * 36 * LAYER)


@pytest.mark.parametrize("length", [512, 4096])
def test_equals_the_usual_formula_but_for_norms_and_the_head_of_prompts(length: int) -> None:
    """6 a weight, the head on every position, 6 L H E n a token for causal attention: what peers report MFU by."""
    norms = 36 * (2 * 4096 + 2 * 128) + 4096
    usual = 6 * (36 * LAYER + HEAD + norms) + 6 * 36 * 32 * 128 * length
    flops = _flops()
    all_targets = flops.of(PackContent(tokens=length, targets=length, pairs=length**2 / 2)).total / length
    assert all_targets == usual - 6 * norms
    assert abs(all_targets / usual - 1) < 1e-4
    third = flops.of(PackContent(tokens=length, targets=length / 3, pairs=length**2 / 2)).total / length  # type: ignore[arg-type]
    assert third == pytest.approx(all_targets - 6 * HEAD * 2 / 3)


def _addmm_flops(out: torch.Size, left: torch.Size, right: torch.Size, *, out_shape: Any = None, **_: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _counted_by_torch(model: Any, pack: Any) -> dict[str, float]:
    # torch's counter knows `addmm`, but not the same in place.
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops})
    with counter:
        model(**pack.model_inputs()).loss_sum.backward()
    return {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}


MATRICES = ("aten.mm", "aten.addmm", "aten.addmm_", "aten.convolution", "aten.convolution_backward")


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    "learning", [COMPONENTS, ("language", "image_projector"), ("image_projector", "point_projector"), ("language", "point_encoder")]
)
def test_matrices_equal_what_torch_counts_while_it_runs(lora: bool, learning: tuple[str, ...]) -> None:
    config = model_config(lora=lora)
    feed = make_feed(config)
    pack = feed.make_pack(feed.plan_step(0, {"text+point+image": 1.0}, world_size=2).for_rank(0)[0])
    assert pack.pixel_values is not None
    assert pack.points is not None
    model = build(config)
    shapes = meta_model(config, codec="compact", element_bytes=4)
    flops = count_flops(shapes, learning, num_points=pack.points.shape[1])  # type: ignore[arg-type]
    learns = {name for name, parameter in shapes.named_parameters() if parameter.requires_grad}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learns)
    content = PackContent(
        tokens=pack.num_tokens, targets=pack.num_targets, views=len(pack.pixel_values), clouds=len(pack.points)
    )
    counted = _counted_by_torch(model, pack)
    in_encoders = _encoder_attention(config, pack, trainable="point_encoder" in learning, images="image_encoder" in learning)
    assert flops.of(content).total - in_encoders == sum(counted.get(op, 0) for op in MATRICES)


def _encoder_attention(config: ModelConfig, pack: Any, *, trainable: bool, images: bool) -> float:
    """By hand: 24 wide; 2 x 2 patches and a class token for a view, 4 latents for a cloud's points and for each other."""
    view, clouds, points = 4.0 * 24 * 5 * 5, len(pack.points), pack.points.shape[1]
    cloud = 4.0 * 24 * (4 * points + 4 * 4)
    return len(pack.pixel_values) * view * (3 if images else 1) + clouds * cloud * (3 if trainable else 1)


def test_a_frozen_encoder_works_forward_only() -> None:
    config = model_config()
    assert config.image is not None
    frozen = config.model_copy(update={"image": config.image.model_copy(update={"trainable": False})})
    rows = [
        count_flops(meta_model(c, codec="compact", element_bytes=4), ("language", "image_encoder"), num_points=16).view
        for c in (config, frozen)
    ]
    assert rows[0].forward == rows[1].forward
    assert rows[0].backward > rows[1].backward == 0


def test_recomputation_is_not_counted() -> None:
    counts = [
        count_flops(
            meta_model(model_config(recompute=policy), codec="compact", element_bytes=4), COMPONENTS, num_points=16
        )
        for policy in ("none", "full")
    ]
    assert counts[0] == counts[1]


def test_a_mixture_of_experts_is_refused() -> None:
    fields = {
        "model_type": "qwen3_moe", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    }  # fmt: skip
    config = ModelConfig(language=LanguageModelConfig(config=fields, tokenizer="bytes"), image=None, point=None)
    model = meta_model(config, codec="compact", element_bytes=4)
    with pytest.raises(UsageError, match="outside of linear layers"):
        count_flops(model, ("language",), num_points=16)


def test_contents_of_packs_add_up() -> None:
    one, two = PackContent(10, 4, 50.0, 1, 0, 1), PackContent(6, 6, 18.0, 0, 2, 1)
    assert one + two == PackContent(16, 10, 68.0, 1, 2, 2)
    flops = ModelFlops(Work(1, 2), Work(10, 20), Work(100, 200), Work(1000, 0), Work(5, 5))
    assert flops.of(one + two) == flops.of(one) + flops.of(two)
    assert torch.tensor(flops.of(one).total) == 10 * 3 + 4 * 30 + 50 * 300 + 1000
