"""Reading a torch file without running code from it.

DeepSpeed's shards hold tensors, plain values and a few small classes of DeepSpeed's own. The unpickler gets
exactly those; anything else in the file, a call to the shell say, is refused before it runs. Neither may a file make
the reader take more memory than its own size: compressed records and tensors that claim more are refused as well. A mapped
tensor that claims more values than its record has gets what follows in the file, and never what lies behind its end.
"""

from __future__ import annotations

import pickle
import sys
import zipfile
from collections.abc import Iterator
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

_UNTRUSTED = "Nothing of it was run. Take the checkpoint from a source that you trust."


class StandIn:
    """Takes the place of one of DeepSpeed's records where only the tensors beside them are wanted."""

    def __init__(self, *values: Any) -> None:
        self.values = values


def load_shard(path: Path, *, map_location: Any = "cpu", mmap: bool = False, stand_ins: bool = False) -> Any:
    """What `path` holds. Raises `CheckpointError` if it is no torch file, is cut off, asks for a class outside the list,
    or would take more memory than its size.

    `stand_ins` puts `StandIn` in the place of DeepSpeed's classes, so that DeepSpeed need not be imported.
    """
    _check_records(path)
    with torch.serialization.safe_globals(_classes(stand_ins)):
        try:
            content = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "not a torch file"
            raise CheckpointError(
                f"refused: the file asks for code or classes that a checkpoint does not need ({reason})",
                where=str(path),
                hint=_UNTRUSTED,
            ) from error
        except Exception as error:  # a damaged pickle fails in any way: AssertionError, TypeError, struct.error, …
            raise CheckpointError(
                f"cannot be read: {str(error) or type(error).__name__}",
                where=str(path),
                hint="The file is damaged or cut off.",
            ) from error
    _check_tensors(content, path)
    return content


def _classes(stand_ins: bool) -> list[Any]:
    """The allowed classes, or stand-ins under their names, as torch's unpickler wants to be told of them."""
    import importlib

    if stand_ins:
        return [(type(name.rpartition(".")[2], (StandIn,), {}), name) for name in ALLOWED_CLASSES]
    names = (name.rpartition(".") for name in ALLOWED_CLASSES)
    return [getattr(importlib.import_module(module), attribute) for module, _, attribute in names]


def _check_records(path: Path) -> None:
    """A torch file's records are stored as they are; a compressed one could unpack to a thousand times its size."""
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED:
                    raise CheckpointError(
                        f"refused: its record {record.filename} is compressed, which torch.save never does",
                        where=str(path),
                        hint=_UNTRUSTED,
                    )
                if record.filename.endswith("/byteorder"):
                    # A mapped file cannot be turned round: what is dropped from memory comes back as it lies on the disk.
                    order = archive.read(record).decode("ascii", "replace")
                    if order != sys.byteorder:
                        raise CheckpointError(
                            f"was written with {order!r} byte order, this machine is {sys.byteorder}-endian.",
                            where=str(path),
                        )
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError):
        return  # no zip file, or a broken one: torch says which


def _check_tensors(content: Any, path: Path) -> None:
    """A tensor may claim any shape, strides of 0 included; none can be larger than the file that holds it."""
    size = path.stat().st_size
    for tensor in _tensors(content):
        if tensor.layout != torch.strided or tensor.is_meta or tensor.numel() * tensor.element_size() > size:
            raise CheckpointError(
                f"refused: it claims a {tensor.layout} tensor of shape {list(tensor.shape)} in {size} bytes",
                where=str(path),
                hint=_UNTRUSTED,
            )


def _tensors(content: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested dicts and lists; one that stands in several places once for each."""
    seen: set[int] = set()
    waiting = [content]
    while waiting:
        item = waiting.pop()
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, dict | list | tuple | set) and id(item) not in seen:
            seen.add(id(item))
            waiting.extend(item.values() if isinstance(item, dict) else item)
