"""A state dict as `torch.save` would write it, as a stream.

`torch.save` needs every tensor at once. Its file is a plain zip archive: `data.pkl`, a pickle of small records that name
the values by key, and one stored record of bytes for each key. All of that but the bytes is known before the first value.
Opens with `torch.load(weights_only=True)`, mapped or not. Source: torch/serialization.py, `_save`, torch 2.10 to 2.13.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cadtrain.checkpoint.weight_files import Entry, WriteBehind, Written, bytes_of, cast_pieces

_ROOT = "weights"
_ALIGNMENT = 64
_LOCAL_HEADER, _ZIP64_EXTRA = 30, 20
_STORAGES = {
    torch.float64: torch.DoubleStorage, torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage, torch.int64: torch.LongStorage, torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage, torch.int8: torch.CharStorage, torch.uint8: torch.ByteStorage, torch.bool: torch.BoolStorage,
}  # fmt: skip


def write_bin(path: Path, entries: Sequence[Entry], *, written: Written) -> None:
    """Write `entries` to `path` as a state dict; tied weights share their values."""
    stored = {entry.name: (str(key), entry) for key, entry in enumerate(e for e in entries if e.alias_of is None)}
    with open(path, "w+b") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        behind = WriteBehind(file.fileno())
        _write_record(archive, "data.pkl", _pickled({e.name: stored[e.alias_of or e.name] for e in entries}))
        _write_record(archive, "byteorder", sys.byteorder.encode())
        for key, entry in stored.values():
            with archive.open(_aligned(archive, f"data/{key}"), "w", force_zip64=True) as record:
                for piece in cast_pieces(entry):
                    record.write(bytes_of(piece).data)
                    behind.reached(file.tell())
                    written(entry.name, piece)
        _write_record(archive, "version", b"3\n")


def _write_record(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(f"{_ROOT}/{name}"), content)


def _aligned(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """A record whose bytes begin at a multiple of 64, as `torch.save` places them: a mapped tensor begins there too."""
    info = zipfile.ZipInfo(f"{_ROOT}/{name}")
    assert archive.fp is not None
    before = archive.fp.tell() + _LOCAL_HEADER + len(info.filename) + _ZIP64_EXTRA + 4
    padding = -before % _ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    return info


@dataclass(frozen=True, slots=True)
class _Storage:
    """Stands in the pickle for the values of one weight."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    """Stands in the pickle for one tensor: all values of its storage, row by row."""

    storage: _Storage
    shape: torch.Size

    @property
    def strides(self) -> tuple[int, ...]:
        return torch.empty(self.shape, device="meta").stride()


class _Pickler(pickle.Pickler):
    """Writes the stand-ins as torch writes tensors and storages."""

    def persistent_id(self, item: Any) -> Any:
        if isinstance(item, _Storage):
            return ("storage", _STORAGES[item.dtype], item.key, "cpu", item.numel)
        return None

    def reducer_override(self, item: Any) -> Any:
        if isinstance(item, _Tensor):
            rebuild = torch._utils._rebuild_tensor_v2
            return rebuild, (item.storage, 0, tuple(item.shape), item.strides, False, OrderedDict())
        return NotImplemented


def _pickled(named: dict[str, tuple[str, Entry]]) -> bytes:
    buffer = io.BytesIO()
    storages = {key: _Storage(key, entry.dtype, entry.shape.numel()) for key, entry in named.values()}
    state = {name: _Tensor(storages[key], entry.shape) for name, (key, entry) in named.items()}
    _Pickler(buffer, protocol=2).dump(state)
    return buffer.getvalue()
