"""One file of weights, written in bounded memory and put in place whole.

`.safetensors` is written as a stream: sizes are known before the first value. `torch.save` needs every tensor at
once, so a `.bin` passes through a scratch file that is mapped, not held; it needs the same room on the disk again.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cadtrain.errors import CheckpointError

_SAFETENSORS_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One weight to write: `dtype` is that of the file, `alias_of` an earlier entry whose values it shares."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    alias_of: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return self.shape.numel() * self.dtype.itemsize


@contextlib.contextmanager
def placed_whole(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that becomes `target` when the block ends well, and is removed otherwise."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_safetensors(path: Path, entries: Sequence[Entry], *, progress: Callable[[int], None]) -> None:
    """Write `entries` to `path`; tied weights once, their further names in the metadata as `{name: first name}`.

    `progress` gets the bytes of each weight written.
    """
    metadata = {"format": "pt"} | {entry.name: entry.alias_of for entry in entries if entry.alias_of is not None}
    stored = [entry for entry in entries if entry.alias_of is None]
    # The reader wants values aligned; widest types first keeps every start a multiple of its width.
    stored.sort(key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for entry in stored:
        kind = _SAFETENSORS_DTYPES.get(entry.dtype)
        if kind is None:
            raise CheckpointError(
                f"{entry.name} is of type {entry.dtype}, which safetensors cannot hold.", hint="Use a .bin."
            )
        header[entry.name] = {
            "dtype": kind,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in stored:
            file.write(_bytes_of(_values(entry)).data)
            progress(entry.nbytes)


def write_bin(path: Path, entries: Sequence[Entry], *, progress: Callable[[int], None]) -> None:
    """Write `entries` to `path` as `torch.save` of a state dict; tied weights share their values."""
    scratch = path.with_name(path.name + ".values")
    try:
        state: dict[str, torch.Tensor] = {}
        offset = 0
        with open(scratch, "wb") as file:
            file.truncate(max(1, sum(_padded(entry.nbytes) for entry in entries if entry.alias_of is None)))
        for entry in entries:
            if entry.alias_of is not None:
                continue
            state[entry.name] = _mapped(scratch, offset, _values(entry))
            offset += _padded(entry.nbytes)
            progress(entry.nbytes)
        torch.save({entry.name: state[entry.alias_of or entry.name] for entry in entries}, path)
    finally:
        scratch.unlink(missing_ok=True)


def _values(entry: Entry) -> torch.Tensor:
    return entry.read().to(entry.dtype).contiguous()


def _bytes_of(tensor: torch.Tensor) -> Any:
    """The values as a numpy array of bytes, which knows no bfloat16."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _padded(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def _mapped(path: Path, offset: int, tensor: torch.Tensor) -> torch.Tensor:
    """A copy of `tensor` whose values lie in the file, from byte `offset`; the system may drop them from memory."""
    if tensor.numel() == 0:
        return tensor
    values = np.memmap(path, dtype=np.uint8, mode="r+", offset=offset, shape=(tensor.nbytes,))
    values[:] = _bytes_of(tensor)
    values.flush()
    return torch.from_numpy(values).view(tensor.dtype).view(tensor.shape)
