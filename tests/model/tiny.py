"""Tiny models and packs, built from local configurations."""

from __future__ import annotations

from typing import Any

import torch

from cadtrain.config.sections import (
    ImageEncoderConfig,
    LanguageModelConfig,
    LoraConfig,
    ModelConfig,
    PointEncoderConfig,
)
from cadtrain.model import CadMllm, build_model, build_tokenizer

WIDTH = 32

LANGUAGES: dict[str, dict[str, Any]] = {
    "qwen3": {
        "model_type": "qwen3",
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.2,
    },
    "llama": {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "initializer_range": 0.2,
    },
}


def model_config(
    language: str = "qwen3", *, lora: bool = False, image: bool = True, point: bool = True, **options: Any
) -> ModelConfig:
    """A model of about 60,000 weights with 4 tokens a view and 3 a cloud."""
    fields = {**LANGUAGES[language], **options.pop("fields", {})}
    trainable = options.pop("trainable", False)
    dinov2 = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes = {"num_latents": 3, "width": 16, "num_heads": 2, "num_layers": 1}
    return ModelConfig(
        language=LanguageModelConfig(config=fields, lora=LoraConfig(rank=4, alpha=6.0) if lora else None),
        image=ImageEncoderConfig(image_size=28, config=dinov2, trainable=trainable) if image else None,
        point=PointEncoderConfig(**sizes, trainable=trainable) if point else None,
        projector_width=24,
        **{"recompute": "none", **options},
    )


def make_model(config: ModelConfig | None = None, *, seed: int = 0, stir: bool = False) -> CadMllm:
    """The model of `config` in fp32; `stir` moves adapters away from their start, where their product is zero."""
    config = config or model_config()
    model = build_model(
        config,
        tokenizer=build_tokenizer(config.language),
        codec="compact",
        codec_version=1,
        dtype=torch.float32,
        device="cpu",
        seed=seed,
    )
    if stir:
        generator = torch.Generator().manual_seed(7)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.3, generator=generator)
    return model


def sample(length: int, seed: int, *, image: bool = False, point: bool = False) -> dict[str, Any]:
    """One sequence of `length` tokens, its views' and cloud's placeholders first; the second half are targets."""
    generator = torch.Generator().manual_seed(seed)
    placeholders = 4 * image + 3 * point
    labels = torch.randint(0, 256, (length,), generator=generator)
    labels[: max(placeholders, length // 2)] = -100
    return {
        "input_ids": torch.randint(0, 256, (length,), generator=generator),
        "labels": labels,
        "pixel_values": torch.rand(1, 3, 28, 28, generator=generator) if image else None,
        "points": torch.randn(1, 20, 6, generator=generator) if point else None,
    }


def pack(samples: list[dict[str, Any]], *, dummies: bool = True) -> dict[str, Any]:
    """The forward arguments of one pack; a modality that no sample has is given one dummy input, or none."""
    lengths = [len(item["input_ids"]) for item in samples]
    starts = [sum(lengths[:index]) for index in range(len(samples))]
    batch: dict[str, Any] = {
        "input_ids": torch.cat([item["input_ids"] for item in samples]),
        "labels": torch.cat([item["labels"] for item in samples]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]),
        "cu_seqlens": torch.tensor([*starts, sum(lengths)], dtype=torch.int32),
        "max_seqlen": max(lengths),
    }
    kinds = (
        ("pixel_values", "image_positions", 4, torch.full((1, 3, 28, 28), 0.5)),
        ("points", "point_positions", 3, torch.zeros(1, 20, 6)),
    )
    for inputs, positions, tokens, dummy in kinds:
        held = [(start, item) for start, item in zip(starts, samples, strict=True) if item[inputs] is not None]
        # Point tokens stand behind image tokens.
        offset = {id(item): 4 if inputs == "points" and item["pixel_values"] is not None else 0 for _, item in held}
        if held or dummies:
            batch[inputs] = torch.cat([item[inputs] for _, item in held]) if held else dummy
            places = [torch.arange(tokens) + start + offset[id(item)] for start, item in held]
            batch[positions] = torch.cat(places) if places else torch.empty(0, dtype=torch.long)
    return batch


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of a model's gradients by name; a parameter without one is left out."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float) -> None:
    """Every gradient of `found` differs from the expected one by at most `relative` of that one's norm."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        distance, size = (found[name] - gradient).norm().item(), gradient.norm().item()
        assert distance <= relative * size + 1e-7, f"{name}: {distance} apart, size {size}"
