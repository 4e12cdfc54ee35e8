"""What a run would need and take under each choice, and which choice is the fastest that fits.

The model is built on the meta device and one pack of each curriculum stage is traced through it (`model.footprint`), so
activations and counts are those of the real modules. Legend: T tokens of a pack, K targets, N ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from cadtrain.config.recompute import Recompute, recomputed_layers
from cadtrain.plan.calibration import NOTHING_KNOWN, Corrections, corrections_for, key_of
from cadtrain.plan.memory import (
    STAGES,
    Choice,
    RankMemory,
    checkpoint_bytes,
    host_bytes,
    rank_memory,
)
from cadtrain.plan.rates import GpuKind, gpu_named, pack_seconds, step_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cadtrain.config.sections import RunConfig, StageConfig
    from cadtrain.model.cad_mllm import CadMllm
    from cadtrain.model.census import Census
    from cadtrain.model.footprint import PackShape
    from cadtrain.model.layer_stack import RecomputeDial

TEXT_TOKENS = 350
"""Instruction, description and sequence of a typical sample (the median design has 140 tokens, the mean 394)."""
TARGET_SHARE = 0.6
"""Share of those tokens that are learned."""
ALIKE = 1.02
"""Speeds of which the higher is less than so many times the lower are taken for the same."""
DIAL_MARGIN = 0.03
"""Share of a GPU's memory that is left free where recomputation is chosen by what is left: packs differ, and with this
choice it is used up. 1,000 more learned tokens in a pack are about 1.2 GB of logits with a vocabulary of 150,000."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the model of a configuration weighs and keeps."""

    census: Census
    element_bytes: int
    dials: tuple[RecomputeDial, ...]
    """What a full pack of each curriculum stage holds, for any number of recomputed layers."""

    @property
    def num_layers(self) -> int:
        """Decoder layers of the language model."""
        return self.census.num_layers

    def everywhere(self, layers: int) -> Recompute:
        """`layers` recomputed in every stage of the curriculum."""
        return Recompute((layers,) * len(self.dials), self.num_layers)

    def peak(self, recompute: Recompute) -> dict[str, int]:
        """Bytes at the worst moment of a pass over a full pack, by part of the model, of the costliest curriculum stage."""
        found = [dial.footprint(recompute.in_stage(number)).peak for number, dial in enumerate(self.dials)]
        return max(found, key=lambda parts: sum(parts.values()))


@dataclass(frozen=True, slots=True)
class Option:
    """One choice with its price."""

    choice: Choice
    memory: RankMemory
    host: dict[str, int]
    """Host memory of all ranks in bytes, by use."""
    checkpoint: int
    """Bytes of one checkpoint."""
    tokens_per_second: float
    """Of one GPU, over full packs; an estimate."""
    seconds: float | None
    """Of the whole curriculum; None where the number of samples is not known."""
    fits: bool


@dataclass(frozen=True, slots=True)
class RunPlan:
    """All choices for a run on `num_ranks` GPUs of `memory_bytes`."""

    stages: tuple[str, ...]
    """Names of the curriculum's stages, in the order of `Recompute.layers`."""
    num_ranks: int
    memory_bytes: int
    gpu: GpuKind
    has_rates: bool
    """Whether the GPU's speed is known; else the H100's orders the choices."""
    model: ModelFacts
    micro_batch_tokens: int
    options: tuple[Option, ...]
    best: Option | None
    """The fastest that fits: under `model.recompute: auto` what a launch would take, were offload no matter."""
    advice: str
    """What would let the next faster one fit; empty where the fastest of all fits."""
    frozen_bytes: int
    """Frozen weights on the disk, written once a run."""
    num_kept: int
    """Checkpoints on the disk at once: those kept, and the one being written."""
    corrections: Corrections = NOTHING_KNOWN
    """What measured steps taught; the options' memory is corrected already."""

    @property
    def disk_bytes(self) -> int:
        """What checkpoints take at most, of the marked choice or else the cheapest."""
        option = self.best or min(self.options, key=lambda option: option.memory.total)
        return option.checkpoint * self.num_kept + self.frozen_bytes


def model_facts(config: RunConfig, *, shares_heads: bool = True) -> ModelFacts:
    """Build `config`'s model on the meta device; loads torch. Raises `ConfigError` for a wrong model.

    Its stages are traced when a footprint is asked for. `shares_heads`: see `recompute_dial`.
    """
    from cadtrain.model.census import take_census
    from cadtrain.model.footprint import meta_model, recompute_dial

    width = 4 if config.precision == "fp32" else 2
    model = meta_model(config.model, codec=config.data.codec, element_bytes=width)
    dials = tuple(
        recompute_dial(model, pack_shape(config, stage, model), shares_heads=shares_heads, learning=learning_in(stage))
        for stage in config.curriculum
    )
    return ModelFacts(take_census(model), width, dials)


def configured_recompute(config: RunConfig, model: ModelFacts) -> Recompute | None:
    """What `config` says of recomputation; None for `auto`. Raises `ConfigError` for more layers than there are."""
    layers = recomputed_layers(config.model, len(config.curriculum), model.num_layers)
    return None if config.model.recompute == "auto" else Recompute(layers, model.num_layers)


def pack_shape(config: RunConfig, stage: StageConfig, model: CadMllm) -> PackShape:
    """A full pack of typical samples of `stage`, each with all modalities that the stage may draw."""
    from cadtrain.model.footprint import PackShape

    tokens = config.batch.micro_batch_tokens
    views = config.data.views_per_sample if stage.uses("image") else 0
    image = 0 if model.image_encoder is None else views * model.image_encoder.num_tokens
    point = 0 if model.point_encoder is None or not stage.uses("point") else model.point_encoder.num_tokens
    samples = max(1, tokens // (TEXT_TOKENS + image + point))
    return PackShape(
        tokens=max(tokens, image + point), targets=round(TARGET_SHARE * tokens), sequences=samples,
        views=samples * views, clouds=samples if point else 0, points=config.data.num_points,
        stored=config.data.features is not None,
    )  # fmt: skip


def learning_in(stage: StageConfig) -> Callable[[str], bool]:
    """Which parameters learn in `stage` (as `train.schedule` has it)."""
    from cadtrain.model.components import component_of

    def learns(name: str) -> bool:
        component = component_of(name)
        used = component == "language" or stage.uses("image" if component.startswith("image") else "point")
        return used and stage.multiplier(component) > 0

    return learns


def choices(config: RunConfig, num_ranks: int) -> list[Choice]:
    """What `config` leaves open beside recomputation: a named stage and a wish for offload are kept."""
    zero = config.zero
    stages = STAGES if zero.stage == "auto" else (zero.stage,)
    plain = [Choice(stage) for stage in stages if stage == 0 or num_ranks > 1 or zero.stage == stage]
    hosted = [
        Choice(stage, offload_optimizer=True) for stage in stages if stage in (2, 3) or (stage == 1 == zero.stage)
    ]
    whole = [Choice(stage, offload_optimizer=True, offload_parameters=True) for stage in stages if stage == 3]
    if zero.offload_parameters:
        return [replace(c, offload_optimizer=zero.offload_optimizer) for c in whole]
    return [*hosted, *whole] if zero.offload_optimizer else [*plain, *hosted, *whole]


def recompute_that_fits(
    config: RunConfig, model: ModelFacts, choice: Choice, num_ranks: int, memory_bytes: int,
    corrections: Corrections = NOTHING_KNOWN,
) -> Recompute:  # fmt: skip
    """For each stage of the curriculum the fewest layers with which `choice` fits, with `DIAL_MARGIN` left free.

    Where no number fits, the one that needs least. Memory is corrected by `corrections`.
    """
    memory = partial(
        rank_memory, model.census, choice, num_ranks, zero=_zero_block(config, model, choice, num_ranks),
        element_bytes=model.element_bytes,
    )  # fmt: skip
    limit = (1 - DIAL_MARGIN) * memory_bytes

    def fits(peak: int) -> bool:
        return corrections.memory(choice, memory(activations=peak)).total <= limit

    layers = tuple(dial.fewest(fits) for dial in model.dials)
    return Recompute(layers, model.num_layers)


def _with_recompute(
    config: RunConfig, model: ModelFacts, choice: Choice, num_ranks: int, memory_bytes: int, corrections: Corrections
) -> tuple[list[Choice], Choice | None]:
    """`choice` without recomputation, as `config` says, with as much as is needed, and with all, each once, ascending.

    Beside them the one that `model.recompute: auto` stands for; None where `config` says something else.
    """
    needed = recompute_that_fits(config, model, choice, num_ranks, memory_bytes, corrections)
    configured = configured_recompute(config, model)
    kinds = {model.everywhere(0), needed, configured or needed, model.everywhere(model.num_layers)}
    found = [replace(choice, recompute=kind) for kind in sorted(kinds, key=lambda kind: sum(kind.layers))]
    return found, replace(choice, recompute=needed) if configured is None else None


def _zero_block(config: RunConfig, model: ModelFacts, choice: Choice, num_ranks: int) -> dict[str, Any]:
    """The `zero_optimization` block that a run with `choice` would use."""
    from cadtrain.config.deepspeed_config import deepspeed_config_for

    update = {
        "stage": choice.stage,
        "offload_optimizer": choice.offload_optimizer,
        "offload_parameters": choice.offload_parameters,
    }
    chosen = config.model_copy(update={"zero": config.zero.model_copy(update=update)})
    found = deepspeed_config_for(
        chosen, zero_stage=choice.stage, world_size=num_ranks, precision="fp32" if model.element_bytes == 4 else "bf16",
        hidden_size=model.census.hidden_size, layer_params=model.census.decoder_layer,
    ).to_dict()  # fmt: skip
    block: dict[str, Any] = found["zero_optimization"]
    return block


def price(
    config: RunConfig, model: ModelFacts, choice: Choice, num_ranks: int, memory_bytes: int, gpu: GpuKind,
    num_samples: int | None = None,
) -> Option:  # fmt: skip
    """Memory, disk and time of one choice. Without `num_samples` the stages of the curriculum count alike."""
    census = model.census
    memory = rank_memory(
        census, choice, num_ranks, activations=sum(model.peak(choice.recompute).values()),
        zero=_zero_block(config, model, choice, num_ranks), element_bytes=model.element_bytes,
        resting=_resting(config, census),
    )  # fmt: skip
    tokens = None if num_samples is None else _stage_tokens(config, num_samples)
    weights = tokens or [1.0] * len(config.curriculum)
    per_token = [
        _token_seconds(config, census, choice, gpu, num_ranks, choice.recompute.in_stage(number) / census.num_layers)
        for number in range(len(config.curriculum))
    ]
    seconds = sum(weight * cost for weight, cost in zip(weights, per_token, strict=True))
    return Option(
        choice=choice,
        memory=memory,
        host=host_bytes(census, choice, num_ranks, element_bytes=model.element_bytes),
        checkpoint=checkpoint_bytes(census, choice.stage, element_bytes=model.element_bytes)[0],
        tokens_per_second=sum(weights) / seconds,
        seconds=None if tokens is None else seconds / num_ranks,
        fits=memory.total <= memory_bytes,
    )


def _token_seconds(
    config: RunConfig, census: Census, choice: Choice, gpu: GpuKind, num_ranks: int, recomputed: float
) -> float:
    """Seconds of a GPU for one token, with the share `recomputed` of the layers computed again."""
    tokens = config.batch.micro_batch_tokens
    pack = pack_seconds(
        census, choice, gpu, tokens=tokens, num_ranks=num_ranks, target_share=TARGET_SHARE, recomputed=recomputed
    )
    step = step_seconds(census, choice, gpu, num_ranks=num_ranks)
    rank_tokens = max(1.0, config.batch.global_batch_size * TEXT_TOKENS / num_ranks)
    return pack / tokens + step / rank_tokens


def _resting(config: RunConfig, census: Census) -> int:
    """Elements of encoders that never run, because their features are read."""
    if config.data.features is None:
        return 0
    return sum(row.total for name, row in census.components.items() if name.endswith("_encoder"))


def _stage_tokens(config: RunConfig, num_samples: int) -> list[float]:
    """Tokens of each stage, from typical samples and the probabilities of the modality sets."""
    from cadtrain.config.batch_plan import stage_plans
    from cadtrain.model.build import modality_tokens

    sizes = modality_tokens(config.model)
    image, point = sizes.image_tokens_per_view * config.data.views_per_sample, sizes.point_tokens
    found = []
    for stage, span in zip(config.curriculum, stage_plans(config, num_samples), strict=True):
        sample = sum(
            share * (TEXT_TOKENS + image * ("image" in key) + point * ("point" in key))
            for key, share in stage.probabilities().items()
        )
        found.append(span.num_steps * config.batch.global_batch_size * sample)
    return found


def count_samples(config: RunConfig) -> int:
    """Training samples of an epoch, those too long to be trained on included; raises `DataError` for a folder that is no dataset."""
    if config.data.path is not None:
        from cadtrain.data.manifest import Manifest

        return int(Manifest.read(config.data.path).counts["train"])
    return config.data.synth.count


def predict(
    config: RunConfig, num_ranks: int, memory_bytes: int, gpu: GpuKind | None, *, device: str = ""
) -> RunPlan:
    """Price every choice that `config` leaves open on `num_ranks` GPUs of `memory_bytes` each; loads torch.

    Where steps were measured on devices called `device` (`plan.calibration`), memory is corrected by them. Raises `ConfigError` for a
    curriculum that cannot be trained, `DataError` for a folder that is no dataset, `EnvironmentFault` for a model that cannot be had.
    """
    from cadtrain.config.batch_plan import refuse_hopeless
    from cadtrain.plan.stage import require_shapes

    samples = count_samples(config)
    refuse_hopeless(config, world_size=num_ranks, num_samples=samples)
    require_shapes(config.model)  # before torch is loaded
    model = model_facts(config)
    known = gpu or gpu_named("H100")
    corrections = measured_before(model, num_ranks, device)
    options, launched = [], []
    for plain in choices(config, num_ranks):
        variants, automatic = _with_recompute(config, model, plain, num_ranks, memory_bytes, corrections)
        priced = [price(config, model, choice, num_ranks, memory_bytes, known, samples) for choice in variants]
        found = corrections.options(priced, memory_bytes)
        options += found
        launched += [option for option in found if automatic in (None, option.choice)]
    best = fastest(launched)
    frozen = checkpoint_bytes(model.census, 0, element_bytes=model.element_bytes)[1]
    return RunPlan(
        stages=tuple(stage.name for stage in config.curriculum), num_ranks=num_ranks, memory_bytes=memory_bytes,
        gpu=known, has_rates=gpu is not None, model=model,
        micro_batch_tokens=config.batch.micro_batch_tokens, options=tuple(options), best=best,
        advice=_advice(config, model, options, best, num_ranks, memory_bytes, known),
        frozen_bytes=frozen, num_kept=config.checkpoint.keep_last + config.checkpoint.keep_best + 1,
        corrections=corrections,
    )  # fmt: skip


def measured_before(model: ModelFacts, num_ranks: int, device: str) -> Corrections:
    """What steps of such a model on devices called `device` taught; nothing for a device without a name."""
    if not device:
        return NOTHING_KNOWN
    return corrections_for(key_of(device, model.census, element_bytes=model.element_bytes, num_ranks=num_ranks))


def fastest(options: Sequence[Option]) -> Option | None:
    """The fastest that fits. Of those within 2 %, which is more than these estimates tell apart, the first: the lowest stage."""
    fitting = [option for option in options if option.fits]
    bar = max((option.tokens_per_second for option in fitting), default=0.0) / ALIKE
    return next((option for option in fitting if option.tokens_per_second >= bar), None)


def _advice(
    config: RunConfig, model: ModelFacts, options: Sequence[Option], best: Option | None, num_ranks: int,
    memory_bytes: int, gpu: GpuKind,
) -> str:  # fmt: skip
    """What would let a faster choice fit: the fastest with smaller packs, else a larger GPU for the nearest one."""
    from cadtrain.units import format_bytes

    bar = 0.0 if best is None else ALIKE * best.tokens_per_second
    faster = [option for option in options if not option.fits and option.tokens_per_second > bar]
    if not faster:
        return ""
    smaller = []
    for option in faster:
        tokens = _fitting_tokens(option, config.batch.micro_batch_tokens, memory_bytes)
        if tokens >= config.data.max_sample_tokens:
            batch = config.batch.model_copy(update={"micro_batch_tokens": tokens})
            scaled = _scaled(model, tokens / config.batch.micro_batch_tokens)
            changed = config.model_copy(update={"batch": batch})
            smaller.append((price(changed, scaled, option.choice, num_ranks, memory_bytes, gpu), tokens))
    found, tokens = max(smaller, key=lambda pair: pair[0].tokens_per_second, default=(None, 0))
    if found is not None and found.tokens_per_second > bar:
        lacks = next(o for o in faster if o.choice == found.choice).memory.total - memory_bytes
        gain = "" if best is None else f" and be {found.tokens_per_second / best.tokens_per_second:.2f} times as fast"
        text = f"{found.choice.describe()} lacks {format_bytes(lacks)} a GPU; it would fit{gain}"
        return f"{text} with --set batch.micro_batch_tokens={tokens}."
    near = min(faster, key=lambda option: option.memory.total)
    gain = "" if best is None else f", {near.tokens_per_second / best.tokens_per_second:.2f} times as fast"
    lacks = near.memory.total - memory_bytes
    text = f"{near.choice.describe()}{gain}, lacks {format_bytes(lacks)} a GPU, and smaller packs do not mend that"
    return f"{text}: it takes GPUs of {near.memory.total / 1e9:.0f} GB."


def _fitting_tokens(option: Option, tokens: int, memory_bytes: int) -> int:
    """The largest pack, in whole 256 tokens, with which `option` would fit; activations follow the number of tokens."""
    memory = option.memory
    per_token = (1 + memory.reserve / max(1, memory.allocated)) * memory.activations / tokens
    return int((tokens - (memory.total - memory_bytes) / per_token) // 256 * 256) if per_token else 0


def _scaled(model: ModelFacts, factor: float) -> ModelFacts:
    return replace(model, dials=tuple(dial.scaled(factor) for dial in model.dials))
