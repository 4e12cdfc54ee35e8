"""Adam's moments out of DeepSpeed's shards, by the name of the weight: what a run needs to go on under another layout.

The moments are laid out like the fp32 weights beside them (`zero_shards` says how), one entry of the optimizer's state
for each group of weights (ZeRO 1 to 3; at stage 3 for each sub-group) or for each weight (ZeRO 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cadtrain.checkpoint.shard_files import ShardFiles
from cadtrain.checkpoint.zero_shards import flat_values, joined_reader, span_reader
from cadtrain.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class AdamState:
    """One weight's state: `step` is how often it was updated, `moments` reads each of `MOMENTS` whole (float32, the weight's shape)."""

    step: float
    moments: Mapping[str, Callable[[], torch.Tensor]]


def adam_states(files: ShardFiles, names: Sequence[Sequence[str]]) -> dict[str, AdamState]:
    """The state of every trained weight; reads values only when asked for them.

    `names` are the trained weights as the run groups them, in order; only ZeRO 0, which stores no names, needs them.
    A weight that was never updated is missing. Raises `CheckpointError` where the shards hold no such state.
    """
    if files.stage == 0:
        return _by_weight(files, [name for group in names for name in group])
    key = "optimizer_state_dict" if files.stage == 3 else "base_optimizer_state"
    ranks = [_states(shard.get(key), path) for shard, path in zip(files.optim, files.optim_paths, strict=True)]
    found: dict[str, AdamState] = {}
    offsets = _Offsets(files)
    for number, shapes in enumerate(files.groups):
        rows = [states.get(number) for states in ranks]
        if not all(rows):
            raise CheckpointError(f"holds no optimizer state of group {number}.", where=str(files.folder))
        offsets.begin(number)
        for position, (name, shape) in enumerate(shapes.items()):
            at = offsets.next(position, shape)
            read = {moment: _reader(files, [row[moment] for row in rows if row], at, shape) for moment in MOMENTS}
            found[name] = AdamState(float(rows[0]["step"] if rows[0] else 0), read)
    return found


class _Offsets:
    """Where each weight of a group begins: in the group's whole vector, or at stage 3 in a rank's part of the sub-group."""

    def __init__(self, files: ShardFiles) -> None:
        self._files = files
        self._gaps: Sequence[int] = ()
        self._at = 0

    def begin(self, number: int) -> None:
        self._gaps = self._files.gaps(number) if self._files.stage != 3 else ()
        self._at = 0

    def next(self, position: int, shape: torch.Size) -> int:
        at = self._at
        if self._files.stage == 3:
            self._at += math.ceil(shape.numel() / self._files.num_ranks)
        else:
            self._at += shape.numel() + (self._gaps[position] if self._gaps else 0)
        return at


def _reader(files: ShardFiles, vectors: list[torch.Tensor], at: int, shape: torch.Size) -> Callable[[], torch.Tensor]:
    flat = [flat_values(row, "an Adam moment", path) for row, path in zip(vectors, files.optim_paths, strict=True)]
    if files.stage == 3:
        read = joined_reader([[vector] for vector in flat], at, math.ceil(shape.numel() / files.num_ranks))
    else:
        read = span_reader(flat, at)

    def whole() -> torch.Tensor:
        target = torch.empty(shape.numel(), dtype=flat[0].dtype)
        read(0, target)
        return target.view(shape)

    return whole


def _by_weight(files: ShardFiles, names: Sequence[str]) -> dict[str, AdamState]:
    """ZeRO 0: Adam numbers its weights over the groups in order."""
    optimizer = files.model[0].get("optimizer")
    wrapped = optimizer.get("optimizer_state_dict", optimizer) if isinstance(optimizer, dict) else None
    states = _states(wrapped, files.model_paths[0])
    numbers = [number for group in wrapped["param_groups"] for number in group["params"]] if wrapped else []
    if len(numbers) != len(names):
        raise CheckpointError(
            f"holds the optimizer state of {len(numbers)} weights, the run trains {len(names)}.",
            where=str(files.model_paths[0]),
        )
    found = {}
    for name, number in zip(names, numbers, strict=True):
        if row := states.get(number):
            found[name] = AdamState(float(row["step"]), {moment: row[moment].clone for moment in MOMENTS})
    return found


def _states(optimizer: Any, path: object) -> Mapping[int, Mapping[str, Any]]:
    states = optimizer.get("state") if isinstance(optimizer, dict) else None
    if not isinstance(states, dict) or any(not {"step", *MOMENTS} <= row.keys() for row in states.values() if row):
        raise CheckpointError("holds no state of an Adam optimizer.", where=str(path))
    return states
