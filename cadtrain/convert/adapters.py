"""Adapters added to the weights they stand beside, some rows of one layer at a time.

Legend: R rank of an adapter, O and I output and input width of the layer it stands beside.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from cadtrain.checkpoint.weight_files import Entry
from cadtrain.checkpoint.zero_shards import ShardedWeights, WeightInfo
from cadtrain.errors import CheckpointError

if TYPE_CHECKING:
    from cadtrain.config.sections import LoraConfig

BASE = ".base_layer."
BESIDE = re.compile(r"\.(?:lora_|added_rows\.)")
"""What follows the layer's name in the names of its adapters, and of the rows that it learns for added tokens."""

_ROWS = ".added_rows.weight"


def has_adapters(weights: ShardedWeights) -> bool:
    """Whether the checkpoint is of a model with LoRA."""
    return any(BESIDE.search(name) for name in weights)


def merged_entries(
    weights: ShardedWeights, lora: LoraConfig, *, dtype_of: Callable[[str], torch.dtype], piece_values: int
) -> list[Entry]:
    """Entries of the model without adapters; each is merged, in fp32, when it is read, about `piece_values` at a time.

    `dtype_of` gives the type in the file for a name of the checkpoint. Raises `CheckpointError` for adapters that stand
    beside no weight.
    """
    halves: dict[str, list[str]] = {}
    for name in weights:
        if BESIDE.search(name):
            halves.setdefault(BESIDE.split(name)[0], []).append(name)
    stems = {name.split(BASE)[0] for name in weights if BASE in name}
    if left := sorted(set(halves) - stems):
        raise CheckpointError(f"the adapter of {left[0]} stands beside no weight.", where=str(weights.folder))
    entries = []
    for name, info in weights.info.items():
        if BESIDE.search(name):
            continue
        beside = halves.get(name.split(BASE)[0], []) if BASE in name and name.endswith(".weight") else []
        alias = info.alias_of.replace(BASE, ".") if info.alias_of is not None else None
        pieces = _Merged(weights, info, beside, lora, piece_values)
        entries.append(Entry(name.replace(BASE, "."), info.shape, dtype_of(name), pieces, alias))
    return entries


class _Merged:
    """The pieces of one weight with its adapters added: parameters in fp32 whatever their type, so a sum is rounded once."""

    def __init__(
        self, weights: ShardedWeights, info: WeightInfo, beside: list[str], lora: LoraConfig, piece_values: int
    ) -> None:
        self._weights, self._info, self._beside, self._lora = weights, info, beside, lora
        self._piece_values = piece_values

    def __call__(self) -> Iterator[torch.Tensor]:
        if not self._beside:
            yield from self._weights.pieces(self._info.name, self._piece_values)
            return
        from cadtrain.convert.model_folder import merge_lora

        adapters = {name: self._weights[name].float() for name in self._beside}
        height, width = self._info.shape[0], self._info.shape[1:].numel()
        rows = max(1, self._piece_values // max(1, width))
        start = 0
        for piece in self._weights.pieces(self._info.name, rows * width):
            block = piece.float().view(-1, *self._info.shape[1:])
            part = {self._info.name: block} | self._beside_rows(adapters, start, block.shape[0], height)
            [(_, merged)] = merge_lora(part, alpha=self._lora.alpha, rank=self._lora.rank)
            start += block.shape[0]
            yield merged

    def _beside_rows(
        self, adapters: dict[str, torch.Tensor], start: int, count: int, height: int
    ) -> dict[str, torch.Tensor]:
        """What of the adapters belongs to `count` rows from `start` of `height`: all of A [R, I], those rows of B [O, R]."""
        found = {}
        for name, tensor in adapters.items():
            if name.endswith(_ROWS):
                first = height - tensor.shape[0]
                own = tensor[max(0, start - first) : max(0, start + count - first)]
                if own.shape[0]:
                    found[name] = own
            else:
                found[name] = tensor[start : start + count] if ".lora_B." in name else tensor
        return found
