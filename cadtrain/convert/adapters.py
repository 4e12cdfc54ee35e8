"""Adapters added to the weights they stand beside, one layer at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

import torch

from cadtrain.checkpoint.zero_shards import ShardedWeights
from cadtrain.config.sections import LoraConfig
from cadtrain.convert.write_file import Entry
from cadtrain.errors import CheckpointError

_BASE = ".base_layer."
_BESIDE = re.compile(r"\.(?:lora_|added_rows\.)")
"""What follows the layer's name in the names of its adapters, and of the rows that it learns for added tokens."""


def has_adapters(weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether the checkpoint is of a model with LoRA."""
    return any(_BESIDE.search(name) for name in weights)


def merged_entries(weights: ShardedWeights, lora: LoraConfig, *, dtype_of: Callable[[str], torch.dtype]) -> list[Entry]:
    """Entries of the model without adapters; each is merged, in fp32, when it is read.

    `dtype_of` gives the type in the file for a name of the checkpoint. Raises `CheckpointError` for adapters that stand
    beside no weight.
    """
    halves: dict[str, list[str]] = {}
    for name in weights:
        if _BESIDE.search(name):
            halves.setdefault(_BESIDE.split(name)[0], []).append(name)
    stems = {name.split(_BASE)[0] for name in weights if _BASE in name}
    if left := sorted(set(halves) - stems):
        raise CheckpointError(f"the adapter of {left[0]} stands beside no weight.", where=str(weights.folder))
    wide = _Wide(weights)
    entries = []
    for name, info in weights.info.items():
        if _BESIDE.search(name):
            continue
        part = _Part(wide, [name, *halves.get(name.split(_BASE)[0], [])]) if _BASE in name else _Part(wide, [name])
        alias = info.alias_of.replace(_BASE, ".") if info.alias_of is not None else None
        entries.append(Entry(name.replace(_BASE, "."), info.shape, dtype_of(name), _reader(part, lora), alias))
    return entries


def _reader(part: Mapping[str, torch.Tensor], lora: LoraConfig) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        from cadtrain.model.export import merge_lora

        _, tensor = next(merge_lora(part, alpha=lora.alpha, rank=lora.rank))
        return tensor

    return read


class _Wide(Mapping[str, torch.Tensor]):
    """Weights as a merge wants them: parameters in fp32 whatever their stored type, so that a sum is rounded once."""

    def __init__(self, weights: ShardedWeights) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._weights[name]
        is_parameter = self._weights.info[name].kind != "buffer" and tensor.is_floating_point()
        return tensor.float() if is_parameter else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


class _Part(Mapping[str, torch.Tensor]):
    """What one merged weight is made of: the weight first, then its adapter's halves."""

    def __init__(self, weights: Mapping[str, torch.Tensor], names: list[str]) -> None:
        self._weights, self._names = weights, names

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
