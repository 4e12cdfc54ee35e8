"""Builds the model of a run.

Legend: none; tensors are handled by their modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from cadtrain.cad.codec import added_vocabulary
from cadtrain.config.recompute import recomputed_layers
from cadtrain.config.sections import LanguageModelConfig, ModelConfig
from cadtrain.model.cad_mllm import CadMllm, CadMllmConfig, Parts
from cadtrain.model.encoders.pretrained import (
    build_image_encoder,
    build_point_encoder,
    dinov2_config,
    point_arguments,
)
from cadtrain.model.kernels import fuse
from cadtrain.model.language import (
    add_lora,
    build_language_model,
    language_config,
    load_language_model,
    set_recompute,
)
from cadtrain.model.lora import add_in_place
from cadtrain.model.loss import prepare_head
from cadtrain.model.pretrained import fill_from_files
from cadtrain.model.tokenizer import first_added_id, knows_vocabulary
from cadtrain.model.vocabulary import add_rows, start_new_rows
from cadtrain.model.weights import Sharding, WholeWeights, building, initialize_weights, restore_rotary


@dataclass(frozen=True, slots=True)
class ModalityTokens:
    """How many tokens of a pack one view and one point cloud take; 0 where the model has no such encoder."""

    image_tokens_per_view: int
    point_tokens: int


def modality_tokens(config: ModelConfig) -> ModalityTokens:
    """The token counts of `config`'s encoders; reads at most a `config.json` and makes no weights."""
    image = 0 if config.image is None else (config.image.image_size // int(dinov2_config(config.image).patch_size)) ** 2
    return ModalityTokens(image, 0 if config.point is None else config.point.num_latents)


def build_model(
    config: ModelConfig,
    *,
    tokenizer: PreTrainedTokenizerBase,
    codec: str,
    codec_version: int | str,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
    sharding: Sharding | None = None,
) -> CadMllm:
    """The model of `config`, in train mode, with `dtype` weights on `device`.

    `tokenizer` is the one that `build_tokenizer` gives for the codec's `added_vocabulary`; the embeddings have their full
    size from the start, so they are never resized after they were shared out. Raises UsageError where a word is missing.
    Fresh weights depend on `seed` and their own name only (and on the kind of device that draws them). Under
    `torch.device("meta")` the model has shapes and no values, and nothing but `config.json` files is read. `sharding`
    shares out the language model's weights while they are made and read; encoders, projectors and adapters are whole.
    """
    sharding = sharding or WholeWeights()
    words = added_vocabulary(codec)
    first = first_added_id(tokenizer, words) if words else None
    language = language_config(config.language, tokenizer, words)
    with building(dtype, device):
        target = torch.get_default_device()
        model, loaded = _assemble(config, language, codec, codec_version, dtype, target, sharding)
        if first is not None and target.type != "meta" and _is_new_to(config.language, words):
            start_new_rows(model.language, first, seed=seed, sharding=sharding)
        if config.language.lora is not None:
            add_lora(model.language, config.language.lora)
            if first is not None:
                add_rows(model.language, first)
        initialize_weights(model, seed=seed, sharding=sharding, loaded=loaded)
        restore_rotary(model)
    if config.kernels == "auto":
        fuse(model.language)
        add_in_place(model.language.base_model.layers)
        prepare_head(model.language.get_output_embeddings())
    set_recompute(model.language, recomputed_layers(config, 1, len(model.language.base_model.layers))[0])
    return model.train()


def build_encoders(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
) -> CadMllm:
    """The model of `config` with the encoders and projectors that `build_model` would give it, and a language model of shapes only.

    Of the language model nothing but its `config.json` is read. In train mode; frozen encoders are in eval mode.
    """
    language = language_config(config.language, None)
    with building(dtype, device):
        target = torch.get_default_device()
        meta = torch.device("meta")
        model, loaded = _assemble(config, language, "compact", 1, dtype, target, WholeWeights(), language_device=meta)
        initialize_weights(model, seed=seed, sharding=WholeWeights(), loaded=loaded)
    return model.train()


def _is_new_to(section: LanguageModelConfig, words: Sequence[str]) -> bool:
    """Whether the model of `section` has pretrained weights that never met `words`."""
    return section.pretrained is not None and not knows_vocabulary(section.pretrained, words)


def _assemble(
    config: ModelConfig,
    language: PreTrainedConfig,
    codec: str,
    codec_version: int | str,
    dtype: torch.dtype,
    device: torch.device,
    sharding: Sharding,
    language_device: torch.device | None = None,
) -> tuple[CadMllm, list[str]]:
    """The model without adapters, and the names of the submodules that hold pretrained weights already.

    `language_device`, where it is not `device`, is that of the language model.
    """
    loaded = []
    with no_init_weights():
        with language_device or nullcontext():
            language_model = _language_model(config.language, language, dtype, language_device or device, sharding)
        parts = Parts(
            language=language_model,
            image_encoder=None
            if config.image is None
            else build_image_encoder(config.image, dtype=dtype, device=device),
            point_encoder=None if config.point is None else build_point_encoder(config.point),
        )
        whole = CadMllm(_record(config, parts, codec, codec_version, dtype), parts)
    for name, section in (
        ("language", config.language),
        ("image_encoder", config.image),
        ("point_encoder", config.point),
    ):
        if section is not None and section.pretrained is not None:
            loaded.append(name)
    return whole, loaded


def _language_model(
    section: LanguageModelConfig, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, sharding: Sharding
) -> PreTrainedModel:
    reads = section.pretrained is not None and device.type != "meta"
    if reads and isinstance(sharding, WholeWeights):
        return load_language_model(str(section.pretrained), config, dtype=dtype, device=device)
    with sharding.construct():
        model = build_language_model(config, dtype=dtype)
    if reads:
        fill_from_files(model, str(section.pretrained), sharding)
    return model


def _record(
    config: ModelConfig, parts: Parts, codec: str, codec_version: int | str, dtype: torch.dtype
) -> CadMllmConfig:
    """What the model is, so that it can be built again without the run's configuration or any pretrained folder."""
    image = None
    if parts.image_encoder is not None:
        encoder = parts.image_encoder
        image = {
            "config": encoder.model.config.to_dict(),
            "image_size": encoder.image_size,
            "trainable": encoder.trainable,
        }
    return CadMllmConfig(
        language=parts.language.config.to_dict(),
        image=image,
        point=None if config.point is None else point_arguments(config.point),
        projector_width=config.projector_width,
        codec=codec,
        codec_version=codec_version,
        dtype=dtype,
    )
