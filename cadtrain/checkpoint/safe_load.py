"""Reading a torch file without running code from it.

DeepSpeed's shards hold tensors, plain values and a few small classes of DeepSpeed's own. The unpickler gets
exactly those; anything else in the file, a call to the shell say, is refused before it runs.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from cadtrain.errors import CheckpointError

ALLOWED_CLASSES = (
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""Classes that DeepSpeed 0.18 and 0.19 write into shards: enumerations and records that run nothing when built."""


def load_shard(path: Path, *, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """What `path` holds. Raises `CheckpointError` if it is no torch file, is cut off, or asks for a class outside the list."""
    import importlib

    classes = []
    for name in ALLOWED_CLASSES:
        module, _, attribute = name.rpartition(".")
        classes.append(getattr(importlib.import_module(module), attribute))
    with torch.serialization.safe_globals(classes):
        try:
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "not a torch file"
            raise CheckpointError(
                f"refused: the file asks for code or classes that a checkpoint does not need ({reason})",
                where=str(path),
                hint="Nothing of it was run. Take the checkpoint from a source that you trust.",
            ) from error
        except Exception as error:  # a damaged pickle fails in any way: AssertionError, TypeError, struct.error, …
            raise CheckpointError(
                f"cannot be read: {str(error) or type(error).__name__}",
                where=str(path),
                hint="The file is damaged or cut off.",
            ) from error
