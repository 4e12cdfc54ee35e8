"""Weights on their way into a safetensors file, piece by piece: no weight need be whole in memory.

Weights are handled by name and as flat pieces.
"""

from __future__ import annotations

import itertools
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cadtrain.errors import CheckpointError

DEFAULT_SHARD_BYTES = 5 * 10**9
"""Largest file of weights in a folder, as Hugging Face counts: 5GB."""

_BEHIND_BYTES = 32 << 20

Written = Callable[[str, torch.Tensor], None]
"""Told of every piece after it was written: the weight's name and the values in the file's type, flat."""

_SAFETENSORS_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One weight to write: `dtype` is that of the file, `alias_of` an earlier entry whose values it shares.

    `pieces` gives the values from first to last, in tensors of any size and shape, in any type that casts to `dtype`; a piece
    may be overwritten by the next.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    pieces: Callable[[], Iterable[torch.Tensor]]
    alias_of: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return self.shape.numel() * self.dtype.itemsize


def entries_of(weights: Mapping[str, torch.Tensor], *, dtype: torch.dtype | None = None) -> list[Entry]:
    """Entries of weights in memory; `dtype` casts the floating ones."""
    return [
        Entry(name, tensor.shape, dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype, _on_host(tensor))
        for name, tensor in weights.items()
    ]  # fmt: skip


def _on_host(tensor: torch.Tensor) -> Callable[[], Iterable[torch.Tensor]]:
    return lambda: (tensor.detach().cpu(),)


def cast_pieces(entry: Entry) -> Iterator[torch.Tensor]:
    """The entry's values in the file's type, flat and contiguous; a piece may be overwritten by the next.

    Raises `CheckpointError` where their number is not its shape's, and for a value too large for fp16, which would become infinite.
    """
    done, buffer = 0, torch.empty(0, dtype=entry.dtype)
    for piece in entry.pieces():
        flat = piece.reshape(-1)
        if piece.dtype != entry.dtype:
            buffer = buffer if buffer.numel() >= flat.numel() else torch.empty(flat.numel(), dtype=entry.dtype)
            flat = buffer[: flat.numel()].copy_(flat)
        if entry.dtype == torch.float16 and not flat.isfinite().all() and piece.isfinite().all():
            largest = float(piece.abs().max())
            raise CheckpointError(
                f"{entry.name} holds {largest:g}, beyond the {torch.finfo(torch.float16).max:g} of fp16.",
                hint="Use --dtype bf16.",
            )
        done += flat.numel()
        yield flat
    if done != entry.shape.numel():
        raise CheckpointError(f"{entry.name} came out as {done} values, {entry.shape.numel()} belong to its shape.")


def bytes_of(tensor: torch.Tensor) -> Any:
    """The values of a contiguous tensor as a numpy array of bytes; numpy itself knows no bfloat16."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


class WriteBehind:
    """Sets the disk to work while a file is still being written: it must be flushed at the end, and that waits for less then.

    Gives the pages that are written back to the system, which keeps them from pushing out other programs' files.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._begun = descriptor, 0

    def reached(self, position: int) -> None:
        """Say how far the file is written; a hint, where the system takes it."""
        if position - self._begun >= _BEHIND_BYTES and hasattr(os, "posix_fadvise"):
            # Linux begins to write what is dirty in the range, and drops what is clean.
            os.posix_fadvise(self._descriptor, self._begun, position - self._begun, os.POSIX_FADV_DONTNEED)
            self._begun = position


def write_safetensors(path: Path, entries: Sequence[Entry], *, written: Written) -> None:
    """Write `entries` to `path`; tied weights once, their further names in the metadata as `{name: first name}`."""
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
        behind = WriteBehind(file.fileno())
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in stored:
            for piece in cast_pieces(entry):
                file.write(bytes_of(piece).data)
                behind.reached(file.tell())
                written(entry.name, piece)


def split_into_files(entries: Iterable[Entry], max_bytes: int) -> list[list[Entry]]:
    """`entries` in order, in runs of at most `max_bytes`; a larger one stands alone. At least one run, which may be empty."""
    runs: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if runs[-1] and size + entry.nbytes > max_bytes:
            runs.append([])
            size = 0
        runs[-1].append(entry)
        size += entry.nbytes
    return runs


def write_sharded(folder: Path, entries: Sequence[Entry], *, max_bytes: int, written: Written) -> list[Path]:
    """Write `entries`, none of them an alias, as `model.safetensors`, or as several files with Hugging Face's index."""
    runs = split_into_files(entries, max_bytes)
    if len(runs) == 1:
        write_safetensors(folder / "model.safetensors", runs[0], written=written)
        return [folder / "model.safetensors"]
    names = [f"model-{number:05d}-of-{len(runs):05d}.safetensors" for number in range(1, len(runs) + 1)]
    for name, run in zip(names, runs, strict=True):
        write_safetensors(folder / name, run, written=written)
    pairs = itertools.chain.from_iterable(((e.name, name) for e in run) for name, run in zip(names, runs, strict=True))
    index = {
        "metadata": {"total_size": sum(entry.nbytes for entry in entries)},
        "weight_map": dict(sorted(pairs)),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return [folder / name for name in names]
