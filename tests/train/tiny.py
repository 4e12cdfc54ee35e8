"""A tiny model, a tiny data set in memory and engines over them, for tests with real ranks."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from cadtrain.config.sections import (
    ImageEncoderConfig,
    LanguageModelConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    PointEncoderConfig,
)
from cadtrain.data.examples import ExampleBuilder, ExampleShape, count_tokens
from cadtrain.data.feed import Feed
from cadtrain.data.sample import Sample
from cadtrain.model.build import build_model, modality_tokens
from cadtrain.model.tokenizer import build_tokenizer

CONFIG_FIELDS = {
    "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
IMAGE_FIELDS = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 28, "patch_size": 14}


def model_config(*, lora: bool = False, recompute: str = "none") -> ModelConfig:
    """Everything built, everything tiny."""
    adapters = LoraConfig(rank=4, alpha=8.0) if lora else None
    return ModelConfig(
        language=LanguageModelConfig(config=CONFIG_FIELDS, tokenizer="bytes", lora=adapters),
        image=ImageEncoderConfig(config=IMAGE_FIELDS, image_size=28, trainable=True),
        point=PointEncoderConfig(num_latents=4, width=24, num_heads=2, num_layers=1, trainable=True),
        projector_width=32,
        recompute=recompute,  # type: ignore[arg-type]
    )


class MemoryParts:
    """Stands in for `PartDataset`: parts made up from their number."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.has_points = np.ones(count, dtype=bool)
        self.has_images = np.ones(count, dtype=bool)
        self.digest = "memory"
        self.manifest = SimpleNamespace(codec="compact", codec_version=1)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        draws = np.random.default_rng(index)
        points = draws.normal(size=(40, 6)).astype(np.float32)
        return Sample(f"part-{index}", f"part-{index}", self.caption(index), self.sequence(index), points, (png(index),))

    def caption(self, index: int) -> str:
        return f"a plate with {index % 5} holes" + " and a rib" * (index % 3)

    def sequence(self, index: int) -> str:
        return "L1,2;" * (1 + index % 9) + f"C{index % 256}."

    def captions(self) -> list[str]:
        return [self.caption(i) for i in range(self.count)]

    def column(self, name: str) -> list[Any]:
        return [f"part-{i}" if name == "id" else self.sequence(i) for i in range(self.count)]


def png(index: int) -> bytes:
    """A small grey PNG that depends on `index`."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (28, 28), (index * 37 % 256,) * 3).save(buffer, format="PNG")
    return buffer.getvalue()


def make_feed(config: ModelConfig, *, count: int = 24, global_batch_size: int = 8, micro_batch_tokens: int = 160, seed: int = 0) -> Feed:
    """A feed over `count` parts in memory."""
    tokenizer = build_tokenizer(config.language)
    tokens = modality_tokens(config)
    shape = ExampleShape(tokens.image_tokens_per_view, 1, 28, tokens.point_tokens, 16)
    parts = MemoryParts(count)
    lengths = count_tokens(tokenizer, "Make it.", parts.captions(), parts.column("sequence"))
    builder = ExampleBuilder(tokenizer, "Make it.", shape, seed)
    sets = ("text", "text+point", "text+image", "text+point+image")
    return Feed(
        parts, lengths, builder, global_batch_size=global_batch_size, micro_batch_tokens=micro_batch_tokens,  # type: ignore[arg-type]
        max_sample_tokens=micro_batch_tokens, modality_sets=sets,
    )  # fmt: skip


def build(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """The model on the CPU."""
    tokenizer = build_tokenizer(config.language)
    return build_model(config, tokenizer=tokenizer, codec="compact", codec_version=1, dtype=dtype, device="cpu", seed=seed)


def deepspeed_json(stage: int, *, precision: str = "fp32", offload: bool = False, clipping: float = 1.0) -> dict[str, Any]:
    """What training would write, with small buckets."""
    from cadtrain.config.deepspeed_config import build_deepspeed_config

    return build_deepspeed_config(
        zero_stage=stage, offload_optimizer=offload, offload_parameters=offload and stage == 3, precision=precision,
        gradient_clipping=clipping, hidden_size=32,
    ).to_dict()  # fmt: skip


def make_engine(
    config: ModelConfig, stage: int, *, precision: str = "fp32", offload: bool = False, clipping: float = 1.0, seed: int = 0,
    change: Callable[[Any], None] | None = None,
) -> Any:  # fmt: skip
    """An engine in this rank over a model that `change` has had first; joins the process group."""
    from cadtrain.train.engine import DeepSpeedEngine, init_process_group

    device = init_process_group()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = build(config, dtype, seed)
    if change is not None:
        change(model)
    json = deepspeed_json(stage, precision=precision, offload=offload, clipping=clipping)
    optim = OptimConfig(gradient_clipping=clipping)
    return DeepSpeedEngine(model, config=json, optim=optim, device=device)
