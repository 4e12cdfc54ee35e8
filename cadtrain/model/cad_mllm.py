"""CAD-MLLM: a language model that reads text, views and point clouds and writes a CAD sequence.

Legend: T tokens of the pack, S sequences, V views, C clouds, P points of a cloud, L tokens of a view or cloud, N placeholder
positions, K targets, W width of an encoder, D width of the language model.

A micro-batch is a pack: one flat row of tokens in which `cu_seqlens` tells the sequences apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from transformers import AutoConfig, Dinov2Config, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput

from cadtrain.errors import UsageError
from cadtrain.model import attention
from cadtrain.model.encoders.image import ImageEncoder
from cadtrain.model.encoders.point import PointEncoder
from cadtrain.model.fusion import scatter_features
from cadtrain.model.language import build_language_model
from cadtrain.model.loss import IGNORED, head_loss
from cadtrain.model.projector import Projector


class CadMllmConfig(PreTrainedConfig):
    """Everything needed to build the model again: the parts as plain dicts, and how its sequences are written."""

    model_type = "cad_mllm"

    language: dict[str, Any] | None = None
    """The language model's transformers configuration."""
    image: dict[str, Any] | None = None
    """`config` (fields of `Dinov2Config`), `image_size`, `trainable`; None for a model without images."""
    point: dict[str, Any] | None = None
    """Arguments of `PointEncoder`; None for a model without point clouds."""
    projector_width: int = 2048
    """Hidden width of both projectors."""
    codec: str = "compact"
    """Name of the codec that writes and reads the model's sequences."""
    codec_version: int | str = 1
    """Version of that codec."""


@dataclass
class CadMllmOutput(ModelOutput):
    """What a forward pass gives."""

    loss_sum: torch.Tensor | None = None
    """float32[]: cross entropies summed over the targets; None without labels."""
    num_targets: int | None = None
    """Number of targets K, known on the host; None without labels."""
    logits: torch.Tensor | None = None
    """[T, vocabulary]; None with labels."""


@dataclass(frozen=True)
class Parts:
    """Submodules made elsewhere, for `CadMllm` to be assembled from."""

    language: PreTrainedModel
    image_encoder: ImageEncoder | None
    point_encoder: PointEncoder | None


class CadMllm(PreTrainedModel):
    """The whole model; encoders and projectors that the configuration leaves out are None."""

    config_class = CadMllmConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # Read by DeepSpeed: rotary frequencies keep fp32 in a bf16 model.
    _keep_in_fp32_modules_strict = ["inv_freq"]  # noqa: RUF012  # transformers' own way

    def __init__(self, config: CadMllmConfig, parts: Parts | None = None) -> None:
        super().__init__(config)
        parts = parts or _build_parts(config)
        self.language = parts.language
        self.image_encoder = parts.image_encoder
        self.point_encoder = parts.point_encoder
        width = self.language.config.hidden_size
        self.image_projector = _projector(self.image_encoder, config.projector_width, width)
        self.point_projector = _projector(self.point_encoder, config.projector_width, width)
        self.post_init()

    def forward(
        self,
        *,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        labels: torch.Tensor | None = None,
        target_positions: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_positions: torch.Tensor | None = None,
        points: torch.Tensor | None = None,
        point_positions: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        point_features: torch.Tensor | None = None,
    ) -> CadMllmOutput:
        """The summed loss of one pack, or its logits when there are no labels.

        `labels` int64[T] are shifted already: `labels[t]` is the token that position t must predict, or -100.
        `target_positions` int64[K] are the positions whose label is not -100; with them a forward pass never waits for
        the device, without them they are looked up, which on CUDA it once does.

        Where `pixel_values` float32[V, 3, H, W] are given, encoder and projector run whether or not the pack holds a
        placeholder for them: `image_positions` int64[N] names the places of the first N / tokens-a-view views, and the
        rest of them, dummies, take part in nothing but the graph. So every rank runs the same modules. `points`
        float32[C, P, 6] and `point_positions` likewise. `image_features` [V, L, W] and `point_features` [C, L, W], what
        the encoders once gave, take the place of `pixel_values` and `points`: then the encoders do not run.
        """
        embeddings = self.embed(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_positions=image_positions,
            points=points,
            point_positions=point_positions,
            image_features=image_features,
            point_features=point_features,
        )
        if torch.is_grad_enabled() and not embeddings.requires_grad:
            # Frozen embeddings under adapters: ZeRO-3 keeps a layer's weights gathered for its backward pass only if its
            # input takes a gradient.
            embeddings.requires_grad_()
        hidden = self.language.base_model(
            inputs_embeds=embeddings[None],
            position_ids=position_ids[None],
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            use_cache=False,
        ).last_hidden_state[0]  # [T, D]
        head = self.language.get_output_embeddings()
        if labels is None:
            return CadMllmOutput(logits=head(hidden))
        if target_positions is None:
            target_positions = (labels != IGNORED).nonzero().squeeze(1)
        loss_sum = head_loss(head, hidden.index_select(0, target_positions), labels.index_select(0, target_positions))
        return CadMllmOutput(loss_sum=loss_sum, num_targets=target_positions.shape[0])

    def embed(
        self,
        *,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_positions: torch.Tensor | None = None,
        points: torch.Tensor | None = None,
        point_positions: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        point_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The pack's embeddings [T, D], those of its images and clouds in their places; arguments as of `forward`."""
        embeddings = self.language.get_input_embeddings()(input_ids)
        for what, inputs, stored, positions, encoder, projector in (
            ("image", pixel_values, image_features, image_positions, self.image_encoder, self.image_projector),
            ("point", points, point_features, point_positions, self.point_encoder, self.point_projector),
        ):
            if inputs is None and stored is None:
                if positions is not None and positions.shape[0]:
                    raise UsageError(
                        f"the pack has {positions.shape[0]} {what} placeholder positions but no {what} inputs."
                    )
                continue
            if encoder is None or projector is None:
                raise UsageError(f"the pack has {what} inputs but the model was built without an encoder for them.")
            if positions is None:
                positions = input_ids.new_empty(0)
            features = encoder(inputs) if stored is None else stored_features(stored, inputs, encoder, projector, what)
            embeddings = scatter_features(embeddings, projector(features), positions, what)
        return embeddings

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PointEncoder):
            init.normal_(module.query, std=0.02)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        # `model.bfloat16()` and the like, also as DeepSpeed calls them, cast buffers too; rotary frequencies must stay fp32.
        kept = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name.endswith("inv_freq") and buffer.dtype == torch.float32
        ]
        super()._apply(fn, recurse)
        for module, name, buffer in kept:
            cast_buffer = getattr(module, name)
            if cast_buffer.dtype != torch.float32:
                setattr(module, name, buffer.to(cast_buffer.device))
        return self


def stored_features(
    stored: torch.Tensor,
    inputs: torch.Tensor | None,
    encoder: ImageEncoder | PointEncoder,
    projector: Projector,
    what: str,
) -> torch.Tensor:
    """`stored` [G, L, W] in the projector's type; raises UsageError unless they can be what `encoder` gave for G views or clouds."""
    if inputs is not None:
        raise UsageError(f"the pack has {what} inputs and {what} features; give the one or the other.")
    if stored.ndim != 3 or tuple(stored.shape[1:]) != (encoder.num_tokens, encoder.width):
        raise UsageError(
            f"{what} features of shape {list(stored.shape)}, but the encoder gives [*, {encoder.num_tokens}, {encoder.width}]."
        )
    return stored.to(projector.norm.weight.dtype)


def _build_parts(config: CadMllmConfig) -> Parts:
    """The parts of `config` in the default type; values come later, from a seed or a folder."""
    if config.language is None:
        raise UsageError("a cad_mllm configuration needs `language`, the configuration of its language model.")
    fields = dict(config.language)
    language = AutoConfig.for_model(fields.pop("model_type"), **fields)
    language.use_cache = False
    language._attn_implementation = attention.NAME
    image = point = None
    if config.image is not None:
        settings = dict(config.image)
        image = ImageEncoder(Dinov2Config(**settings.pop("config")), **settings)
    if config.point is not None:
        point = PointEncoder(**config.point)
    return Parts(build_language_model(language, dtype=torch.get_default_dtype()), image, point)


def _projector(encoder: ImageEncoder | PointEncoder | None, hidden_width: int, output_width: int) -> Projector | None:
    return None if encoder is None else Projector(encoder.width, hidden_width, output_width)
