"""A trained model as a Hugging Face folder, in bounded memory.

Legend: R rank of an adapter, I and O input and output width of the layer it stands beside.

Everything here is tensor arithmetic on names: no model is held, so a checkpoint larger than memory can pass through.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedTokenizerBase

from cadtrain.errors import CheckpointError, UsageError
from cadtrain.model.cad_mllm import CadMllm, CadMllmConfig

DEFAULT_SHARD_BYTES = 5 << 30

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


def write_folder(
    folder: Path,
    *,
    config: CadMllmConfig,
    weights: Iterable[tuple[str, torch.Tensor]],
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Path:
    """Write a folder that `CadMllm.from_pretrained` opens, and `AutoModel` once `cadtrain.model` is imported.

    `weights` are those of a model without adapters (see `merge_lora`), in any order; at most `max_shard_bytes` of them
    are held at once. `dtype` casts the floating ones. A tied head is written once, as the embedding. The folder appears
    whole or not at all. Raises CheckpointError when weights are missing, left over or of another shape, and UsageError
    when the folder exists.
    """
    if folder.exists():
        raise UsageError(f"{folder} exists already.", hint="Choose another folder, or remove it first.")
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        published = _published((name, _cast(tensor, dtype)) for name, tensor in weights)
        found_dtype = _write_shards(temporary, _checked(published, _expected_shapes(config)), max_shard_bytes)
        _write_descriptions(temporary, config, tokenizer, dtype or found_dtype)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def export_model(
    model: CadMllm, folder: Path, *, tokenizer: PreTrainedTokenizerBase, max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> Path:
    """Write a live, whole model as a folder, its adapters merged."""
    weights: Iterable[tuple[str, torch.Tensor]] = model.state_dict().items()
    adapters = getattr(model.language, "peft_config", None)
    if adapters:
        settings = adapters[_ADAPTER]
        weights = merge_lora(model.state_dict(), alpha=settings.lora_alpha, rank=settings.r)
    return write_folder(
        folder, config=model.config, weights=weights, tokenizer=tokenizer, max_shard_bytes=max_shard_bytes
    )


def _expected_shapes(config: CadMllmConfig) -> dict[str, torch.Size]:
    """Published name and shape of every weight of the model that `config` describes; a tied weight once."""
    with torch.device("meta"):
        model = CadMllm(config)
    kept = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(kept.items())}
    once = ((name, tensor) for name, tensor in kept.items() if first[id(tensor)] == name)
    return {name: tensor.shape for name, tensor in _published(once)}


def _checked(
    weights: Iterable[tuple[str, torch.Tensor]], expected: dict[str, torch.Size]
) -> Iterator[tuple[str, torch.Tensor]]:
    seen: set[str] = set()
    for name, tensor in weights:
        if name == _HEAD and name not in expected:
            continue  # tied to the embedding
        if name not in expected:
            raise CheckpointError(f"the model has no weight called {name}; adapters must be merged before.")
        if tensor.shape != expected[name]:
            raise CheckpointError(f"{name} has shape {list(tensor.shape)}, the model wants {list(expected[name])}.")
        if name in seen:
            raise CheckpointError(f"{name} was given twice.")
        seen.add(name)
        yield name, tensor
    missing = sorted(set(expected) - seen)
    if missing:
        raise CheckpointError(
            f"{len(missing)} of the model's {len(expected)} weights are missing, the first is {missing[0]}."
        )


def _published(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights under the names that files carry; DINOv2's gate and up projection are one weight there."""
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights:
        if not name.startswith("image_encoder."):
            yield name, tensor
            continue
        half = re.search(r"\.mlp\.(gate|up)_proj\.", name)
        if half:
            joined = name.replace(half[0], ".mlp.weights_in.")
            pair = halves.setdefault(joined, {})
            pair[half[1]] = tensor
            if len(pair) == 2:
                yield joined, torch.cat([pair["gate"], pair["up"]])
                del halves[joined]
            continue
        for pattern, replacement in _DINOV2_NAMES:
            name = pattern.sub(replacement, name)
        yield name, tensor


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    tensor = tensor.detach()
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    return tensor.cpu().contiguous()


def _write_shards(folder: Path, weights: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int) -> torch.dtype:
    """Write safetensors files and, for more than one, their index; gives the dtype of the first floating weight."""
    parts: list[tuple[Path, list[str]]] = []
    batch: dict[str, torch.Tensor] = {}
    size = total = 0
    dtype: torch.dtype | None = None

    def flush() -> None:
        path = folder / f"part-{len(parts):05d}.safetensors"
        save_file(batch, path, metadata={"format": "pt"})
        parts.append((path, list(batch)))
        batch.clear()

    for name, tensor in weights:
        if batch and size + tensor.nbytes > max_shard_bytes:
            flush()
            size = 0
        batch[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
        dtype = dtype or (tensor.dtype if tensor.is_floating_point() else None)
    flush()
    if len(parts) == 1:
        parts[0][0].rename(folder / "model.safetensors")
    else:
        _name_shards(folder, parts, total)
    return dtype or torch.float32


def _name_shards(folder: Path, parts: list[tuple[Path, list[str]]], total: int) -> None:
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(parts, start=1):
        final = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        path.rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_descriptions(
    folder: Path, config: CadMllmConfig, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> None:
    described = CadMllmConfig.from_dict({**config.to_dict(), "architectures": [CadMllm.__name__]})
    described.dtype = dtype
    described.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)
