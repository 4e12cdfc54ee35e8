"""What an encoder is, in one hash: two encoders with the same hash give the same tokens for the same view or cloud.

Legend: none; weights are handled by name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import nn

from cadtrain.model.encoders.image import MEAN, STD, ImageEncoder
from cadtrain.model.encoders.point import PointEncoder
from cadtrain.model.weights import Sharding, WholeWeights

VERSION = 1
"""Part of every hash: counts up when an encoder's code comes to give other tokens from the same weights."""

_DINOV2_FIELDS = (
    "patch_size", "num_channels", "image_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio",
    "hidden_act", "layer_norm_eps", "qkv_bias", "use_swiglu_ffn",
)  # fmt: skip
"""Of transformers' configuration, what a forward pass in eval mode depends on."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Hash and description of an encoder."""

    weights: str
    """xxh3_128 over the description, and name, shape and bytes of every parameter and buffer."""
    description: dict[str, Any]
    """What besides weights decides on the tokens: sizes, patches, normalisation, type."""


def fingerprint(encoder: ImageEncoder | PointEncoder, sharding: Sharding | None = None) -> Fingerprint:
    """The fingerprint of `encoder`, one weight at a time on the host. Collective where `sharding` shares weights out."""
    sharding = sharding or WholeWeights()
    description = describe_encoder(encoder)
    digest = xxhash.xxh3_128(json.dumps(description, sort_keys=True).encode())
    for name, parameter in encoder.named_parameters():
        with sharding.gather([parameter]):
            _feed(digest, name, parameter)
    for name, buffer in encoder.named_buffers():
        _feed(digest, name, buffer)
    return Fingerprint(digest.hexdigest(), description)


def describe_encoder(encoder: ImageEncoder | PointEncoder) -> dict[str, Any]:
    """What besides weights decides on the tokens of `encoder`, as JSON values."""
    shared = {"version": VERSION, "tokens": encoder.num_tokens, "width": encoder.width}
    if isinstance(encoder, ImageEncoder):
        fields = {name: getattr(encoder.model.config, name) for name in _DINOV2_FIELDS}
        dtype = encoder.model.embeddings.patch_embeddings.projection.weight.dtype
        own = {"kind": "dinov2", **fields, "view_size": encoder.image_size, "mean": list(MEAN), "std": list(STD)}
    else:
        dtype = encoder.query.dtype
        heads = {"num_heads": encoder.cross_attn.attn.num_heads, "num_layers": len(encoder.self_attn.resblocks)}
        own = {"kind": "michelangelo", **heads, "num_frequencies": encoder.num_frequencies}
    return {**own, **shared, "dtype": str(dtype).removeprefix("torch.")}


def _feed(digest: Any, name: str, tensor: torch.Tensor | nn.Parameter) -> None:
    whole = tensor.detach().cpu().contiguous()
    digest.update(f"{name} {list(whole.shape)} {whole.dtype}".encode())
    digest.update(whole.view(-1).view(torch.uint8).numpy().data)
