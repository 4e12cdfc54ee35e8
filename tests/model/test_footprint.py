"""What the meta trace says is kept for the backward pass, against the bytes that autograd really keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cadtrain.config.sections import LoraConfig, ModelConfig
from cadtrain.model import CadMllm, build_model, build_tokenizer
from cadtrain.model.census import take_census
from cadtrain.model.footprint import PackShape, trace_footprint

from .tiny import model_config, pack, sample

FIELDS = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 5, "vocab_size": 512}


def build(config: ModelConfig, device: str) -> CadMllm:
    return build_model(
        config, tokenizer=build_tokenizer(config.language), codec="compact", codec_version=1, dtype=torch.bfloat16,
        device=device, seed=0,
    )  # fmt: skip


def kept_bytes(model: CadMllm, batch: dict[str, Any]) -> int:
    """Bytes of the distinct storages that autograd keeps, the weights' own left out."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    given = {value.untyped_storage().data_ptr() for value in batch.values() if isinstance(value, torch.Tensor)}
    kept: dict[int, torch.Tensor] = {}  # holds the tensors, so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own and address not in given:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(**batch)
    assert output.loss_sum is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(
    ("language", "lengths"),
    [("qwen3", (190, 64)), ("llama", (96,)), pytest.param("qwen3", (33, 40, 500), marks=pytest.mark.slow)],
)
def test_saved_bytes_are_what_autograd_keeps(
    language: str, lengths: tuple[int, ...], recompute: str, lora: bool
) -> None:
    config = model_config(language, lora=lora, fields=FIELDS, recompute=recompute)
    batch = pack([sample(length, seed, image=True, point=True) for seed, length in enumerate(lengths)])
    batch["target_positions"] = (batch["labels"] != -100).nonzero().squeeze(1)
    shape = PackShape(
        tokens=sum(lengths), targets=len(batch["target_positions"]), sequences=len(lengths), views=len(lengths),
        clouds=len(lengths), points=20,
    )  # fmt: skip
    found = trace_footprint(build(config, "meta"), shape, recompute=recompute == "full", kernels="cpu")
    model = build(config, "cpu")
    kept = kept_bytes(model, batch)
    if recompute == "full":
        # Held as well, where autograd's hooks do not look: the rotary tables among the arguments that layers are run
        # again with, and under adapters the embeddings, a leaf that takes a gradient so that layers are run again at all.
        head = 8 if language == "qwen3" else 16
        kept += 2 * shape.tokens * (2 * head + (FIELDS["hidden_size"] if lora else 0))
    assert found.saved_bytes == pytest.approx(kept, rel=0.01)


def test_dropout_on_adapters_keeps_its_input_and_mask() -> None:
    config = model_config(lora=True, image=False, point=False, fields=FIELDS)
    lora = LoraConfig(rank=4, alpha=6.0, dropout=0.1)
    config = config.model_copy(update={"language": config.language.model_copy(update={"lora": lora})})
    batch = pack([sample(120, 0)], dummies=False)
    batch["target_positions"] = (batch["labels"] != -100).nonzero().squeeze(1)
    shape = PackShape(tokens=120, targets=len(batch["target_positions"]), sequences=1)
    model = build(config, "meta")
    found = trace_footprint(model, shape, recompute=False, kernels="cpu")
    assert found.saved_bytes == pytest.approx(kept_bytes(build(config, "cpu"), batch), rel=0.01)
    on_cuda = trace_footprint(model, shape, recompute=False, kernels="cuda", shares_heads=True)
    assert on_cuda.saved["LoRA"] < found.saved["LoRA"]  # a mask of one byte an element, not two


def test_a_deep_stack_is_continued_exactly() -> None:
    model = build(model_config(lora=True, image=False, point=False, fields=FIELDS), "meta")
    shape = PackShape(tokens=300, targets=100, sequences=2)
    continued = trace_footprint(model, shape, recompute=False, shares_heads=True)
    layers = model.language.base_model.layers
    model.language.base_model.layers = layers[:4]
    four = trace_footprint(model, shape, recompute=False, shares_heads=True)
    model.language.base_model.layers = layers[:3]
    three = trace_footprint(model, shape, recompute=False, shares_heads=True)
    assert continued.saved_bytes == four.saved_bytes + (four.saved_bytes - three.saved_bytes)
    assert continued.peak_bytes > continued.saved_bytes > four.saved_bytes


def test_recomputing_keeps_less_and_copied_keys_more() -> None:
    model = build(model_config(lora=True, image=False, point=False, fields=FIELDS), "meta")
    shape = PackShape(tokens=300, targets=100, sequences=2)
    kept = {
        (recompute, shares): trace_footprint(model, shape, recompute=recompute, shares_heads=shares).peak_bytes
        for recompute, shares in ((False, False), (False, True), (True, True))
    }
    assert kept[False, False] > kept[False, True] > kept[True, True]


def test_what_does_not_learn_keeps_less() -> None:
    model = build(model_config(fields=FIELDS), "meta")
    shape = PackShape(tokens=300, targets=100, sequences=2, views=2, clouds=2)
    every = trace_footprint(model, shape, recompute=False)
    projectors = trace_footprint(model, shape, recompute=False, learning=lambda name: "projector" in name)
    assert projectors.saved_bytes < every.saved_bytes
    assert all(parameter.requires_grad == ("encoder" not in name) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_census_of_shapes_is_the_built_model_s(lora: bool, tied: bool) -> None:
    config = model_config(lora=lora, fields={**FIELDS, "tie_word_embeddings": tied})
    expected, built = take_census(build(config, "meta")), build(config, "cpu")
    assert sum(row.total for row in expected.components.values()) == sum(p.numel() for p in built.parameters())
    assert expected.trainable == sum(p.numel() for p in built.parameters() if p.requires_grad)
    assert expected.lora == sum(p.numel() for name, p in built.named_parameters() if "lora_" in name)
    assert expected.tied == (FIELDS["vocab_size"] * FIELDS["hidden_size"] if tied else 0)
    assert expected.decoder_layer == sum(p.numel() for p in built.language.base_model.layers[0].parameters())
    assert take_census(built) == expected
