"""The ZeRO stage that `auto` takes, against sizes that are known."""

from __future__ import annotations

import pytest

from cadtrain.config.recompute import RecomputeSetting
from cadtrain.config.sections import LanguageModelConfig, LoraConfig, ModelConfig, RunConfig, StageConfig, ZeroConfig
from cadtrain.plan.stage import StageChoice, choose_stage

GIB = 2**30
QWEN3_8B = {
    "model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36, "vocab_size": 151936, "intermediate_size": 12288,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
}  # fmt: skip


def make_config(lora: LoraConfig | None = None, *, recompute: RecomputeSetting = "full", **zero: object) -> RunConfig:
    return RunConfig(
        model=ModelConfig(language=LanguageModelConfig(config=QWEN3_8B, lora=lora), recompute=recompute),
        curriculum=(StageConfig(name="text", duration="10 steps", modalities={"text": 1.0}),),  # type: ignore[arg-type]
        zero=ZeroConfig(**zero),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("ranks", "memory_gib", "lora", "stage"),
    [(4, 140, None, 1), (4, 80, None, 2), (8, 38, None, 3), (4, 44, LoraConfig(rank=32), 0), (1, 140, LoraConfig(), 0)],
)
def test_lowest_stage_that_fits(ranks: int, memory_gib: int, lora: LoraConfig | None, stage: int) -> None:
    choice = choose_stage(make_config(lora), ranks, memory_gib * GIB)
    assert choice.stage == stage, choice
    assert choice.fits


def test_a_lower_stage_with_recomputation_or_a_higher_one_without() -> None:
    """Whichever is faster: stage 1 fits with all layers recomputed, stage 2 with none; stage 3 leaves more room but gathers weights."""
    fixed = choose_stage(make_config(), 4, 120 * GIB)
    found = choose_stage(make_config(recompute="auto"), 4, 120 * GIB)
    assert (fixed.stage, fixed.reason, fixed.recompute_setting) == (1, "the lowest that fits", "full")
    assert (found.stage, found.reason, found.recompute_setting) == (2, "the fastest that fits", "none")
    tight = choose_stage(make_config(recompute="auto"), 4, 75 * GIB, device="NVIDIA L40")
    assert tight.stage == 2
    assert isinstance(tight.recompute_setting, int)
    assert 0 < tight.recompute_setting < 36
    assert tight.peak_bytes is not None
    assert 0.93 * 75 * GIB < tight.peak_bytes <= 0.97 * 75 * GIB


def test_recomputation_where_nothing_is_predicted() -> None:
    config = make_config(recompute="auto")
    assert choose_stage(config, 2, None).recompute_setting == "none"
    assert choose_stage(config, 2, 0).recompute_setting == "full"
    whole = choose_stage(config, 1, 24 * GIB)
    assert (whole.fits, whole.recompute_setting) == (False, "full")


def test_auto_takes_to_host_memory_where_nothing_fits_without() -> None:
    config = make_config(recompute="auto")
    plain = choose_stage(config, 4, 30 * GIB)
    assert not plan_is_hosted(plain)
    assert not plain.fits
    hosted = choose_stage(config, 4, 30 * GIB, host_bytes=500 * GIB)
    assert hosted.fits
    assert plan_is_hosted(hosted)
    assert "fits with host memory only" in hosted.reason
    assert hosted.peak_bytes is not None
    assert hosted.peak_bytes <= 30 * GIB
    # The optimizer of 8 billion weights takes 16 bytes a weight there, and there is less.
    assert not choose_stage(config, 4, 30 * GIB, host_bytes=100 * GIB).fits
    # A stage that the user has named is kept as it is, and what fits without host memory stays without.
    assert not plan_is_hosted(choose_stage(make_config(stage=3), 4, 10 * GIB, host_bytes=500 * GIB))
    assert not plan_is_hosted(choose_stage(config, 4, 80 * GIB, host_bytes=500 * GIB))


def plan_is_hosted(choice: StageChoice) -> bool:
    return choice.offload_optimizer


def test_nothing_fits_says_so() -> None:
    choice = choose_stage(make_config(), 1, 24 * GIB)
    assert not choice.fits
    assert "none fits" in choice.reason


def test_offload_needs_a_stage_that_shards() -> None:
    assert choose_stage(make_config(offload_optimizer=True), 1, 40 * GIB).stage == 2
    assert choose_stage(make_config(offload_parameters=True), 1, 40 * GIB).stage == 3


def test_weights_that_will_go_to_the_host_need_no_room() -> None:
    config = make_config(stage=3, offload_optimizer=True)
    kept, moved = (choose_stage(config, 2, 40 * GIB, host_weights=flag).peak_bytes for flag in (False, True))
    assert kept is not None
    assert moved is not None
    assert kept - moved > 8e9  # half of the weights, 2 bytes each


def test_cpu_and_named_stages() -> None:
    assert choose_stage(make_config(), 2, None).stage == 2
    named = choose_stage(make_config(stage=1), 4, 10 * GIB)
    assert (named.stage, named.fits) == (1, False)


def test_what_cannot_be_known_takes_what_needs_least() -> None:
    config = make_config()
    elsewhere = ModelConfig(language=LanguageModelConfig(pretrained="nobody/has-this-model"))
    assert choose_stage(config, 4, 0).stage == 3
    choice = choose_stage(config.model_copy(update={"model": elsewhere}), 4, 80 * GIB)
    assert (choice.stage, choice.peak_bytes) == (3, None)
