"""Reading features: any row at once, from any thread, each checked as it is read.

Legend: V views, N tokens of a view or cloud, W width of a token.

Rows are read by position into memory of their own rather than mapped: a file that was cut short is then an error with its name
where a mapping would kill the process, and a folder of many thousand files takes no file handle for each.
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash

from cadtrain.data.features.manifest import FeatureManifest, Kind, file_name
from cadtrain.data.shards import PartDataset
from cadtrain.errors import DataError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROWS, SUMS = "features", "sums"
"""Tensors of a file: [rows, N, W], and int64[rows] with the xxh3_64 of each row's bytes."""

_OPEN_FILES = 64
_MOST_HEADER_BYTES = 1 << 20
_HINT = "Copy the folder again whole, or remove it and run `cadtrain data encode` again."


class FeatureStore:
    """A folder of features. Files are opened when a row of theirs is asked for."""

    def __init__(self, folder: Path, manifest: FeatureManifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.dtype = DTYPES[manifest.dtype]
        self._open: OrderedDict[str, _RowFile] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, folder: Path) -> FeatureStore:
        """The features in `folder`; reads the manifest and no row. Raises `DataError` naming a file that is missing or of another size."""
        manifest = FeatureManifest.read(folder)
        for name, file in manifest.files.items():
            try:
                size = (folder / name).stat().st_size
            except OSError as error:
                raise DataError(f"cannot be read: {error.strerror}", where=str(folder / name), hint=_HINT) from error
            if size != file.bytes:
                message = f"has {size} bytes, the manifest says {file.bytes}"
                raise DataError(message, where=str(folder / name), hint=_HINT)
        return cls(folder, manifest)

    def rows(self, split: str, kind: Kind, numbers: Sequence[int]) -> torch.Tensor:
        """[len(numbers), N, W]: these rows of a split; raises `DataError` naming a damaged file."""
        per_file, encoded = self.manifest.rows_per_file[kind], self.manifest.encoded[kind]
        out = torch.empty(len(numbers), encoded.tokens, encoded.width, dtype=self.dtype)
        raw = out.view(len(numbers), -1).view(torch.uint8).numpy()
        for number, target in zip(numbers, raw, strict=True):
            self._file(file_name(split, kind, number // per_file), kind).read(number % per_file, target)
        return out

    def check(self, on_file: Callable[[str], None] = lambda name: None) -> list[str]:
        """Read everything; a line for each damaged file, after `on_file` was told its name and those of all others."""
        damaged = []
        for task in self.manifest.tasks():
            try:
                self.rows(task.split, task.kind, range(task.start, task.stop))
            except DataError as error:
                damaged.append(str(error))
            on_file(task.name)
        return damaged

    def _file(self, name: str, kind: Kind) -> _RowFile:
        with self._lock:
            found = self._open.get(name)
            if found is None:
                expected, record = self.manifest.encoded[kind], self.manifest.files[name]
                shape = (record.rows, expected.tokens, expected.width)
                found = self._open[name] = _RowFile(self.folder / name, shape, self.dtype, record.digest)
            self._open.move_to_end(name)
            while len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)  # closed when the last thread that reads from it lets go
            return found


class SplitFeatures:
    """The features of one split, by sample. Safe to read from several threads."""

    def __init__(self, store: FeatureStore, dataset: PartDataset) -> None:
        """Raises `DataError` where the store does not cover every sample of `dataset`."""
        self._store, self._split = store, dataset.split
        manifest = store.manifest
        self._epochs = manifest.draw_epochs(dataset.split)
        self._view_starts = np.concatenate([[0], np.cumsum(dataset.num_images)])
        self._cloud_starts = np.concatenate([[0], np.cumsum(dataset.has_points)]) * len(self._epochs)
        wanted: dict[Kind, int] = {"image": int(self._view_starts[-1]), "point": int(self._cloud_starts[-1])}
        for kind, count in wanted.items():
            found = manifest.rows.get(dataset.split, {}).get(kind, 0)
            if kind in manifest.encoded and found != count:
                raise DataError(
                    f"{found} rows of {kind} features for the {dataset.split} split, whose samples have {count}",
                    where=str(store.folder),
                    hint="Run `cadtrain data encode` again.",
                )

    def num_views(self, index: int) -> int:
        """Views of sample `index`."""
        return int(self._view_starts[index + 1] - self._view_starts[index])

    def has_cloud(self, index: int) -> bool:
        """Whether sample `index` has points."""
        return bool(self._cloud_starts[index + 1] > self._cloud_starts[index])

    def views(self, index: int, chosen: Sequence[int]) -> torch.Tensor:
        """[V, N, W]: features of the chosen views of sample `index`."""
        start = int(self._view_starts[index])
        return self._store.rows(self._split, "image", [start + view for view in chosen])

    def cloud(self, index: int, epoch: int) -> torch.Tensor:
        """[1, N, W]: features of the draw of points that sample `index` shows in `epoch`.

        The draws are those that a run of the features' seed makes itself in its first epochs; later epochs go round.
        """
        start = int(self._cloud_starts[index])
        return self._store.rows(self._split, "point", [start + epoch % len(self._epochs)])

    def dummy(self, kind: Kind) -> torch.Tensor:
        """[1, N, W]: zeros, finite through a projector, for a pack that holds none of the modality."""
        encoded = self._store.manifest.encoded[kind]
        return torch.zeros(1, encoded.tokens, encoded.width, dtype=self._store.dtype)


class _RowFile:
    """One open file of rows."""

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype, digest: str) -> None:
        self._path = path
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", where=str(path), hint=_HINT) from error
        self._row_bytes = shape[1] * shape[2] * dtype.itemsize
        self._start, sums_start = self._offsets(shape, dtype)
        self._sums = np.empty(shape[0], dtype=np.int64)
        self._fill(self._sums.view(np.uint8), sums_start)
        if xxhash.xxh3_128_hexdigest(self._sums.data) != digest:
            raise DataError("its row checksums are not those in the manifest", where=str(path), hint=_HINT)

    def read(self, row: int, target: np.ndarray) -> None:
        """Fill the bytes `target` with row `row`; raises `DataError` where they are not what was written."""
        self._fill(target, self._start + row * self._row_bytes)
        if xxhash.xxh3_64_intdigest(target.data) != int(self._sums[row]) % (1 << 64):
            raise DataError(f"row {row} is damaged: its checksum differs", where=str(self._path), hint=_HINT)

    def _offsets(self, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[int, int]:
        """Where rows and checksums begin, from the file's header."""
        size = np.zeros(1, dtype="<u8")
        self._fill(size.view(np.uint8), 0)
        if not 0 < size[0] <= _MOST_HEADER_BYTES:
            raise DataError("no safetensors file: its header has no size", where=str(self._path), hint=_HINT)
        text = np.empty(int(size[0]), dtype=np.uint8)
        self._fill(text, 8)
        try:
            header = json.loads(text.tobytes())
            rows, sums = header[ROWS], header[SUMS]
            is_right = tuple(rows["shape"]) == shape and tuple(sums["shape"]) == shape[:1]
            starts = [8 + len(text) + int(found["data_offsets"][0]) for found in (rows, sums)]
            spans = [int(found["data_offsets"][1]) - int(found["data_offsets"][0]) for found in (rows, sums)]
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise DataError(f"its header is damaged ({error})", where=str(self._path), hint=_HINT) from error
        if not is_right or spans != [shape[0] * self._row_bytes, shape[0] * 8]:
            found = f"{rows['shape']} {rows['dtype']}"
            raise DataError(f"holds {found}, not {list(shape)} {dtype}", where=str(self._path), hint=_HINT)
        return starts[0], starts[1]

    def _fill(self, target: np.ndarray, offset: int) -> None:
        """Read as many bytes as `target` has, from `offset` on."""
        at = 0
        while at < len(target):
            try:
                count = os.preadv(self._descriptor, [target[at:].data], offset + at)
            except OSError as error:
                raise DataError(f"cannot be read: {error.strerror}", where=str(self._path), hint=_HINT) from error
            if count == 0:
                raise DataError("ends too early", where=str(self._path), hint=_HINT)
            at += count

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
