"""Whole weights out of DeepSpeed's shards, one at a time.

Where a weight is found, by stage (fp32 means the optimizer's master weights):

    stage   trained                                              frozen                     buffers, aliases
    0       model states; fp32 beside the optimizer in bf16      model states               model states
    1, 2    fp32: flat vectors, one a group, cut into N          model states               model states
            equal parts; the weights stand in group order
    3       fp32: each weight cut into N parts of ceil(n / N),   cut alike, in each rank's  rank 0's model states
            a rank's parts one after another over sub-groups     model states

Source: DeepSpeed 0.19.8, runtime/zero/{stage_1_and_2,stage3}.py, runtime/bf16_optimizer.py and utils/zero_to_fp32.py.
Unlike the last, weights frozen at stage 1 are found, and so are those whose gradient was off when the checkpoint was saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from cadtrain.checkpoint.mapped import copy_span
from cadtrain.checkpoint.shard_files import ShardFiles, open_shard_files
from cadtrain.errors import CheckpointError

Kind = Literal["trained", "frozen", "buffer"]
Reader = Callable[[int, torch.Tensor], object]
"""Fills a flat tensor with the values of the flattened weight from `start` on: `read(start, target)`."""


_COMPARED = 1 << 18


@dataclass(frozen=True, slots=True)
class WeightInfo:
    """One entry of the state dict. `dtype` is the stored one: fp32 for trained weights. `alias_of` names a tied weight's first name."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    kind: Kind
    alias_of: str | None = None


class ShardedWeights(Mapping[str, torch.Tensor]):
    """The whole state dict of a checkpoint; a weight is put together, or a piece of it, when it is asked for, and not kept."""

    def __init__(self, files: ShardFiles) -> None:
        self.folder = files.folder
        self.stage = files.stage
        self.num_ranks = files.num_ranks
        self._readers: dict[str, Reader] = {}
        self.info: dict[str, WeightInfo] = {}
        """By name, in the order of the model's state dict."""
        self._fill(files)

    @classmethod
    def open(cls, folder: Path) -> ShardedWeights:
        """Open the shards in `folder` without reading weights; raises `CheckpointError` naming what is wrong where."""
        return cls(open_shard_files(folder))

    def __getitem__(self, name: str) -> torch.Tensor:
        """The whole weight on the host; trained ones in fp32. An alias gives its own copy."""
        shape = self.info[name].shape
        [whole] = self.pieces(name, max(1, shape.numel()))
        return whole.view(shape)

    def pieces(self, name: str, count: int) -> Iterator[torch.Tensor]:
        """The flattened weight in pieces of `count` values, the last one shorter; one empty piece for an empty weight.

        A piece is overwritten by the next: memory that is taken anew for each would cost more than the copy into it.
        """
        info = self.info[name]
        read, numel = self._readers[info.alias_of or name], info.shape.numel()
        buffer = torch.empty(min(count, numel), dtype=info.dtype)
        for start in range(0, max(1, numel), count):
            piece = buffer[: numel - start]
            read(start, piece)
            yield piece

    def __iter__(self) -> Iterator[str]:
        return iter(self.info)

    def __len__(self) -> int:
        return len(self.info)

    def _fill(self, files: ShardFiles) -> None:
        first = files.model[0]
        module: dict[str, torch.Tensor] = first["module"]
        buffers = set(first.get("buffer_names") or ())
        trained = _trained(files)
        frozen = _frozen(files)
        aliases = _aliases(first, module)
        for name, tensor in module.items():
            if name in buffers:
                self._add(name, tensor.shape, tensor.dtype, "buffer", tensor_reader(tensor))
            elif name in trained:
                shape, read = trained[name]
                self._add(name, shape, torch.float32, "trained", read)
            elif name in frozen:
                shape, read = frozen[name]
                self._add(name, shape, tensor.dtype, "frozen", read)
            elif name not in aliases:
                if files.stage == 3:
                    raise CheckpointError(f"no shard holds the weight {name}.", where=str(files.folder))
                self._add(name, tensor.shape, tensor.dtype, "frozen", tensor_reader(tensor))
            if (first_name := aliases.get(name)) is not None and name not in self.info:
                self.info[name] = WeightInfo(name, torch.Size(), torch.float32, "trained", first_name)
        self._resolve_aliases(files)
        unnamed = [name for name in trained if name not in self.info]
        if unnamed:
            raise CheckpointError(
                f"the weight {unnamed[0]} is in the optimizer but not in the model.", where=str(files.folder)
            )

    def _add(self, name: str, shape: torch.Size, dtype: torch.dtype, kind: Kind, read: Reader) -> None:
        self.info[name] = WeightInfo(name, torch.Size(shape), dtype, kind)
        self._readers[name] = read

    def _resolve_aliases(self, files: ShardFiles) -> None:
        for name, info in list(self.info.items()):
            if info.alias_of is None:
                continue
            origin = self.info.get(info.alias_of)
            if origin is None or origin.alias_of is not None:
                raise CheckpointError(
                    f"{name} is tied to {info.alias_of}, which no shard holds.", where=str(files.folder)
                )
            self.info[name] = WeightInfo(name, origin.shape, origin.dtype, origin.kind, origin.name)


_Found = dict[str, tuple[torch.Size, Reader]]


def _trained(files: ShardFiles) -> _Found:
    if files.stage == 0:
        return _trained_plain(files)
    return _trained_by_weight(files, files.groups) if files.stage == 3 else _trained_by_group(files, files.groups)


def _trained_by_group(files: ShardFiles, groups: Sequence[dict[str, torch.Size]]) -> _Found:
    """Stages 1 and 2: group g is one vector, cut into equal parts, one a rank."""
    parts = [
        _flat_tensors(state, "single_partition_of_fp32_groups", path)
        for state, path in zip(files.optim, files.optim_paths, strict=True)
    ]
    found: _Found = {}
    for number, shapes in enumerate(groups):
        vectors = _same_group(files, parts, number, len(groups))
        gaps = files.gaps(number)
        offset = 0
        for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
            found[name] = (shape, span_reader(vectors, offset))
            offset += shape.numel() + gap
        available = sum(vector.numel() for vector in vectors)
        # DeepSpeed pads a group to a multiple of 2 N so that every rank's part starts well aligned.
        if not offset <= available < offset + 2 * files.num_ranks:
            raise CheckpointError(
                f"group {number} of the optimizer holds {available} values, its weights have {offset}.",
                where=str(files.folder),
            )
    return found


def _same_group(
    files: ShardFiles, parts: Sequence[Sequence[torch.Tensor]], number: int, count: int
) -> list[torch.Tensor]:
    for rows, path in zip(parts, files.optim_paths, strict=True):
        if len(rows) != count:
            raise CheckpointError(f"has {len(rows)} optimizer groups, the model states name {count}.", where=str(path))
    return [rows[number] for rows in parts]


def span_reader(vectors: Sequence[torch.Tensor], offset: int) -> Reader:
    """Reads a weight that begins at `offset` of the vector that `vectors` make one after another."""
    return lambda start, target: copy_span(target, vectors, offset + start)


def _trained_by_weight(files: ShardFiles, groups: Sequence[dict[str, torch.Size]]) -> _Found:
    """Stage 3: rank r holds part r of every weight, the parts one after another over its sub-groups."""
    parts = [
        _flat_tensors(state, "fp32_flat_groups", path)
        for state, path in zip(files.optim, files.optim_paths, strict=True)
    ]
    found: _Found = {}
    offset = 0
    for name, shape in (item for group in groups for item in group.items()):
        share = math.ceil(shape.numel() / files.num_ranks)
        found[name] = (shape, joined_reader(parts, offset, share))
        offset += share
    for rows, path in zip(parts, files.optim_paths, strict=True):
        available = sum(row.numel() for row in rows)
        if available != offset:
            raise CheckpointError(f"holds {available} values of fp32 weights, its share is {offset}.", where=str(path))
    return found


def joined_reader(parts: Sequence[Sequence[torch.Tensor]], offset: int, share: int) -> Reader:
    """Reads a weight of which each rank holds `share` values at `offset`; the last rank's part ends in padding."""

    def read(start: int, target: torch.Tensor) -> None:
        done = 0
        while done < target.numel():
            rank, within = divmod(start + done, share)
            count = min(share - within, target.numel() - done)
            copy_span(target[done : done + count], parts[rank], offset + within)
            done += count

    return read


def tensor_reader(tensor: torch.Tensor) -> Reader:
    """Reads a weight that a file holds whole."""
    if tensor.is_contiguous():
        return span_reader([tensor.view(-1)], 0)
    # Its values lie scattered in the file, after a change of the memory format say: they are put in order first.
    return lambda start, target: target.copy_(tensor.flatten()[start : start + target.numel()])


def _frozen(files: ShardFiles) -> _Found:
    """Stage 3: frozen weights from every rank's fragments. Below, the model states hold them whole."""
    if files.stage != 3:
        return {}
    found: _Found = {}
    for name, shape in files.frozen_shapes.items():
        fragments = []
        for state, path in zip(files.model, files.model_paths, strict=True):
            fragment = (state.get("frozen_param_fragments") or {}).get(name)
            if not isinstance(fragment, torch.Tensor):
                raise CheckpointError(f"holds no part of the frozen weight {name}.", where=str(path))
            fragments.append([flat_values(fragment, name, path)])
        share, size = fragments[0][0].numel(), shape.numel()
        if any(rows[0].numel() != share for rows in fragments) or share * len(fragments) < size:
            raise CheckpointError(
                f"the parts of the frozen weight {name} do not add up to {size} values.", where=str(files.folder)
            )
        found[name] = (shape, joined_reader(fragments, 0, share))
    return found


def _trained_plain(files: ShardFiles) -> _Found:
    """Stage 0 in bf16: fp32 weights stand beside the optimizer, group by group and without names.

    Each belongs to the weight that its rounding gives. Candidates are taken in the model's order, so that two weights
    with equal values (fresh norms, say) are not confused; what has no fp32 twin is left to the model states.
    """
    optimizer = files.model[0].get("optimizer")
    groups = optimizer.get("fp32_groups") if isinstance(optimizer, dict) else None
    if not groups:
        return {}
    module: dict[str, torch.Tensor] = files.model[0]["module"]
    buffers = set(files.model[0].get("buffer_names") or ())
    names = [name for name in module if name not in buffers and name not in _aliases(files.model[0], module)]
    found: _Found = {}
    for group in groups:
        start = 0
        for master in group:
            order = [*names[start:], *names[:start]]
            name = next((n for n in order if n not in found and _rounds_to(master, module[n])), None)
            if name is None:
                raise CheckpointError(
                    f"a fp32 weight of shape {list(master.shape)} is the twin of no weight of the model.",
                    where=str(files.model_paths[0]),
                )
            found[name] = (master.shape, tensor_reader(master))
            start = names.index(name) + 1
    return found


def _rounds_to(master: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `weight` is `master` rounded; looks at them piece by piece, and mostly at the first one only."""
    if master.shape != weight.shape:
        return False
    read_master, read_weight, numel = tensor_reader(master), tensor_reader(weight), master.numel()
    for start in range(0, numel, _COMPARED):
        count = min(_COMPARED, numel - start)
        wide, narrow = torch.empty(count, dtype=master.dtype), torch.empty(count, dtype=weight.dtype)
        read_master(start, wide)
        read_weight(start, narrow)
        if not torch.equal(wide.to(weight.dtype), narrow):
            return False
    return True


def _flat_tensors(state: Mapping[str, Any], key: str, path: Path) -> list[torch.Tensor]:
    rows = state.get(key)
    if not isinstance(rows, list | tuple) or not all(isinstance(row, torch.Tensor) for row in rows):
        raise CheckpointError(
            f"holds no fp32 weights ({key}).", where=str(path), hint="Only ZeRO checkpoints of DeepSpeed are read."
        )
    return [flat_values(row, key, path) for row in rows]


def flat_values(tensor: torch.Tensor, name: str, path: Path) -> torch.Tensor:
    """A flat view of a mapped tensor. Raises `CheckpointError` where that takes a copy, which would not be bounded."""
    if not tensor.is_contiguous():
        raise CheckpointError(f"the values of {name} do not lie one after another.", where=str(path))
    return tensor.view(-1)


def _aliases(first: Mapping[str, Any], module: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Further names of tied weights, each with the first name: as DeepSpeed lists them, or by their storage."""
    listed = first.get("shared_params")
    if listed is not None:
        return dict(listed)
    seen: dict[tuple[object, ...], str] = {}
    aliases = {}
    for name, tensor in module.items():
        if tensor.numel() == 0:
            continue
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.dtype)
        if key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
    return aliases
