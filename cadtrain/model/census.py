"""How many weights a model has, of which kind and where; exact, and the same for a model on the meta device.

Legend: none; this counts elements.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from cadtrain.config.sections import Component
from cadtrain.model.cad_mllm import CadMllm
from cadtrain.model.components import component_of


@dataclass(frozen=True, slots=True)
class Count:
    """Elements of weights by whether they learn."""

    trainable: int = 0
    frozen: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.trainable + self.frozen


@dataclass(frozen=True, slots=True)
class Census:
    """Elements of a model's weights; a tied weight counts once."""

    components: dict[Component, Count]
    lora: int
    """Of `trainable`: those of adapters."""
    tied: int
    """Weights that stand in a second place, which costs nothing."""
    decoder_layer: int
    """One decoder layer, adapters included: what ZeRO-3 gathers at once, and what bucket sizes follow."""
    num_layers: int
    hidden_size: int
    head: int
    """The largest weight outside the layers: embedding or head."""
    small: tuple[int, ...]
    """Element counts of weights of at most a million elements, which ZeRO-3 may keep whole on every rank."""
    buffer_bytes: int

    @property
    def trainable(self) -> int:
        """Weights that take a gradient in some stage."""
        return sum(row.trainable for row in self.components.values())

    @property
    def total(self) -> int:
        """All weights."""
        return sum(row.total for row in self.components.values())


def take_census(model: CadMllm) -> Census:
    """Count `model`, whole or on the meta device. Not for weights that ZeRO-3 has shared out."""
    components: dict[Component, Count] = {}
    lora, small = 0, []
    for name, parameter in model.named_parameters():
        row, count = components.get(component_of(name), Count()), parameter.numel()
        learns = parameter.requires_grad
        components[component_of(name)] = Count(row.trainable + count * learns, row.frozen + count * (not learns))
        lora += count if "lora_" in name else 0
        if count <= 1_000_000:
            small.append(count)
    inputs, outputs = model.language.get_input_embeddings(), model.language.get_output_embeddings()
    is_tied = inputs.weight is outputs.weight
    layers = model.language.base_model.layers
    return Census(
        components=components,
        lora=lora,
        tied=_elements(outputs) if is_tied else 0,
        decoder_layer=_elements(layers[0]),
        num_layers=len(layers),
        hidden_size=int(model.language.config.hidden_size),
        head=max(_elements(inputs), _elements(outputs)),
        small=tuple(sorted(small)),
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
    )


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
