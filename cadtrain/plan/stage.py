"""Which ZeRO stage a launch takes: the one that the configuration names, or the lowest that fits.

The prediction needs the model's shapes and therefore torch, a few seconds; CPU ranks and models whose configuration is
not on this machine are decided without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cadtrain.plan.memory import Choice, ZeroStage
from cadtrain.units import format_bytes

if TYPE_CHECKING:
    from cadtrain.config.sections import RunConfig
    from cadtrain.plan.predict import Option


@dataclass(frozen=True, slots=True)
class StageChoice:
    """The stage that was taken, why, and what a rank needs under each (bytes; empty where nothing was predicted)."""

    stage: ZeroStage
    reason: str
    needed: dict[ZeroStage, int]
    fits: bool = True

    @property
    def peak_bytes(self) -> int | None:
        """Predicted memory of a rank's device at its worst moment; None where nothing was predicted."""
        return self.needed.get(self.stage)


def choose_stage(
    config: RunConfig, num_ranks: int, memory_bytes: int | None, *, host_weights: bool = False, device: str = ""
) -> StageChoice:
    """The stage for `config` on `num_ranks` devices of `memory_bytes` each (None: CPU ranks; 0: not known).

    A stage that the configuration names is kept. `auto` takes the lowest that fits: DeepSpeed is fastest there. On the
    CPU it takes 2, which shares memory on one host and gathers no weights. `host_weights`: stage 3, if taken, will keep
    its weights in host memory. `device`: the devices' name, under which steps may have been measured.
    """
    zero = config.zero
    is_auto = zero.stage == "auto"
    if memory_bytes is None and is_auto:
        return StageChoice(3 if zero.offload_parameters else 2, "CPU ranks share one host's memory", {})
    if not memory_bytes or not is_at_hand(config):
        if zero.stage != "auto":
            return StageChoice(zero.stage, "as configured", {})
        unknown = "the device's memory is" if not memory_bytes else "the model's shapes are"
        lowest: ZeroStage = 3 if num_ranks > 1 or zero.offload_optimizer or zero.offload_parameters else 0
        return StageChoice(lowest, f"{unknown} not known, so the stage that needs least", {})
    priced = _priced(config, num_ranks, memory_bytes, host_weights=host_weights, device=device)
    needed = {option.choice.stage: option.memory.total for option in priced}
    if zero.stage != "auto":
        return StageChoice(zero.stage, "as configured", needed, fits=priced[0].fits)
    for option in priced:
        if option.fits:
            return StageChoice(option.choice.stage, "the lowest that fits", needed)
    last = priced[-1]
    text = f"none fits: {format_bytes(last.memory.total)} predicted, {format_bytes(memory_bytes)} there"
    return StageChoice(last.choice.stage, text, needed, fits=False)


def _priced(config: RunConfig, num_ranks: int, memory_bytes: int, *, host_weights: bool, device: str) -> list[Option]:
    """The stages that `config` leaves open, lowest first, with its own offload and recomputation."""
    from cadtrain.plan.predict import measured_before, model_facts, price
    from cadtrain.plan.rates import gpu_named

    zero = config.zero
    if zero.stage != "auto":
        stages: tuple[ZeroStage, ...] = (zero.stage,)
    elif zero.offload_parameters:
        stages = (3,)
    elif zero.offload_optimizer:
        stages = (2, 3)
    else:
        stages = (0, 1, 2, 3) if num_ranks > 1 else (0,)
    model = model_facts(config, (config.model.recompute,))
    found = [
        price(
            config, model,
            Choice(
                stage, zero.offload_optimizer, zero.offload_parameters or (host_weights and stage == 3), config.model.recompute
            ),
            num_ranks, memory_bytes, gpu_named("H100"),
        )
        for stage in stages
    ]  # fmt: skip
    return measured_before(model, num_ranks, device).options(found, memory_bytes)


def is_at_hand(config: RunConfig) -> bool:
    """Whether the shapes of `config`'s model are known without a download."""
    language, image = config.model.language, config.model.image
    tokenizer = language.tokenizer or language.pretrained
    names = [language.pretrained, None if tokenizer == "bytes" else tokenizer, image.pretrained if image else None]
    return all(_is_on_disk(name) for name in names if name is not None)


def _is_on_disk(name: str) -> bool:
    if Path(name).is_dir():
        return True
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False
