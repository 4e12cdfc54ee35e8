"""A trained model as a Hugging Face folder, in bounded memory.

Legend: R rank of an adapter, I and O input and output width of the layer it stands beside.

Everything here is tensor arithmetic on names: no model is held, so a checkpoint larger than memory can pass through.
Weights come as entries that are read piece by piece while they are written (`cadtrain.checkpoint.weight_files`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from cadtrain.checkpoint.weight_files import DEFAULT_SHARD_BYTES, Entry, Written, entries_of, write_sharded
from cadtrain.errors import CheckpointError, UsageError
from cadtrain.model.cad_mllm import CadMllm, CadMllmConfig

PREPROCESSOR = "preprocessor_config.json"

_HEAD = "language.lm_head.weight"
_BASE, _LORA = ".base_layer.", re.compile(r"\.(lora_[A-Za-z_]+|added_rows)(\.|$)")
_ROWS = "added_rows.weight"
_ADAPTER = "default"

_DINOV2_QKV = {"q": "query", "k": "key", "v": "value"}
# Releases of transformers differ in how they call DINOv2's layers; files keep the names of the released weights, which
# all of them read.
_DINOV2_NAMES = (
    (re.compile(r"\.attention\.([qkv])_proj\."), lambda found: f".attention.attention.{_DINOV2_QKV[found[1]]}."),
    (re.compile(r"\.attention\.o_proj\."), lambda found: ".attention.output.dense."),
    (re.compile(r"\.mlp\.down_proj\."), lambda found: ".mlp.weights_out."),
)


def merge_lora(weights: Mapping[str, torch.Tensor], *, alpha: float, rank: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of the same model without adapters: each `base_layer` [O, I] plus B A · alpha / rank, in fp32, and the
    last rows of embedding and head plus what was learnt of them (`cadtrain.model.vocabulary`).

    `weights` may read its tensors lazily: each is asked for once, and only one layer is held at a time. Results have the
    base weight's dtype and the names of a model that never had adapters. Weights without adapters pass through.
    Raises CheckpointError for an adapter that lacks a half, is of another rank, or is of a kind not merged here.
    """
    used: set[str] = set()
    for name in weights:
        if _LORA.search(name):
            continue
        tensor = weights[name]
        stem = name.split(_BASE)[0]
        down, up = (f"{stem}.lora_{half}.{_ADAPTER}.weight" for half in "AB")
        if _BASE in name and name.endswith(".weight") and (down in weights or up in weights):
            if down not in weights or up not in weights:
                raise CheckpointError(f"the adapter of {stem} has only one of its two halves, lora_A and lora_B.")
            tensor = _merged(tensor, weights[down], weights[up], stem, alpha, rank)
            used |= {down, up}
        rows = f"{stem}.{_ROWS}"
        if _BASE in name and name.endswith(".weight") and rows in weights:
            tensor = _with_rows(tensor, weights[rows], stem)
            used.add(rows)
        yield name.replace(_BASE, "."), tensor
    left = sorted(name for name in weights if _LORA.search(name) and name not in used)
    if left:
        raise CheckpointError(
            f"{len(left)} adapter weights fit no layer, the first is {left[0]}; only linear layers are merged."
        )


def _merged(
    base: torch.Tensor, down: torch.Tensor, up: torch.Tensor, stem: str, alpha: float, rank: int
) -> torch.Tensor:
    if down.shape[0] != rank or up.shape[1] != rank:
        raise CheckpointError(f"the adapter of {stem} has rank {down.shape[0]}, but {rank} was given.")
    delta = (up.float() @ down.float()) * (alpha / rank)  # [O, I]
    return (base.float() + delta).to(base.dtype)


def _with_rows(base: torch.Tensor, rows: torch.Tensor, stem: str) -> torch.Tensor:
    """`base` [V, D] with `rows` [R, D] added to its last R."""
    if rows.shape[0] > base.shape[0] or rows.shape[1:] != base.shape[1:]:
        raise CheckpointError(
            f"the added rows of {stem} are {list(rows.shape)}, they fit no end of {list(base.shape)}."
        )
    start = base.shape[0] - rows.shape[0]
    merged = base.clone()
    merged[start:] = (base[start:].float() + rows.float()).to(base.dtype)
    return merged


def fill_folder(
    folder: Path,
    *,
    config: CadMllmConfig,
    entries: Sequence[Entry],
    tokenizer: PreTrainedTokenizerBase,
    facts: Mapping[str, Any] | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    written: Written = lambda name, piece: None,
) -> list[Path]:
    """Write what `CadMllm.from_pretrained` opens into the empty `folder`, and `AutoModel` once `cadtrain.model` is imported.

    `entries` are those of a model without adapters (see `merge_lora`), in any order; a tied head is written once, as the
    embedding. `facts` become `preprocessor_config.json`: how an input is made for the model. Gives the files of weights.
    Raises CheckpointError before anything is written when weights are missing, left over or of another shape.
    """
    checked = _checked(_published(entry for entry in entries if entry.alias_of is None), _expected_shapes(config))
    files = write_sharded(folder, checked, max_bytes=max_shard_bytes, written=written)
    dtype = next((entry.dtype for entry in checked if entry.dtype.is_floating_point), torch.float32)
    _write_descriptions(folder, config, tokenizer, dtype)
    if facts is not None:
        (folder / PREPROCESSOR).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return files


def write_folder(
    folder: Path,
    *,
    config: CadMllmConfig,
    weights: Mapping[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Path:
    """Write weights in memory as a new folder (see `fill_folder`); `dtype` casts the floating ones.

    The folder appears whole or not at all. Raises UsageError when it exists, and as `fill_folder` does.
    """
    if folder.exists():
        raise UsageError(f"{folder} exists already.", hint="Choose another folder, or remove it first.")
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        entries = entries_of(weights, dtype=dtype)
        fill_folder(temporary, config=config, entries=entries, tokenizer=tokenizer, max_shard_bytes=max_shard_bytes)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def export_model(
    model: CadMllm, folder: Path, *, tokenizer: PreTrainedTokenizerBase, max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> Path:
    """Write a live, whole model as a folder, its adapters merged; the merged weights stand in memory beside it."""
    weights = model.state_dict()
    adapters = getattr(model.language, "peft_config", None)
    if adapters:
        settings = adapters[_ADAPTER]
        weights = dict(merge_lora(weights, alpha=settings.lora_alpha, rank=settings.r))
    return write_folder(
        folder, config=model.config, weights=weights, tokenizer=tokenizer, max_shard_bytes=max_shard_bytes
    )


def _expected_shapes(config: CadMllmConfig) -> dict[str, torch.Size]:
    """Published name and shape of every weight of the model that `config` describes; a tied weight once."""
    with torch.device("meta"):
        model = CadMllm(config)
    kept = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(kept.items())}
    once = [
        Entry(name, tensor.shape, tensor.dtype, tuple) for name, tensor in kept.items() if first[id(tensor)] == name
    ]
    return {entry.name: entry.shape for entry in _published(once)}


def _checked(entries: Iterable[Entry], expected: dict[str, torch.Size]) -> list[Entry]:
    found: dict[str, Entry] = {}
    for entry in entries:
        name = entry.name
        if name == _HEAD and name not in expected:
            continue  # tied to the embedding
        if name not in expected:
            raise CheckpointError(f"the model has no weight called {name}; adapters must be merged before.")
        if entry.shape != expected[name]:
            raise CheckpointError(f"{name} has shape {list(entry.shape)}, the model wants {list(expected[name])}.")
        if name in found:
            raise CheckpointError(f"{name} was given twice.")
        found[name] = entry
    missing = sorted(set(expected) - set(found))
    if missing:
        raise CheckpointError(
            f"{len(missing)} of the model's {len(expected)} weights are missing, the first is {missing[0]}."
        )
    return list(found.values())


def _published(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Weights under the names that files carry; DINOv2's gate and up projection are one weight there."""
    halves: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        name = entry.name
        if not name.startswith("image_encoder."):
            yield entry
            continue
        half = re.search(r"\.mlp\.(gate|up)_proj\.", name)
        if half:
            joined = name.replace(half[0], ".mlp.weights_in.")
            pair = halves.setdefault(joined, {})
            pair[half[1]] = entry
            if len(pair) == 2:
                yield _stacked(joined, pair["gate"], pair["up"])
                del halves[joined]
            continue
        for pattern, replacement in _DINOV2_NAMES:
            name = pattern.sub(replacement, name)
        yield Entry(name, entry.shape, entry.dtype, entry.pieces)


def _stacked(name: str, first: Entry, second: Entry) -> Entry:
    """One entry of two, one above the other."""
    shape = torch.Size([first.shape[0] + second.shape[0], *first.shape[1:]])
    return Entry(name, shape, first.dtype, partial(_pieces_of, first.pieces, second.pieces))


def _pieces_of(*sources: Callable[[], Iterable[torch.Tensor]]) -> Iterator[torch.Tensor]:
    for source in sources:
        yield from source()


def _write_descriptions(
    folder: Path, config: CadMllmConfig, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> None:
    described = CadMllmConfig.from_dict({**config.to_dict(), "architectures": [CadMllm.__name__]})
    described.dtype = dtype
    described.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)
