"""Predictions against what was measured (docs/measurements.md) and against arithmetic that can be done by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cadtrain.cli.app import app
from cadtrain.config.recompute import recomputed_layers
from cadtrain.config.sections import LanguageModelConfig, ModelConfig, RunConfig
from cadtrain.errors import ConfigError
from cadtrain.plan.memory import Choice, host_bytes, rank_memory
from cadtrain.plan.predict import ALIKE, DIAL_MARGIN, ModelFacts, model_facts, predict, price, recompute_that_fits
from cadtrain.plan.rates import find_gpu, gpu_named
from cadtrain.units import parse_bytes

GIB = 2**30


def lora8b(tokens: int, recompute: str = "none", kernels: str = "auto") -> RunConfig:
    """The run of docs/measurements.md with packs of `tokens` tokens."""
    shapes = {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 40960, "tie_word_embeddings": False,
    }  # fmt: skip
    dinov2 = {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    }
    return RunConfig.model_validate(
        {
            "model": {
                "language": {"tokenizer": "bytes", "config": shapes, "lora": {"rank": 32, "alpha": 64}},
                "image": {"image_size": 224, "config": dinov2},
                "point": {},
                "recompute": recompute,
                "kernels": kernels,
            },
            "data": {"max_sample_tokens": 2048},
            "curriculum": [{"name": "text", "duration": "20 steps", "modalities": {"text": 1.0}}],
            "batch": {"global_batch_size": 46, "micro_batch_tokens": tokens},
        }
    )


@cache
def measured_model() -> ModelFacts:
    """7,480 tokens a pack, without fused kernels, and with keys and values copied for every query head: as it was measured."""
    return model_facts(lora8b(7480, kernels="plain"), shares_heads=False)


@pytest.mark.parametrize(("stage", "peak_gib", "tokens_per_second"), [(2, 71.3, 10_636), (3, 65.9, 8_609)])
def test_measured_peak_and_speed_of_8b_with_lora(stage: Any, peak_gib: float, tokens_per_second: int) -> None:
    found = price(lora8b(7480), measured_model(), Choice(stage), 2, 141 * 10**9, gpu_named("H200"))
    assert found.memory.allocated / GIB == pytest.approx(peak_gib, rel=0.03)
    assert found.tokens_per_second == pytest.approx(tokens_per_second, rel=0.03)


def test_census_of_the_measured_model() -> None:
    census = measured_model().census
    assert census.lora == 87_293_952
    assert census.components["language"].frozen == 8_190_735_360
    assert census.trainable == census.lora + sum(
        census.components[name].trainable for name in ("image_projector", "point_projector")
    )


class FakeCensus:
    """1000 weights, 400 of which learn."""

    total, trainable, buffer_bytes = 1000, 400, 0
    decoder_layer, head, small, lora = 100, 150, (10, 20), 0


ZERO = {
    "reduce_bucket_size": 50, "overlap_comm": True, "stage3_prefetch_bucket_size": 80, "stage3_max_live_parameters": 10**9,
    "stage3_param_persistence_threshold": 15, "stage3_model_persistence_threshold": 10**9,
}  # fmt: skip


@pytest.mark.parametrize(
    ("choice", "weights", "gradients", "optimizer", "buckets", "gathered"),
    [
        (Choice(0), 2000, 1600, 4800, 0, 0),
        (Choice(1), 2000, 2400, 1200, 0, 0),
        # Two buckets, and room for the largest gradient.
        (Choice(1, offload_optimizer=True), 2000, 2400, 0, 400 + 300, 0),
        (Choice(2), 2000, 400, 1200, 200, 0),
        (Choice(2, offload_optimizer=True), 2000, 0, 0, 200 + 300, 0),
        # 10 small ones, the head, 80 and two layers ahead, and a copy of the head.
        (Choice(3), 500, 400, 1200, 100, 2 * (10 + 150 + 80 + 200 + 150)),
        (Choice(3, offload_optimizer=True, offload_parameters=True), 0, 0, 0, 100, 2 * (10 + 150 + 80 + 200 + 150)),
    ],
    ids=lambda value: value.describe() if isinstance(value, Choice) else None,
)
def test_one_rank_of_four(
    choice: Choice, weights: int, gradients: int, optimizer: int, buckets: int, gathered: int
) -> None:
    census: Any = FakeCensus()
    memory = rank_memory(census, choice, 4, activations=5000, zero=ZERO, element_bytes=2)
    found = (memory.weights, memory.gradients, memory.optimizer, memory.buckets, memory.gathered)
    assert found == (weights, gradients, optimizer, buckets, gathered)
    assert memory.allocated == sum(found) + 5000
    host = host_bytes(census, choice, 4, element_bytes=2)
    assert host.get("optimizer and gradients", 0) == (6400 if choice.offload_optimizer else 0)
    assert host.get("weights", 0) == (2000 if choice.offload_parameters else 0)


@pytest.mark.parametrize(("stage", "saved"), [(0, True), (2, True), (3, False)])
def test_encoders_whose_features_are_read_take_no_gpu_memory_where_they_rest(stage: Any, saved: bool) -> None:
    config, facts = lora8b(7480), measured_model()
    reads = config.model_copy(update={"data": config.data.model_copy(update={"features": "features"})})
    found = [price(run, facts, Choice(stage), 2, 141 * 10**9, gpu_named("H200")).memory for run in (config, reads)]
    components = facts.census.components
    encoders = components["image_encoder"].frozen + components["point_encoder"].frozen
    assert encoders > 350_000_000
    assert found[0].weights - found[1].weights == 2 * encoders * saved


@pytest.mark.parametrize(
    ("choice", "gradients", "buckets", "gathered"),
    [
        (Choice(0), 2400, 0, 0),  # the last pack's own gradients
        (Choice(1), 2400, 6 * 400, 0),  # flat copies in fp32 and bf16
        (Choice(2), 400, 200 + 8 * 150, 0),  # the embedding's gradient, flat, and in fp32
        (Choice(2, offload_optimizer=True), 0, 500 + 4 * 150, 0),
        (Choice(3), 400 + 4 * 60, 100, 2 * 10),  # a sub-group's gradients in fp32
    ],
    ids=lambda value: value.describe() if isinstance(value, Choice) else None,
)
def test_with_few_activations_another_moment_is_the_worst(
    choice: Choice, gradients: int, buckets: int, gathered: int
) -> None:
    census: Any = FakeCensus()
    zero = {**ZERO, "sub_group_size": 60, "stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 0}
    census.head = census.decoder_layer = 150 if choice.stage < 3 else 20
    memory = rank_memory(census, choice, 4, activations=1, zero=zero, element_bytes=2)
    assert (memory.gradients, memory.buckets, memory.gathered, memory.activations) == (gradients, buckets, gathered, 0)


def test_the_last_layers_stay_whole_until_the_backward_pass() -> None:
    census: Any = FakeCensus()
    zero = {**ZERO, "stage3_max_reuse_distance": 450, "stage3_max_live_parameters": 320}
    memory = rank_memory(census, Choice(3), 4, activations=5000, zero=zero, element_bytes=2)
    # 10 small ones; the head, and layers of 150 whose way to the loss and back is shorter than 450; what may be live besides; a copy.
    assert memory.gathered == 2 * (10 + max(150 + 150, 320) + 150)


def test_the_fastest_that_fits_is_marked_and_the_next_is_helped() -> None:
    plan = predict(lora8b(8192), 2, 40 * 10**9, gpu_named("H200"))
    assert plan.best is not None
    assert plan.best.choice.stage == 0
    assert 0 < plan.best.choice.recompute.in_stage(0) < 36
    assert plan.best.choice.describe() == f"ZeRO-0, recompute {plan.best.choice.recompute.in_stage(0)} of 36 layers"
    assert all(option.tokens_per_second < ALIKE * plan.best.tokens_per_second for option in plan.options if option.fits)
    tokens = int(plan.advice.split("micro_batch_tokens=")[1].rstrip("."))
    helped = predict(lora8b(tokens), 2, 40 * 10**9, gpu_named("H200"))
    assert helped.best is not None
    assert helped.best.choice.recompute.setting() == "none"


def test_a_curriculum_that_cannot_be_trained_is_not_priced() -> None:
    stage = {"name": "text", "duration": "20 steps", "modalities": {"text": 1.0}, "warmup": "9 epochs"}
    run = RunConfig.model_validate({**lora8b(8192).model_dump(mode="json"), "curriculum": [stage]})
    with pytest.raises(ConfigError, match="9 epochs is longer than stage 'text', whose duration is 20 steps"):
        predict(run, 2, 40 * 10**9, None)


def test_nothing_fits() -> None:
    plan = predict(lora8b(8192), 1, 8 * 10**9, None)
    assert plan.best is None
    assert "lacks" in plan.advice


def test_names_and_sizes() -> None:
    assert [getattr(find_gpu(name), "name", None) for name in ("NVIDIA L40S", "NVIDIA L40", "Tesla T4")] == [
        "L40S",
        "L40",
        None,
    ]
    assert (parse_bytes("48GB"), parse_bytes("1.5 gib")) == (48 * 10**9, 3 * 2**29)
    for wrong in ("48", "GB", "0GB", "-1GB"):
        with pytest.raises(ValueError, match="48GB"):
            parse_bytes(wrong, needs_unit=True)


def test_command_fits_into_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(app, ["plan", "demo", "--gpus", "2", "--gpu", "L40"])
    assert result.exit_code == 0, result.output
    assert "fastest" in result.stdout
    assert max(len(line) for line in result.stdout.splitlines()) <= 80


def test_a_curriculum_of_three_stages_has_its_dial_for_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stages with more modalities need more layers; the table still fits, and says which stage has which number."""
    stages = [
        {"name": "text", "duration": "20 steps", "modalities": {"text": 1.0}},
        {"name": "text_point", "duration": "20 steps", "modalities": {"text+point": 1.0}},
        {"name": "all", "duration": "20 steps", "modalities": {"text+point+image": 1.0}},
    ]
    config = lora8b(8192).model_dump(mode="json", exclude_none=True)
    config |= {"curriculum": stages, "model": {**config["model"], "point": {"trainable": True}, "recompute": "auto"}}
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(config))
    arguments = ["plan", str(path), "--gpus", "2", "--gpu", "L40", "--zero", "2"]
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    layers = found["options"][found["fastest"]]["recompute_layers"]
    assert list(layers) == ["text", "text_point", "all"]
    assert 0 < layers["text"] < 36
    assert len(set(layers.values())) > 1
    monkeypatch.setenv("COLUMNS", "80")
    text = CliRunner().invoke(app, arguments).stdout
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "/".join(map(str, layers.values())) + " of 36" in text
    named = ", ".join(f"{name} {count}" for name, count in layers.items())
    assert f"Recomputed layers of 36, by stage: {named}." in " ".join(text.split())


@pytest.mark.parametrize("memory", [36, 48, 64, 80, 100])
def test_no_memory_is_idle_and_none_overflows(memory: int) -> None:
    """One layer less would not fit into what is to be used, and what is taken does."""
    config, model, choice, limit = lora8b(7480), measured_model(), Choice(2), memory * 10**9

    def total(layers: int) -> int:
        chosen = replace(choice, recompute=model.everywhere(layers))
        return price(config, model, chosen, 2, limit, gpu_named("H200")).memory.total

    layers = recompute_that_fits(config, model, choice, 2, limit).in_stage(0)
    used = limit * (1 - DIAL_MARGIN)
    assert total(layers) <= used
    assert layers == 0 or total(layers - 1) > used
    assert (memory == 100) == (layers == 0)


def test_a_layer_costs_the_same_whichever_it_is() -> None:
    config, model = lora8b(7480), measured_model()
    choices = [Choice(2, recompute=model.everywhere(layers)) for layers in (0, 12, 24, 36)]
    seconds = [1 / price(config, model, c, 2, 10**12, gpu_named("H200")).tokens_per_second for c in choices]
    steps = [later - earlier for earlier, later in pairwise(seconds)]
    assert steps == pytest.approx([steps[0]] * 3)
    assert 1.25 < seconds[3] / seconds[0] < 1.5


def test_the_configured_number_of_layers_stands_in_the_table() -> None:
    plan = predict(lora8b(8192, 7), 2, 141 * 10**9, gpu_named("H200"))  # type: ignore[arg-type]
    assert (7,) in {option.choice.recompute.layers for option in plan.options}
    with pytest.raises(ConfigError, match="found 37, but the language model has 36 decoder layers"):
        recomputed_layers(ModelConfig(language=LanguageModelConfig(pretrained="elsewhere"), recompute=37), 1, 36)


def test_command_as_json() -> None:
    result = CliRunner().invoke(app, ["plan", "--gpus", "2", "--gpu-memory", "48GB", "--zero", "3", "--json"])
    found = json.loads(result.stdout)
    assert {option["zero_stage"] for option in found["options"]} == {3}
    assert found["options"][found["fastest"]]["fits"]
    for option in found["options"]:
        parts = option["gpu_bytes"]
        assert parts["total"] == sum(count for name, count in parts.items() if name not in ("allocated", "total"))


@pytest.mark.parametrize(
    ("options", "place"), [(["--gpu-memory", "48"], "48GB"), (["--gpu", "TPU"], "H100"), ([], "--gpu")]
)
def test_what_is_not_known_is_asked_for(options: list[str], place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cadtrain.launch.devices._gpus_from_nvml", lambda: ())
    result = CliRunner().invoke(app, ["plan", *options])
    assert result.exit_code == 2 or result.exception is not None
    assert place in result.output + str(result.exception)
