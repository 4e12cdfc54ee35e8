"""What `model.recompute` comes to: how many decoder layers are recomputed in each stage of the curriculum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cadtrain.errors import ConfigError, Fault

if TYPE_CHECKING:
    from cadtrain.config.sections import ModelConfig

RecomputeSetting = Literal["auto", "none", "full"] | int | tuple[int, ...]
"""What `model.recompute` may hold."""


@dataclass(frozen=True, slots=True)
class Recompute:
    """How many decoder layers are computed again in the backward pass rather than kept."""

    layers: tuple[int, ...] = ()
    """For each stage of the curriculum; none for no recomputation at all."""
    of: int = 0
    """Layers of the model."""

    def in_stage(self, number: int) -> int:
        """Layers that are recomputed in the curriculum's stage `number`."""
        return self.layers[number] if self.layers else 0

    def setting(self) -> RecomputeSetting:
        """As `model.recompute` is written."""
        found = set(self.layers) or {0}
        if len(found) > 1:
            return self.layers
        return "none" if found == {0} else "full" if found == {self.of} else found.pop()

    def short(self) -> str:
        """`none`, `full`, `12 of 36`; `0/3/12 of 36`, by stage."""
        setting = self.setting()
        if isinstance(setting, str):
            return setting
        return f"{'/'.join(map(str, self.layers)) if isinstance(setting, tuple) else setting} of {self.of}"

    def describe(self) -> str:
        """`recompute all 36 layers`, `recompute 12 of 36 layers`, `recompute 0/3/12 of 36 layers, by stage`; empty for none."""
        setting = self.setting()
        if setting == "none":
            return ""
        which = f"all {self.of}" if setting == "full" else self.short()
        return f"recompute {which} layers{', by stage' if isinstance(setting, tuple) else ''}"


NO_RECOMPUTE = Recompute()


def recomputed_layers(config: ModelConfig, num_stages: int, num_layers: int) -> tuple[int, ...]:
    """How many of the language model's `num_layers` are recomputed in each of the curriculum's first `num_stages`.

    `auto` is none here: a launch resolves it before it starts ranks. Raises `ConfigError` for more layers than there are.
    """
    wanted = config.recompute
    if isinstance(wanted, str):
        wanted = num_layers if wanted == "full" else 0
    found = wanted if isinstance(wanted, tuple) else (wanted,) * num_stages
    if max(found) > num_layers:
        raise ConfigError([recompute_fault(max(found), num_layers)])
    return found[:num_stages]


def recompute_fault(wanted: int, num_layers: int) -> Fault:
    """Of `wanted` layers, in a model that has others."""
    message = f"found {wanted}, but the language model has {num_layers} decoder layers."
    return Fault("model.recompute", message, f"Give 0 to {num_layers}, none, full or auto.")
