"""What the meta trace says is kept for the backward pass, against the bytes that autograd really keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cadtrain.config.sections import LoraConfig, ModelConfig
from cadtrain.model import CadMllm, build_model, build_tokenizer
from cadtrain.model.census import take_census
from cadtrain.model.footprint import PackShape, recompute_dial, trace_footprint
from cadtrain.model.language import num_recomputed, set_recompute

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
    found = trace_footprint(build(config, "meta"), shape, recomputed=5 if recompute == "full" else 0, kernels="cpu")
    model = build(config, "cpu")
    kept = kept_bytes(model, batch)
    if recompute == "full":
        # Held as well, where autograd's hooks do not look: the rotary tables among the arguments that layers are run
        # again with.
        kept += 2 * shape.tokens * 2 * (8 if language == "qwen3" else 16)
    assert found.saved_bytes == pytest.approx(kept, rel=0.01)


def test_dropout_on_adapters_keeps_its_input_and_mask() -> None:
    config = model_config(lora=True, image=False, point=False, fields=FIELDS)
    lora = LoraConfig(rank=4, alpha=6.0, dropout=0.1)
    config = config.model_copy(update={"language": config.language.model_copy(update={"lora": lora})})
    batch = pack([sample(120, 0)], dummies=False)
    batch["target_positions"] = (batch["labels"] != -100).nonzero().squeeze(1)
    shape = PackShape(tokens=120, targets=len(batch["target_positions"]), sequences=1)
    model = build(config, "meta")
    found = trace_footprint(model, shape, kernels="cpu")
    assert found.saved_bytes == pytest.approx(kept_bytes(build(config, "cpu"), batch), rel=0.01)
    on_cuda = trace_footprint(model, shape, kernels="cuda", shares_heads=True)
    assert on_cuda.saved["LoRA"] < found.saved["LoRA"]  # a mask of one byte an element, not two


def projectors(name: str) -> bool:
    return "projector" in name


SHAPES = {
    "text": ({}, PackShape(tokens=300, targets=100, sequences=2)),
    "a large vocabulary": ({"vocab_size": 4000}, PackShape(tokens=300, targets=300, sequences=2)),
    "wide layers": ({"intermediate_size": 600}, PackShape(tokens=700, targets=20, sequences=2, views=2, clouds=2)),
    "encoders ahead of few layers": ({}, PackShape(tokens=300, targets=10, sequences=2, views=12, clouds=3)),
}


@pytest.mark.parametrize(
    ("lora", "learning"), [(False, projectors), (True, lambda name: True)], ids=["projectors learn", "LoRA"]
)
@pytest.mark.parametrize("kind", SHAPES)
def test_a_deep_stack_is_continued_exactly(kind: str, lora: bool, learning: Callable[[str], bool]) -> None:
    """To the byte, by part, whichever phase of the pass is the worst, and for every number of recomputed layers."""
    fields, shape = SHAPES[kind]
    model = build(model_config(lora=lora, fields={**FIELDS, "num_hidden_layers": 8, **fields}), "meta")
    dial = recompute_dial(model, shape, shares_heads=True, learning=learning)
    worst = set()
    for recomputed in (0, 1, 2, 5, 7, 8):
        whole = dial._trace(8, recomputed)
        assert dial.footprint(recomputed) == whole.footprint(), f"{recomputed} of 8"
        worst.add(max(whole.moments(), key=lambda moment: sum(moment[1].values()))[0])
    if kind == "encoders ahead of few layers":
        assert len(worst) > 1  # the worst moment moves as more layers are recomputed, so that no line would fit
    assert num_recomputed(model.language) == 0
    assert len(model.language.base_model.layers) == 8


def test_the_first_layers_are_the_right_ones_to_recompute() -> None:
    """Of the same number of layers, spread out or the last ones, none has a lower peak in a real trace."""
    fields = {**FIELDS, "num_hidden_layers": 6, "intermediate_size": 600}
    shape = PackShape(tokens=700, targets=20, sequences=2)
    model = build(model_config(image=False, point=False, fields=fields), "meta")
    first = trace_footprint(model, shape, recomputed=3, shares_heads=True).peak_bytes

    def peak(chosen: tuple[int, ...]) -> int:
        dial = recompute_dial(model, shape, shares_heads=True)

        def choose(language: Any, count: int) -> None:
            set_recompute(language, 6 if count else 0)
            for number, layer in enumerate(language.base_model.layers):
                layer.gradient_checkpointing = number in chosen

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("cadtrain.model.footprint.set_recompute", choose)
            return dial._trace(6, 3).footprint().peak_bytes

    assert peak((0, 1, 2)) == first
    assert peak((0, 2, 4)) >= first
    assert peak((3, 4, 5)) > first


def test_the_fewest_layers_that_fit() -> None:
    """Every smaller number is too large; where nothing fits, the one that needs least."""
    model = build(model_config(image=False, point=False, fields={**FIELDS, "num_hidden_layers": 12}), "meta")
    dial = recompute_dial(model, PackShape(tokens=300, targets=100, sequences=2), shares_heads=True)
    peaks = [dial.footprint(recomputed).peak_bytes for recomputed in range(13)]
    for limit in (peaks[0], peaks[0] - 1, peaks[5], peaks[5] - 1, peaks[12]):
        found = dial.fewest(lambda peak, limit=limit: peak <= limit)  # type: ignore[misc]
        assert peaks[found] <= limit
        assert all(peak > limit for peak in peaks[:found])
    assert peaks[dial.fewest(lambda peak: False)] == min(peaks)
    half = dial.scaled(0.5)
    assert half.footprint(3).peak_bytes == pytest.approx(peaks[3] / 2, rel=1e-4)


def test_recomputing_keeps_less_and_copied_keys_more() -> None:
    model = build(model_config(lora=True, image=False, point=False, fields=FIELDS), "meta")
    shape = PackShape(tokens=300, targets=100, sequences=2)
    kept = {
        (recomputed, shares): trace_footprint(model, shape, recomputed=recomputed, shares_heads=shares).peak_bytes
        for recomputed, shares in ((0, False), (0, True), (2, True), (5, True))
    }
    assert kept[0, False] > kept[0, True] > kept[2, True] > kept[5, True]


def test_what_does_not_learn_keeps_less() -> None:
    model = build(model_config(fields=FIELDS), "meta")
    shape = PackShape(tokens=300, targets=100, sequences=2, views=2, clouds=2)
    every = trace_footprint(model, shape)
    projectors = trace_footprint(model, shape, learning=lambda name: "projector" in name)
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
