"""Exported folders open with equal logits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoTokenizer

from cadtrain.config.sections import ModelConfig
from cadtrain.convert.model_folder import export_model, merge_lora, write_folder
from cadtrain.errors import CheckpointError, UsageError
from cadtrain.model import CadMllm
from cadtrain.model.tokenizer import byte_tokenizer
from tests.model.tiny import make_model, model_config, pack, sample

SAMPLES = [sample(12, 1), sample(20, 4, image=True, point=True)]


def _logits(model: CadMllm) -> torch.Tensor:
    batch = pack(SAMPLES)
    del batch["labels"]
    with torch.no_grad():
        return model.eval()(**batch).logits


def _export(config: ModelConfig, folder: Path, **options: Any) -> CadMllm:
    model = make_model(config, stir=True)
    export_model(model, folder, tokenizer=byte_tokenizer(), **options)
    return model


@pytest.mark.parametrize("language", ["qwen3", "llama"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_opens_with_equal_logits(tmp_path: Path, language: str, lora: bool, tied: bool) -> None:
    config = model_config(language, lora=lora, fields={"tie_word_embeddings": tied})
    model = _export(config, tmp_path / "out")
    opened = CadMllm.from_pretrained(tmp_path / "out")
    expected = _logits(model)
    torch.testing.assert_close(_logits(opened), expected, rtol=1e-4, atol=1e-4 if lora else 0)
    head, embedding = opened.language.lm_head.weight, opened.language.model.embed_tokens.weight
    assert (head is embedding) == tied
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert ("language.lm_head.weight" in names) == (not tied)
    assert not [name for name in names if "lora_" in name or "base_layer" in name]


def test_auto_classes_open_it(tmp_path: Path) -> None:
    model = _export(model_config(trainable=True), tmp_path / "out")
    opened = AutoModel.from_pretrained(tmp_path / "out")
    assert isinstance(opened, CadMllm)
    assert torch.equal(_logits(opened), _logits(model))
    assert opened.config.codec == "compact"
    assert opened.config.codec_version == 1
    assert list(AutoTokenizer.from_pretrained(tmp_path / "out")("ab").input_ids) == [97, 98]
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert described["architectures"] == ["CadMllm"]
    assert described["dtype"] == "float32"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 257


def test_shards_and_their_index(tmp_path: Path) -> None:
    model = _export(model_config(), tmp_path / "out", max_shard_bytes=60_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files == sorted(set(index["weight_map"].values()))
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    assert all((tmp_path / "out" / name).stat().st_size < 80_000 for name in files)
    assert torch.equal(_logits(CadMllm.from_pretrained(tmp_path / "out")), _logits(model))


def test_a_cast_export_is_described_as_such(tmp_path: Path) -> None:
    model = make_model()
    write_folder(
        tmp_path / "out",
        config=model.config,
        weights=model.state_dict(),
        tokenizer=byte_tokenizer(),
        dtype=torch.bfloat16,
    )
    opened = CadMllm.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in opened.parameters()} == {torch.bfloat16}
    assert opened.language.model.rotary_emb.inv_freq.dtype == torch.float32
    torch.testing.assert_close(_logits(opened).float(), _logits(model), rtol=0.1, atol=0.3)


def test_a_swiglu_image_encoder_survives(tmp_path: Path) -> None:
    config = model_config()
    image = config.image.model_copy(update={"config": {**config.image.config, "use_swiglu_ffn": True}})
    model = _export(config.model_copy(update={"image": image}), tmp_path / "out")
    assert torch.equal(_logits(CadMllm.from_pretrained(tmp_path / "out")), _logits(model))


class Lazy(Mapping[str, torch.Tensor]):
    """Counts how often each tensor is read."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.reads: dict[str, int] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        self.reads[name] = self.reads.get(name, 0) + 1
        return self.tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def test_merging_reads_each_tensor_once() -> None:
    model = make_model(model_config(lora=True), stir=True)
    lazy = Lazy(model.state_dict())
    merged = dict(merge_lora(lazy, alpha=6.0, rank=4))
    assert set(lazy.reads.values()) == {1}
    assert lazy.reads.keys() == set(lazy)
    assert merged.keys() == make_model().state_dict().keys()
    name = "language.model.layers.1.mlp.down_proj"
    down, up = (lazy.tensors[f"{name}.lora_{half}.default.weight"] for half in "AB")
    expected = lazy.tensors[f"{name}.base_layer.weight"] + (up @ down) * 1.5
    torch.testing.assert_close(merged[f"{name}.weight"], expected)


def test_merging_sums_in_fp32() -> None:
    base, down, up = torch.full((2, 2), 1.0), torch.full((1, 2), 0.01), torch.full((2, 1), 0.5)
    weights = {"l.base_layer.weight": base, "l.lora_A.default.weight": down, "l.lora_B.default.weight": up}
    half = {name: tensor.bfloat16() for name, tensor in weights.items()}
    merged = dict(merge_lora(half, alpha=2.0, rank=1))["l.weight"]
    assert merged.dtype == torch.bfloat16
    exact = (
        half["l.base_layer.weight"].float()
        + 2 * half["l.lora_B.default.weight"].float() @ half["l.lora_A.default.weight"].float()
    )
    assert torch.equal(merged, exact.bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"l.lora_B.default.weight": None}, "only one of its two halves"),
        ({"m.lora_A.default.weight": torch.zeros(1, 2)}, "fit no layer, the first is m.lora_A"),
        ({"e.lora_embedding_A.default": torch.zeros(1, 2)}, "fit no layer, the first is e.lora_embedding_A"),
        (
            {"l.lora_A.default.weight": torch.zeros(3, 2), "l.lora_B.default.weight": torch.zeros(2, 3)},
            "has rank 3, but 1",
        ),
    ],
)
def test_adapters_that_cannot_be_merged_are_named(change: dict[str, torch.Tensor | None], message: str) -> None:
    weights = {
        "l.base_layer.weight": torch.zeros(2, 2),
        "l.lora_A.default.weight": torch.zeros(1, 2),
        "l.lora_B.default.weight": torch.zeros(2, 1),
    }
    changed = {name: tensor for name, tensor in {**weights, **change}.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        dict(merge_lora(changed, alpha=1.0, rank=1))


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape", "unmerged"])
def test_a_faulty_set_of_weights_leaves_nothing_behind(tmp_path: Path, fault: str) -> None:
    model = make_model(model_config(lora=fault == "unmerged"))
    weights = dict(model.state_dict())
    if fault == "missing":
        del weights["point_encoder.query"]
    elif fault == "unexpected":
        weights["head.weight"] = torch.zeros(1)
    elif fault == "shape":
        weights["point_encoder.query"] = torch.zeros(1, 16)
    message = {
        "missing": "the first is point_encoder.query",
        "unexpected": "no weight called head.weight",
        "shape": r"point_encoder.query has shape \[1, 16\], the model wants \[3, 16\]",
        "unmerged": "adapters must be merged",
    }[fault]
    with pytest.raises(CheckpointError, match=message):
        write_folder(tmp_path / "out", config=model.config, weights=weights, tokenizer=byte_tokenizer())
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists already"):
        _export(model_config(), tmp_path)
