"""Weights that do not learn, kept once a run: taken out of the shards that DeepSpeed hands over, and put back when they are read.

Where they stand in a shard of model states:

    ZeRO 0 to 2     whole, in `module`; DeepSpeed's stage 2 repeats them in `frozen_param_fragments`
    ZeRO 3          this rank's part of each in `frozen_param_fragments`; `module` has empty placeholders

They go into a file of the same name in `frozen-<hash of the content>/` beside the checkpoints, whose manifests say which.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash

from cadtrain.checkpoint.layout import MANIFEST, is_frozen_name
from cadtrain.checkpoint.manifest import FileRecord
from cadtrain.errors import CheckpointError

MODULE, FRAGMENTS = "module", "frozen_param_fragments"


def without_repeats(content: Any) -> Any:
    """Model states in which a fragment that `module` holds whole is the same tensor, so that it is written once."""
    if not isinstance(content, dict):
        return content
    module, fragments = content.get(MODULE), content.get(FRAGMENTS)
    if not isinstance(module, dict) or not isinstance(fragments, dict):
        return content
    same = {
        name: module[name] if name in module and module[name].shape == value.shape else value
        for name, value in fragments.items()
    }
    return {**content, FRAGMENTS: type(fragments)(same)}


def split_frozen(content: Any, names: Collection[str]) -> tuple[Any, dict[str, dict[str, torch.Tensor]]]:
    """Model states without the weights in `names`, and these: `{where they stood: {name: tensor}}`, empty if there are none.

    Anything else, optimizer states or a text, comes back as it is.
    """
    taken: dict[str, dict[str, torch.Tensor]] = {}
    if not isinstance(content, dict):
        return content, taken
    left = dict(content)
    for key in (MODULE, FRAGMENTS):
        held = content.get(key)
        if not isinstance(held, dict):
            continue
        # A placeholder of ZeRO-3 holds nothing and stays.
        found = {name: value for name, value in held.items() if name in names and value.numel()}
        if found:
            taken[key] = found
            left[key] = type(held)((name, value) for name, value in held.items() if name not in found)
    return left, taken


def merge_frozen(content: dict[str, Any], taken: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, Any]:
    """The opposite of `split_frozen`."""
    merged = dict(content)
    for key, found in taken.items():
        held = content.get(key) or {}
        merged[key] = type(held)({**held, **found})
    return merged


def with_frozen(content: dict[str, Any], shard: Path, load: Callable[[Path], Any]) -> dict[str, Any]:
    """The model states of the file `shard` with the frozen weights that its checkpoint keeps elsewhere; `load` reads a file.

    Raises `CheckpointError` where they should be there and are not.
    """
    folder = frozen_folder(shard.parent)
    if folder is None or not isinstance(content, dict) or MODULE not in content:
        return content
    path = folder / shard.name
    if not path.is_file():
        raise CheckpointError(
            f"its frozen weights are missing: there is no {folder.name}/{shard.name} beside it",
            where=str(shard.parent.parent),
            hint=f"Copy the folder {folder.name} from where the checkpoint was saved.",
        )
    taken = load(path)
    if not isinstance(taken, dict) or not set(taken) <= {MODULE, FRAGMENTS}:
        raise CheckpointError("does not hold frozen weights", where=str(path))
    return merge_frozen(content, taken)


def frozen_folder(shards: Path) -> Path | None:
    """The folder of frozen weights that belongs to a checkpoint's `engine` folder, None if it holds all its weights itself."""
    try:
        frozen = json.loads((shards.parent / MANIFEST).read_text(encoding="utf-8")).get("frozen")
        name = None if frozen is None else str(frozen["folder"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # a folder of DeepSpeed alone, or a manifest that its reader will refuse
    if name is None:
        return None
    if not is_frozen_name(name):
        raise CheckpointError(f"{name!r} is no folder of frozen weights", where=str(shards.parent / MANIFEST))
    return shards.parent.parent / name


def digest_of(records: Mapping[str, FileRecord]) -> str:
    """One hash of several files' names and contents."""
    rows = [f"{name} {record.size} {record.xxh3}" for name, record in sorted(records.items())]
    return xxhash.xxh3_64("\n".join(rows).encode()).hexdigest()
