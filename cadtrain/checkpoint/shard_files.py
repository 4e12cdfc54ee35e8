"""The files of one DeepSpeed checkpoint: which are there, whether they belong together, and what they hold.

    mp_rank_00_model_states.pt                      ZeRO 0 to 2: all weights in the training type, written by rank 0
    zero_pp_rank_N_mp_rank_00_model_states.pt       ZeRO 3: buffers, and rank N's share of the frozen weights
    [bf16_]zero_pp_rank_N_mp_rank_00_optim_states.pt    ZeRO 1 to 3: rank N's share of the fp32 weights

Weights that do not learn may lie in a folder that several checkpoints share (`frozen`); they are put back here.
Files are mapped, not read: what is not asked for never enters memory.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from cadtrain.checkpoint.frozen import with_frozen
from cadtrain.checkpoint.safe_load import load_shard
from cadtrain.errors import CheckpointError

_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MOST_RANKS, _MOST_VALUES = 1 << 16, 1 << 48
"""More than any checkpoint has; a file that claims more is not believed."""


@dataclass(frozen=True, slots=True)
class ShardFiles:
    """Opened files of one checkpoint, in rank order. `model` has one entry below stage 3; `optim` none at stage 0."""

    folder: Path
    stage: Literal[0, 1, 2, 3]
    num_ranks: int
    model: tuple[dict[str, Any], ...]
    optim: tuple[dict[str, Any], ...]
    model_paths: tuple[Path, ...]
    optim_paths: tuple[Path, ...]

    @property
    def groups(self) -> list[dict[str, torch.Size]]:
        """Shapes of the trained weights, group by group in the optimizer's order; ZeRO 1 to 3."""
        rows = self.model[0].get("param_shapes")
        if not isinstance(rows, list | tuple) or not rows:
            raise CheckpointError("names no trained weights (param_shapes).", where=str(self.model_paths[0]))
        groups = [_shapes(group, "param_shapes", self.model_paths[0]) for group in rows]
        names = Counter(name for group in groups for name in group)
        if twice := [name for name, count in names.items() if count > 1]:
            raise CheckpointError(f"its param_shapes name {twice[0]} twice.", where=str(self.model_paths[0]))
        return groups

    @property
    def frozen_shapes(self) -> dict[str, torch.Size]:
        """Shapes of the frozen weights, where the files list them."""
        return _shapes(self.model[0].get("frozen_param_shapes") or {}, "frozen_param_shapes", self.model_paths[0])

    def gaps(self, number: int) -> list[int]:
        """Unused values behind each weight of group `number` in the group's vector; ZeRO 1 and 2."""
        count = len(self.groups[number])
        rows = self.optim[0].get("param_alignment_paddings")
        if not rows:
            return [0] * count
        gaps = list(rows[number]) if isinstance(rows, list | tuple) and number < len(rows) else []
        if len(gaps) != count or not all(isinstance(gap, int) and gap >= 0 for gap in gaps):
            raise CheckpointError(
                f"its gaps between the {count} weights of group {number} are {str(gaps)[:80]} (param_alignment_paddings).",
                where=str(self.optim_paths[0]),
            )
        return gaps


def is_shard_folder(folder: Path) -> bool:
    """Whether `folder` holds files that DeepSpeed's `save_checkpoint` writes."""
    return folder.is_dir() and any(_MODEL.fullmatch(path.name) for path in folder.iterdir())


def open_shard_files(folder: Path) -> ShardFiles:
    """Open the checkpoint in `folder` and check that it is whole.

    Raises `CheckpointError` that names the file: a rank's file missing, files of another number of ranks mixed in,
    model- or pipeline-parallel shards, a file that is damaged or asks for code to be run.
    """
    if not folder.is_dir():
        raise CheckpointError("there is no such folder.", where=str(folder))
    model_paths = _by_rank(folder, _MODEL)
    optim_paths = _by_rank(folder, _OPTIM)
    if not model_paths:
        raise CheckpointError("holds no DeepSpeed model states.", where=str(folder), hint="Give a checkpoint folder.")
    is_partitioned = None not in model_paths
    if is_partitioned and not optim_paths:
        raise CheckpointError(
            "holds ZeRO-3 model states but no optimizer states, where the weights are.", where=str(folder)
        )
    first_path = model_paths[0] if is_partitioned else model_paths[None]
    first = _opened(first_path, "module")
    num_ranks = first.get("dp_world_size") or max(len(optim_paths), 1)
    if not isinstance(num_ranks, int) or not 1 <= num_ranks <= _MOST_RANKS:
        raise CheckpointError(f"claims to be of {str(num_ranks)[:40]} ranks.", where=str(first_path))
    wanted = [*range(num_ranks)]
    if optim_paths:
        _check_ranks(folder, optim_paths, wanted, "optim_states")
    if is_partitioned:
        _check_ranks(folder, model_paths, wanted, "model_states")
    ordered_model = tuple(model_paths[rank] for rank in wanted) if is_partitioned else (first_path,)
    ordered_optim = tuple(optim_paths[rank] for rank in wanted) if optim_paths else ()
    return ShardFiles(
        folder=folder,
        stage=_stage(first, is_partitioned=is_partitioned, has_optim=bool(optim_paths)),
        num_ranks=num_ranks,
        model=(first, *(_opened(path, "module") for path in ordered_model[1:])),
        optim=tuple(_checked_optim(path, num_ranks) for path in ordered_optim),
        model_paths=ordered_model,
        optim_paths=ordered_optim,
    )


def _by_rank(folder: Path, pattern: re.Pattern[str]) -> dict[int | None, Path]:
    """Files that match, by data-parallel rank; None for a file that rank 0 writes for all."""
    found: dict[int | None, Path] = {}
    for path in sorted(folder.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None:
            continue
        if path.resolve().parent != folder.resolve():
            raise CheckpointError(
                "is a link out of its folder, which is not followed.",
                where=str(path),
                hint="If the checkpoint is yours, copy it with `cp -rL`.",
            )
        if int(match[2]) != 0:
            raise CheckpointError(
                "is a shard of a tensor-parallel model, which cadtrain does not write and cannot join.", where=str(path)
            )
        rank = int(match[1]) if match[1] is not None else None
        if rank in found:
            raise CheckpointError(
                f"and {found[rank].name} claim the same rank: two checkpoints are mixed here.", where=str(path)
            )
        found[rank] = path
    if None in found and len(found) > 1:
        raise CheckpointError(
            f"{found[None].name} lies beside ZeRO-3 model states: two checkpoints are mixed.", where=str(folder)
        )
    return found


def _check_ranks(folder: Path, found: Mapping[int | None, Path], wanted: Sequence[int], kind: str) -> None:
    missing = [rank for rank in wanted if rank not in found]
    extra = [path.name for rank, path in found.items() if rank not in wanted]
    if missing:
        raise CheckpointError(
            f"the checkpoint was saved by {len(wanted)} ranks; the {kind} of rank {_some(missing)} are missing.",
            where=str(folder),
            hint="Copy the whole folder, from the disks of all nodes.",
        )
    if extra:
        raise CheckpointError(
            f"the checkpoint was saved by {len(wanted)} ranks, but {_some(extra)} belongs to more.",
            where=str(folder),
            hint="Files of an older checkpoint lie in this folder; remove them.",
        )


def _some(items: Sequence[object]) -> str:
    return ", ".join(map(str, items[:5])) + (f" and {len(items) - 5} more" if len(items) > 5 else "")


def _shapes(rows: Any, key: str, path: Path) -> dict[str, torch.Size]:
    """Names and shapes as a file lists them, checked: sizes are what memory is asked for later."""
    if not isinstance(rows, dict):
        raise CheckpointError(f"its {key} are no names and shapes.", where=str(path))
    found = {}
    for name, shape in rows.items():
        is_shape = isinstance(shape, list | tuple) and all(isinstance(n, int) and n >= 0 for n in shape)
        if not isinstance(name, str) or not is_shape or math.prod(shape) > _MOST_VALUES:
            raise CheckpointError(f"its {key} give {str(name)[:80]} the shape {str(shape)[:80]}.", where=str(path))
        found[name] = torch.Size(shape)
    return found


def _opened(path: Path, key: str) -> dict[str, Any]:
    content = load_shard(path, mmap=True, stand_ins=True)
    if not isinstance(content, dict) or not isinstance(content.get(key), dict):
        raise CheckpointError(f"holds no {key!r}: it is not what DeepSpeed writes.", where=str(path))
    content = with_frozen(content, path, partial(load_shard, mmap=True, stand_ins=True))
    if key == "module" and not all(isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in content[key].items()):
        raise CheckpointError("its 'module' holds more than names and tensors.", where=str(path))
    return content


def _checked_optim(path: Path, num_ranks: int) -> dict[str, Any]:
    state: dict[str, Any] = _opened(path, "optimizer_state_dict")["optimizer_state_dict"]
    count = state.get("partition_count")
    counts: set[int] = set(count if isinstance(count, list) else [count]) - {None}
    if counts and counts != {num_ranks}:
        raise CheckpointError(
            f"is one of {max(counts)} shares, the model states are of {num_ranks} ranks.", where=str(path)
        )
    return state


def _stage(first: Mapping[str, Any], *, is_partitioned: bool, has_optim: bool) -> Literal[0, 1, 2, 3]:
    if is_partitioned:
        return 3
    if not has_optim:
        return 0
    # Only stage 2 and above list frozen weights, and only where there are some: below 3 the stages read alike.
    return 1 if first.get("frozen_param_shapes") is None else 2
