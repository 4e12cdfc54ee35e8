"""The pack that needs most memory of a configuration, and what its step is predicted to take.

Legend: T tokens of the pack.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cadtrain.config.recompute import Recompute, recomputed_layers
from cadtrain.plan.memory import Choice
from cadtrain.plan.predict import ModelFacts, Option, learning_in, pack_shape, price
from cadtrain.plan.rates import gpu_named

if TYPE_CHECKING:
    from cadtrain.config.sections import Component, RunConfig
    from cadtrain.model.cad_mllm import CadMllm
    from cadtrain.model.census import Census
    from cadtrain.model.footprint import Kernels, PackShape


@dataclass(frozen=True, slots=True)
class WorstPack:
    """A full pack in the costliest stage, all of whose text is learned."""

    stage: str
    shape: PackShape
    learning: tuple[Component, ...]
    """Components that take a gradient in the stage."""
    recomputed: int
    """Decoder layers that are computed again in the stage's backward pass."""
    option: Option
    """The prediction for this pack, under the configuration's own choice."""
    census: Census
    element_bytes: int


def worst_pack(config: RunConfig, num_ranks: int, memory_bytes: int, *, kernels: Kernels = "cuda") -> WorstPack:
    """The worst pack of `config`, whose ZeRO stage is a number, whose recomputation is decided, and whose precision is not `auto` where it is fp32.

    `memory_bytes` is that of a device, for `option.fits`. Loads torch; raises `ConfigError` for a model that cannot be built.
    """
    from cadtrain.model.census import take_census
    from cadtrain.model.components import component_of
    from cadtrain.model.footprint import meta_model, recompute_dial

    width = 4 if config.precision == "fp32" else 2
    model = meta_model(config.model, codec=config.data.codec, element_bytes=width)
    shapes = [all_learned(pack_shape(config, stage, model), model) for stage in config.curriculum]
    dials = tuple(
        recompute_dial(model, shape, kernels=kernels, learning=learning_in(stage))
        for stage, shape in zip(config.curriculum, shapes, strict=True)
    )
    census = take_census(model)
    recompute = Recompute(recomputed_layers(config.model, len(dials), census.num_layers), census.num_layers)
    peaks = [dial.footprint(count).peak_bytes for dial, count in zip(dials, recompute.layers, strict=True)]
    worst = peaks.index(max(peaks))
    stage, learns = config.curriculum[worst], learning_in(config.curriculum[worst])
    facts = ModelFacts(census, width, dials)
    option = price(config, facts, _choice_of(config, recompute), num_ranks, memory_bytes, gpu_named("H100"))
    names = {component_of(name): None for name, p in model.named_parameters() if p.requires_grad and learns(name)}
    return WorstPack(stage.name, shapes[worst], tuple(names), recompute.layers[worst], option, census, width)


def _choice_of(config: RunConfig, recompute: Recompute) -> Choice:
    """What `config` has chosen; its ZeRO stage must be a number."""
    zero = config.zero
    assert zero.stage != "auto"
    return Choice(zero.stage, zero.offload_optimizer, zero.offload_parameters, recompute)


def all_learned(shape: PackShape, model: CadMllm) -> PackShape:
    """`shape` with a target at every position that holds no image or cloud."""
    image = 0 if model.image_encoder is None else shape.views * model.image_encoder.num_tokens
    point = 0 if model.point_encoder is None else shape.clouds * model.point_encoder.num_tokens
    return replace(shape, targets=max(1, shape.tokens - image - point))
