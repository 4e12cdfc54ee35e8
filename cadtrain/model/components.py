"""What the optimizer and the engine need to know of a model's parameters and layers.

Legend: none; this works on names and modules.
"""

from __future__ import annotations

from torch import nn

from cadtrain.config.sections import COMPONENTS, Component
from cadtrain.errors import UsageError

_NO_DECAY_NAMES = ("query", "cls_token", "mask_token", "position_embeddings", "register_tokens")
"""Learned tokens and positions: embeddings that are bare parameters."""


def component_of(name: str) -> Component:
    """The component that the parameter called `name` belongs to; a wrapper's `module.` in front is skipped."""
    head = name.removeprefix("module.").split(".", 1)[0]
    for component in COMPONENTS:
        if head == component:
            return component
    raise UsageError(
        f"parameter {name!r} belongs to no component of the model; components are {', '.join(COMPONENTS)}."
    )


def trainable_components(model: nn.Module) -> dict[Component, list[tuple[str, nn.Parameter]]]:
    """The parameters that take a gradient, by component, in the order of `COMPONENTS` and of definition.

    Components with none are left out; a tied weight appears once, under its first name.
    """
    found: dict[Component, list[tuple[str, nn.Parameter]]] = {component: [] for component in COMPONENTS}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[component_of(name)].append((name, parameter))
    return {component: parameters for component, parameters in found.items() if parameters}


def decay_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay applies to: matrices that are no embedding and in no norm.

    Reads the true shape of weights that ZeRO-3 has shared out (their own is empty).
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        name
        for name, parameter in model.named_parameters()
        if len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
        and id(parameter) not in embeddings
        and name.rsplit(".", 1)[-1] not in _NO_DECAY_NAMES
    }


def decoder_layer_classes(model: nn.Module) -> list[type[nn.Module]]:
    """Classes of the language model's decoder layers, each once, by name."""
    return _classes(model.language.base_model.layers)  # type: ignore[union-attr,arg-type]


def encoder_block_classes(model: nn.Module) -> list[type[nn.Module]]:
    """Classes of the encoders' transformer blocks, each once, by name; empty without encoders."""
    blocks: list[nn.Module] = []
    if model.image_encoder is not None:
        blocks += [module for module in model.image_encoder.modules() if type(module).__name__ == "Dinov2Layer"]  # type: ignore[union-attr]
    if model.point_encoder is not None:
        blocks += [model.point_encoder.cross_attn, *model.point_encoder.self_attn.resblocks]  # type: ignore[union-attr,misc,list-item]
    return _classes(blocks)


def _classes(modules: list[nn.Module] | nn.ModuleList) -> list[type[nn.Module]]:
    return sorted({type(module) for module in modules}, key=lambda cls: cls.__name__)
