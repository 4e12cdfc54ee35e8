"""What stands beside weights so that another program can use them: the model's description, its tokenizer, how inputs are made."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from cadtrain.cad.codec import added_vocabulary, get_codec
from cadtrain.config.sections import RunConfig
from cadtrain.model.build import build_model, modality_tokens
from cadtrain.model.cad_mllm import CadMllmConfig
from cadtrain.model.encoders.image import MEAN, STD
from cadtrain.model.tokenizer import build_tokenizer


def run_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the run, with the codec's words."""
    return build_tokenizer(config.model.language, added_vocabulary(config.data.codec))


def describe_model(config: RunConfig, dtype: torch.dtype) -> tuple[CadMllmConfig, PreTrainedTokenizerBase]:
    """The model's own description and its tokenizer; the model is built without values to learn its shapes."""
    tokenizer, codec = run_tokenizer(config), get_codec(config.data.codec)
    with torch.device("meta"):
        model = build_model(
            config.model, tokenizer=tokenizer, codec=codec.name, codec_version=codec.version, dtype=dtype,
            device="meta", seed=config.seed,
        )  # fmt: skip
    return model.config, tokenizer


def preprocessing(config: RunConfig) -> dict[str, Any]:
    """How inputs were made for the model in training, as plain values; None for a modality that it does not read.

    `image` and `point` follow `data.sample.decode_image` and `data.sample.Sample.points`.
    """
    codec, tokens, data = get_codec(config.data.codec), modality_tokens(config.model), config.data
    image, point = config.model.image, config.model.point
    return {
        "codec": {"name": codec.name, "version": codec.version},
        "instruction": data.instruction,
        "prompt": "{instruction}\n{description}\n",
        "layout": ["image", "point", "prompt", "sequence", "eos"],
        "max_sample_tokens": data.max_sample_tokens,
        "image": None
        if image is None
        else {
            "size": image.image_size, "channels": "RGB", "value_range": [0.0, 1.0], "resample": "bicubic",
            "pad_to_square": "colour of the top left pixel", "mean": list(MEAN), "std": list(STD),
            "normalized_by": "model", "views": data.views_per_sample, "tokens_per_view": tokens.image_tokens_per_view,
        },
        "point": None
        if point is None
        else {
            "num_points": data.num_points, "channels": ["x", "y", "z", "normal_x", "normal_y", "normal_z"],
            "frame": "unit cube of the part", "tokens": tokens.point_tokens,
        },
    }  # fmt: skip
