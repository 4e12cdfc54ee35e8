"""Which ZeRO stage a launch takes, and how many layers are recomputed: what the configuration names, or what fits.

The prediction needs the model's shapes and therefore torch, a few seconds; CPU ranks and models whose configuration is
not on this machine are decided without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from cadtrain.config.recompute import Recompute, RecomputeSetting
from cadtrain.hub import CONFIG_FILES, TOKENIZER_FILES, is_at_hand, require
from cadtrain.plan.memory import Choice, ZeroStage
from cadtrain.units import format_bytes

if TYPE_CHECKING:
    from cadtrain.config.sections import ModelConfig, RunConfig
    from cadtrain.plan.predict import Option


@dataclass(frozen=True, slots=True)
class StageChoice:
    """The stage that was taken, why, and what a rank needs under each (bytes; empty where nothing was predicted).

    `needed` is with as much recomputation as that stage would take.
    """

    stage: ZeroStage
    reason: str
    needed: dict[ZeroStage, int]
    fits: bool = True
    recompute: Recompute | None = None
    """What is recomputed; None where nothing was predicted."""
    unseen: Literal["none", "full"] = "none"
    """What `model.recompute: auto` comes to where nothing was predicted."""
    offload_optimizer: bool = False
    offload_parameters: bool = False
    """Whether `zero.stage: auto` has taken to host memory, unasked, because nothing fits without."""

    @property
    def recompute_setting(self) -> RecomputeSetting:
        """The value that takes the place of `model.recompute: auto`."""
        return self.unseen if self.recompute is None else self.recompute.setting()

    @property
    def peak_bytes(self) -> int | None:
        """Predicted memory of a rank's device at its worst moment; None where nothing was predicted."""
        return self.needed.get(self.stage)


def choose_stage(
    config: RunConfig, num_ranks: int, memory_bytes: int | None, *, host_weights: bool = False, device: str = "",
    host_bytes: int = 0,
) -> StageChoice:  # fmt: skip
    """The stage for `config` on `num_ranks` devices of `memory_bytes` each (None: CPU ranks; 0: not known).

    A stage that the configuration names is kept. `auto` takes the lowest that fits: DeepSpeed is fastest there. With
    `model.recompute: auto` each stage takes the fewest recomputed layers with which it fits, and the fastest of these
    is taken, by the rates of `device` (of an H100 where it is in no table). On the CPU it is 2, which shares memory on
    one host and gathers no weights, without recomputation. `host_weights`: stage 3, if taken, will keep its weights in
    host memory. `device`: the devices' name, under which steps may have been measured. Where no stage fits, `auto` takes
    the fastest that does with the optimizer, or all, in the `host_bytes` of host memory that all ranks may take.
    """
    zero = config.zero
    is_auto = zero.stage == "auto"
    if memory_bytes is None and is_auto:
        return StageChoice(3 if zero.offload_parameters else 2, "CPU ranks share one host's memory", {})
    if not memory_bytes or not has_known_shapes(config):
        unseen: Literal["none", "full"] = "none" if memory_bytes is None else "full"
        if zero.stage != "auto":
            return StageChoice(zero.stage, "as configured", {}, unseen=unseen)
        unknown = "the device's memory is" if not memory_bytes else "the model's shapes are"
        lowest: ZeroStage = 3 if num_ranks > 1 or zero.offload_optimizer or zero.offload_parameters else 0
        return StageChoice(lowest, f"{unknown} not known, so the stage that needs least", {}, unseen=unseen)
    priced = _priced(config, num_ranks, memory_bytes, host_weights=host_weights, device=device)
    needed = {option.choice.stage: option.memory.total for option in priced}
    if zero.stage != "auto":
        return StageChoice(zero.stage, "as configured", needed, priced[0].fits, priced[0].choice.recompute)
    found, reason = _taken(priced, by_speed=config.model.recompute == "auto")
    if found is not None:
        return StageChoice(found.choice.stage, reason, needed, recompute=found.choice.recompute)
    last = priced[-1]
    if not zero.offload_optimizer and not zero.offload_parameters:
        hosted = _in_host_memory(config, num_ranks, memory_bytes, host_bytes, device)
        if hosted is not None:
            lacks = f"{format_bytes(last.memory.total)} predicted without, {format_bytes(memory_bytes)} there"
            return StageChoice(
                hosted.choice.stage, f"fits with host memory only: {lacks}", {**needed, hosted.choice.stage: hosted.memory.total},
                recompute=hosted.choice.recompute, offload_optimizer=True, offload_parameters=hosted.choice.offload_parameters,
            )  # fmt: skip
    text = f"none fits: {format_bytes(last.memory.total)} predicted, {format_bytes(memory_bytes)} there"
    return StageChoice(last.choice.stage, text, needed, fits=False, recompute=last.choice.recompute)


def _taken(priced: list[Option], *, by_speed: bool) -> tuple[Option | None, str]:
    """The option that is taken and why; None where none fits."""
    from cadtrain.plan.predict import fastest

    lowest = next((option for option in priced if option.fits), None)
    found = fastest(priced) if by_speed else lowest
    return found, "the lowest that fits" if found is lowest else "the fastest that fits"


def _priced(config: RunConfig, num_ranks: int, memory_bytes: int, *, host_weights: bool, device: str) -> list[Option]:
    """The stages that `config` leaves open, lowest first, with its own offload, and its recomputation or what fits."""
    zero = config.zero
    stages = [
        Choice(stage, zero.offload_optimizer, zero.offload_parameters or (host_weights and stage == 3))
        for stage in _open_stages(config, num_ranks)
    ]
    return _options(config, stages, num_ranks, memory_bytes, device)


def _in_host_memory(
    config: RunConfig, num_ranks: int, memory_bytes: int, host_bytes: int, device: str
) -> Option | None:
    """The fastest choice that fits with offload, and whose part in host memory fits there; None if there is none."""
    from cadtrain.plan.predict import fastest

    hosted = [Choice(2, offload_optimizer=True), Choice(3, offload_optimizer=True), Choice(3, True, True)]
    found = _options(config, hosted, num_ranks, memory_bytes, device)
    return fastest([option for option in found if sum(option.host.values()) <= host_bytes])


def _options(
    config: RunConfig, choices: Sequence[Choice], num_ranks: int, memory_bytes: int, device: str
) -> list[Option]:
    """`choices` with the recomputation of `config`, or as much as each needs, priced."""
    from cadtrain.plan.predict import configured_recompute, measured_before, model_facts, price, recompute_that_fits
    from cadtrain.plan.rates import find_gpu, gpu_named

    model, kind = model_facts(config), find_gpu(device) or gpu_named("H100")
    corrections = measured_before(model, num_ranks, device)
    configured = configured_recompute(config, model)
    found = []
    for choice in choices:
        recompute = configured or recompute_that_fits(config, model, choice, num_ranks, memory_bytes, corrections)
        found.append(price(config, model, replace(choice, recompute=recompute), num_ranks, memory_bytes, kind))
    return corrections.options(found, memory_bytes)


def _open_stages(config: RunConfig, num_ranks: int) -> tuple[ZeroStage, ...]:
    zero = config.zero
    if zero.stage != "auto":
        return (zero.stage,)
    if zero.offload_parameters:
        return (3,)
    if zero.offload_optimizer:
        return (2, 3)
    return (0, 1, 2, 3) if num_ranks > 1 else (0,)


def has_known_shapes(config: RunConfig) -> bool:
    """Whether the shapes of `config`'s model are known without a download."""
    return all(is_at_hand(source, *files) for source, _, files in pretrained_sources(config.model))


def require_shapes(model: ModelConfig) -> None:
    """Raise `EnvironmentFault` if something that says `model`'s shapes would have to be downloaded and the hub cannot be reached."""
    for source, where, files in pretrained_sources(model):
        require(source, where, *files)


def pretrained_sources(model: ModelConfig) -> list[tuple[str, str, tuple[str, ...]]]:
    """What says the shapes of `model`'s pretrained parts.

    Each is a folder or hub name, the key of the configuration that has it, and files of which one is needed.
    """
    language, image = model.language, model.image
    found: list[tuple[str, str, tuple[str, ...]]] = []
    if language.pretrained is not None:
        found.append((str(language.pretrained), "model.language.pretrained", CONFIG_FILES))
    tokenizer = language.tokenizer or language.pretrained
    if tokenizer is not None and tokenizer != "bytes":
        key = "tokenizer" if language.tokenizer else "pretrained"
        found.append((str(tokenizer), f"model.language.{key}", TOKENIZER_FILES))
    if image is not None and image.pretrained is not None:
        found.append((str(image.pretrained), "model.image.pretrained", CONFIG_FILES))
    return found
