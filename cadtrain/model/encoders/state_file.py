"""State dicts from safetensors and torch files of other people, read without running anything from them.

Legend: none; tensors are handled by name.

A PyTorch Lightning checkpoint, as Michelangelo's, holds records of its own classes (hyper-parameters, callbacks) beside the
weights. These classes are not imported: inert stand-ins take their place. Any other class or function that a file
asks for is refused.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cadtrain.errors import ConfigError, Fault

_RECORDS = ("omegaconf.", "pytorch_lightning.", "lightning.", "lightning_fabric.", "lightning_utilities.")
_KINDS = ("typing.Any", *(f"builtins.{name}" for name in ("dict", "list", "tuple", "set", "int", "float", "bool", "str")))
"""What OmegaConf's records name as the types of their fields."""


class _StandIn:
    """Takes any arguments and state, and keeps none."""

    def __init__(self, *values: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _stand_in_dict(*values: Any) -> dict[Any, Any]:
    """In the place of `defaultdict`, to which torch's reader adds no items."""
    return {}


def read_state(path: Path, *, where: str) -> dict[str, torch.Tensor]:
    """The tensors of a `.safetensors` file or a torch file (`.bin`, `.pt`, `.ckpt`) by name, mapped from it where it allows that.

    Of a checkpoint with a `state_dict` that one is taken. Raises ConfigError at `where` for a file that cannot be read,
    holds no state dict, or asks for classes that no state dict needs.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = _read_torch_file(path)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        hint = (
            "Nothing of it was run. Save its state dict alone: `torch.save(checkpoint['state_dict'], 'weights.bin')`."
        )
        raise ConfigError(
            [Fault(where, f"{path} could not be read as a state dict: {_reason(error)}.", hint)]
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ConfigError([Fault(where, f"{path} holds no state dict: a mapping of names to tensors")])
    return dict(state)


def _read_torch_file(path: Path) -> Any:
    if not zipfile.is_zipfile(path):  # from before torch 1.6: cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True)
    with zipfile.ZipFile(path) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise ValueError("its records are compressed, which torch.save never does")
    asked = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    stand_ins: list[Any] = [
        (type(name.rpartition(".")[2], (_StandIn,), {}), name)
        for name in asked
        if name.startswith(_RECORDS) or name in _KINDS
    ]
    stand_ins.append((_stand_in_dict, "collections.defaultdict"))
    with torch.serialization.safe_globals(stand_ins):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _reason(error: Exception) -> str:
    """The part of torch's long message that says what is wrong; the rest of it advises to read the file unsafely."""
    text = str(error).strip()
    if found := re.search(r"(?i)unsupported (?:global: )?GLOBAL (\S+)", text):
        return f"it asks for {found[1]}, which no state dict needs"
    _, _, rest = text.partition("WeightsUnpickler error:")
    return (rest or text or type(error).__name__).strip().splitlines()[0].rstrip(".")
