"""Pretrained weights of transformers models: whole on every rank, or each rank its share from the mapped files.

Either way a weight that the files lack is a fault. transformers would only report it, and training would begin from noise.

Legend: none; weights are handled by name.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from cadtrain import hub
from cadtrain.errors import ConfigError, Fault
from cadtrain.model.weights import Sharding

_WHERE = "model.language.pretrained"
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_MORE = "has weights that the model lacks:"
_OLDER = " Under a lower ZeRO stage transformers brings the names of older files to its own."


def load_whole(kind: Any, source: str, *, where: str, may_have_more: bool = False, **options: Any) -> Any:
    """The model that `kind.from_pretrained(source, **options)` gives, with every weight of it read from the files.

    `may_have_more`: the files may hold weights that the model has no place for, a classifier on top say. Raises ConfigError
    at `where` for files that cannot be read, and naming weights that are missing, left over or of another shape.
    """
    hub.require(source, where, *hub.WEIGHT_FILES)
    try:
        # Other shapes are told of below, by name; transformers' own error names none.
        model, info = kind.from_pretrained(source, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except (OSError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
        raise ConfigError([Fault(where, f"the weights of {source!r} could not be loaded: {error}")]) from error
    shapes = [(name, list(found), list(wanted)) for name, found, wanted in info["mismatched_keys"]]
    other = {name for name, _, _ in shapes}
    faults = [
        *_names_fault(source, "lacks", set(info["missing_keys"]) - other, where=where),
        *(Fault(where, f"{name} has shape {found}, the model wants {wanted}") for name, found, wanted in shapes[:3]),
    ]
    if not may_have_more:
        faults += _names_fault(source, _MORE, set(info["unexpected_keys"]) - other, where=where)
    if faults:
        raise ConfigError(faults)
    return model


@torch.no_grad()
def fill_from_files(model: PreTrainedModel, source: str, sharding: Sharding) -> None:
    """Read the safetensors files of `source` (a folder or hub name) into `model`, one weight at a time.

    All ranks call this. Each reads its own share of a weight from the mapped file, so that together they read the files
    once, nothing is sent, and no rank holds more than its share; a weight whose share cannot be written in place is read by
    the source rank and sent. Embedding and head may have more rows than the files; those behind theirs are left alone.
    Raises ConfigError naming weights that are missing, left over or of another shape.
    """
    parameters = dict(model.named_parameters())
    files = _weight_files(source)
    places = {_place(name, parameters, model.base_model_prefix): name for name in files}
    files = {place: files[name] for place, name in places.items()}
    ignored = {name for name in files if name.endswith("inv_freq")} | set(model.all_tied_weights_keys)
    faults = [
        *_names_fault(source, "lacks", set(parameters) - set(files), hint=_OLDER),
        *_names_fault(source, _MORE, set(files) - set(parameters) - ignored, hint=_OLDER),
    ]
    if faults:
        raise ConfigError(faults)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    can_grow = {id(parameter) for module in ends for parameter in module.parameters(recurse=False)}
    for path in sorted(set(files.values())):
        with _opened(path) as tensors:
            for name in sorted(name for name in parameters if files[name] == path):
                _fill(parameters[name], places[name], tensors, sharding, can_grow=id(parameters[name]) in can_grow)


def _place(name: str, parameters: Iterable[str], prefix: str) -> str:
    """What the model calls the files' `name`: a model saved without its head leaves out the prefix of all but the head."""
    return f"{prefix}.{name}" if name not in parameters and f"{prefix}.{name}" in parameters else name


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
    grows = can_grow and len(found) == len(wanted) and found[0] < wanted[0] and found[1:] == wanted[1:]
    if found != wanted and not grows:
        raise ConfigError([Fault(_WHERE, f"{name} has shape {list(found)}, the model wants {list(wanted)}")])
    share = sharding.share(parameter)
    if share is not None:
        # Of the mapped file only the pages of this rank's part are ever read.
        values = _mapped(tensors, name).view(-1)[share.start : share.start + share.held.numel()]
        share.held[: values.numel()].copy_(values)
        return
    with sharding.gather([parameter]):
        if sharding.is_source:
            target = parameter.data[: found[0]] if can_grow else parameter.data
            target.copy_(_mapped(tensors, name))


def _mapped(tensors: safe_open, name: str) -> torch.Tensor:
    """A view of the file. While a model is built the default device is the GPU, to which safetensors could bring the whole weight."""
    with torch.device("cpu"):
        values: torch.Tensor = tensors.get_tensor(name)
    return values


def _weight_files(source: str) -> dict[str, Path]:
    """The file that holds each weight of `source`, which is downloaded first if it is no folder."""
    folder = Path(source)
    if not folder.is_dir():
        hub.require(source, _WHERE, _SINGLE, _INDEX)
        try:
            folder = Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json"]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise ConfigError([Fault(_WHERE, f"the weights of {source!r} could not be fetched: {error}")]) from error
    if (folder / _INDEX).is_file():
        return _indexed(folder)
    if not (folder / _SINGLE).is_file():
        other = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".gguf", ".safetensors"))
        held = f" (it holds {', '.join(other[:3])})" if other else ""
        hint = (
            "Save the model as safetensors (`AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)`), or train with a "
            "lower ZeRO stage."
        )
        raise ConfigError([Fault(_WHERE, f"{folder} has no {_SINGLE}{held}; ZeRO-3 reads nothing else.", hint)])
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


def _names_fault(source: str, says: str, names: Iterable[str], *, where: str = _WHERE, hint: str = "") -> list[Fault]:
    listed = sorted(names)
    if not listed:
        return []
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    remedy = f"Do its `config.json` and its weights belong together?{hint}"
    return [Fault(where, f"{source!r} {says} {', '.join(listed[:3])}{more}.", remedy)]
