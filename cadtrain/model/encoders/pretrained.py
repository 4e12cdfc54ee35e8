"""Encoders from a run's configuration: checked, built, and filled with pretrained weights.

Legend: none; everything here works on whole modules.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, Dinov2Config, Dinov2Model

from cadtrain import hub
from cadtrain.config.sections import ImageEncoderConfig, PointEncoderConfig
from cadtrain.errors import ConfigError, Fault
from cadtrain.model.encoders.image import ImageEncoder
from cadtrain.model.encoders.point import PointEncoder
from cadtrain.model.encoders.state_file import read_state
from cadtrain.model.language import unknown_fields
from cadtrain.model.pretrained import load_whole

_IMAGE, _POINT = "model.image", "model.point"


def dinov2_config(config: ImageEncoderConfig) -> Dinov2Config:
    """The transformers configuration of the image encoder; reads at most a `config.json`.

    Raises ConfigError for an unknown field, for another kind of model, and for an image size that is not a multiple of
    the patch size: patches that do not fit would be cut off silently.
    """
    if config.pretrained is None:
        faults = unknown_fields(Dinov2Config, config.config, f"{_IMAGE}.config")
        if faults:
            raise ConfigError(faults)
        # Weights made here have no use for the mask token, which belongs to masked pre-training.
        fields = {"image_size": config.image_size, "use_mask_token": False, **config.config}
        try:
            found = Dinov2Config(**fields)
        except (StrictDataclassError, TypeError, ValueError) as error:
            message = f"transformers refuses this dinov2 configuration: {error}"
            raise ConfigError([Fault(f"{_IMAGE}.config", message)]) from error
    else:
        found = _read_config(config.pretrained)
    patch = int(found.patch_size)
    if config.image_size % patch:
        below = config.image_size - config.image_size % patch
        hint = f"Use {below} or {below + patch}."
        message = f"{config.image_size} is not a multiple of the patch size {patch}."
        raise ConfigError([Fault(f"{_IMAGE}.image_size", message, hint)])
    return found


def build_image_encoder(config: ImageEncoderConfig, *, dtype: torch.dtype, device: torch.device) -> ImageEncoder:
    """The image encoder of `config`, with its pretrained weights if it has any and is not on meta."""
    found = dinov2_config(config)
    model = None
    if config.pretrained is not None and device.type != "meta":
        model = load_whole(
            Dinov2Model, config.pretrained, where=f"{_IMAGE}.pretrained", may_have_more=True, config=found, dtype=dtype,
            attn_implementation="sdpa", device_map={"": device},
        )  # fmt: skip
    return ImageEncoder(found, image_size=config.image_size, trainable=config.trainable, model=model)


def point_arguments(config: PointEncoderConfig) -> dict[str, Any]:
    """The arguments with which `PointEncoder` is made."""
    return config.model_dump(exclude={"pretrained"})


def build_point_encoder(config: PointEncoderConfig) -> PointEncoder:
    """The point encoder of `config`, with its pretrained weights if it has any and is not on meta."""
    encoder = PointEncoder(**point_arguments(config))
    if config.pretrained is not None and not encoder.query.is_meta:
        load_point_weights(encoder, Path(config.pretrained))
    return encoder


def load_point_weights(encoder: nn.Module, path: Path) -> None:
    """Fill `encoder` from a state dict, of its own or inside a whole Michelangelo checkpoint.

    Where no name fits as it stands, the names under the prefix of the tensor `…query` are taken, so that a checkpoint of
    the whole shape model loads too. Raises ConfigError naming what is missing, left over, or of another shape, and the
    sizes that the file is of.
    """
    state = _under_prefix(read_state(path, where=f"{_POINT}.pretrained"), set(encoder.state_dict()))
    wanted = encoder.state_dict()
    missing, unexpected = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    shapes = [
        f"{name} is {list(state[name].shape)} instead of {list(wanted[name].shape)}"
        for name in sorted(set(wanted) & set(state))
        if state[name].shape != wanted[name].shape
    ]
    problems = [
        *([f"missing keys: {_some(missing)}"] if missing else []),
        *([f"unexpected keys: {_some(unexpected)}"] if unexpected else []),
        *([f"other shapes: {_some(shapes)}"] if shapes else []),
    ]
    if problems:
        hint = _sizes_hint(state) or "Is it the state dict of a Michelangelo shape model, or of its encoder?"
        raise ConfigError(
            [Fault(f"{_POINT}.pretrained", f"{path} does not fit the point encoder; {'; '.join(problems)}.", hint)]
        )
    encoder.load_state_dict(state)


def _read_config(source: str) -> Dinov2Config:
    hub.require(source, f"{_IMAGE}.pretrained", *hub.CONFIG_FILES)
    try:
        found = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        hint = "Give a local folder or a hub name of a DINOv2."
        raise ConfigError(
            [Fault(f"{_IMAGE}.pretrained", f"no model could be opened from {source!r}: {error}", hint)]
        ) from error
    if not isinstance(found, Dinov2Config):
        raise ConfigError([Fault(f"{_IMAGE}.pretrained", f"{source!r} is a {found.model_type}, not a dinov2")])
    return found


def _under_prefix(state: dict[str, torch.Tensor], wanted: set[str]) -> dict[str, torch.Tensor]:
    """The point encoder's part of `state`, under its own names."""
    prefixes = ["", *(name.removesuffix("query") for name in state if name.endswith(".query"))]
    for prefix in prefixes:
        inside = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if wanted & set(inside):
            # Michelangelo may keep the frequencies of its embedder as a buffer; they are constants here.
            return {name: value for name, value in inside.items() if not name.startswith("fourier_embedder.")}
    return state


def _sizes_hint(state: dict[str, torch.Tensor]) -> str:
    """What the configuration must say for the weights of `state`; empty where they are none of a point encoder."""
    query, projection = state.get("query"), state.get("input_proj.weight")
    if query is None or projection is None or query.dim() != 2 or projection.dim() != 2:
        return ""
    if any(name.endswith((".c_q.bias", ".c_kv.bias", ".c_qkv.bias")) for name in state):
        return "It was made with `qkv_bias: true`; only encoders without biases on queries, keys and values are read."
    layers = {name.split(".")[2] for name in state if name.startswith("self_attn.resblocks.")}
    frequencies = ((projection.shape[1] - 3) / 3 - 1) / 2
    sizes = {"num_latents": query.shape[0], "width": query.shape[1], "num_layers": len(layers), "num_frequencies": f"{frequencies:g}"}
    return f"The file is of {', '.join(f'{name}: {size}' for name, size in sizes.items())}; does `model.point` say so?"


def _some(names: list[str], limit: int = 5) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
