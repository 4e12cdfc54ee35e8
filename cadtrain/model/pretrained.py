"""Pretrained weights, read tensor by tensor into a language model whose weights are shared out between ranks.

Legend: none; weights are handled by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from cadtrain.errors import ConfigError, Fault
from cadtrain.model.weights import Sharding

_WHERE = "model.language.pretrained"
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


@torch.no_grad()
def fill_from_files(model: PreTrainedModel, source: str, sharding: Sharding) -> None:
    """Read the safetensors files of `source` (a folder or hub name) into `model`, one weight at a time.

    All ranks call this; only the source rank reads tensors, so no rank ever holds more than one whole weight besides
    its share. Embedding and head may have more rows than the files; those behind theirs are left alone. Raises ConfigError naming weights that are missing, left over or of another shape.
    """
    files = _weight_files(source)
    parameters = dict(model.named_parameters())
    ignored = {name for name in files if name.endswith("inv_freq")} | set(model.all_tied_weights_keys)
    faults = [
        *_names_fault(source, "lacks", set(parameters) - set(files)),
        *_names_fault(source, "has weights that the model lacks:", set(files) - set(parameters) - ignored),
    ]
    if faults:
        raise ConfigError(faults)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    can_grow = {id(parameter) for module in ends for parameter in module.parameters(recurse=False)}
    for path in sorted(set(files.values())):
        with _opened(path) as tensors:
            for name in sorted(name for name in parameters if files[name] == path):
                _fill(parameters[name], name, tensors, sharding, can_grow=id(parameters[name]) in can_grow)


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    """The file, whose header safetensors has checked; raises ConfigError where it is damaged or lies about its content."""
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        hint = "Fetch the weights again, from a source that you trust."
        raise ConfigError([Fault(_WHERE, f"{path} could not be read: {error}.", hint)]) from error


def _fill(parameter: nn.Parameter, name: str, tensors: safe_open, sharding: Sharding, *, can_grow: bool) -> None:
    found = tuple(tensors.get_slice(name).get_shape())
    wanted = tuple(getattr(parameter, "ds_shape", parameter.shape))  # the shape of a shared-out weight itself is empty
    if found != wanted and not (can_grow and found[0] < wanted[0] and found[1:] == wanted[1:]):
        raise ConfigError([Fault(_WHERE, f"{name} has shape {list(found)}, the model wants {list(wanted)}")])
    with sharding.gather([parameter]):
        if sharding.is_source:
            target = parameter.data[: found[0]] if can_grow else parameter.data
            target.copy_(tensors.get_tensor(name))


def _weight_files(source: str) -> dict[str, Path]:
    """The file that holds each weight of `source`, which is downloaded first if it is no folder."""
    folder = Path(source)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json"]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise ConfigError([Fault(_WHERE, f"the weights of {source!r} could not be fetched: {error}")]) from error
    if (folder / _INDEX).is_file():
        return _indexed(folder)
    if not (folder / _SINGLE).is_file():
        hint = "Save the model with `save_pretrained` first, or train with a lower ZeRO stage."
        raise ConfigError([Fault(_WHERE, f"{folder} has no {_SINGLE}; only safetensors are read under ZeRO-3.", hint)])
    with _opened(folder / _SINGLE) as tensors:
        return dict.fromkeys(tensors.keys(), folder / _SINGLE)


def _indexed(folder: Path) -> dict[str, Path]:
    """What the index says; its files are names inside `folder`, and no path that leads out of it."""
    try:
        weight_map = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError([Fault(_WHERE, f"{folder / _INDEX} is no index of weights: {error}.")]) from error
    if odd := sorted(file for file in files.values() if file != Path(file).name or not file.endswith(".safetensors")):
        raise ConfigError(
            [Fault(_WHERE, f"{folder / _INDEX} names {odd[0]!r}, which is no safetensors file of its folder.")]
        )
    return {name: folder / file for name, file in files.items()}


def _names_fault(source: str, says: str, names: Iterable[str]) -> list[Fault]:
    listed = sorted(names)
    if not listed:
        return []
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    hint = "Where the model's names differ from its files', train with a lower ZeRO stage."
    return [Fault(_WHERE, f"{source!r} {says} {', '.join(listed[:3])}{more}.", hint)]
