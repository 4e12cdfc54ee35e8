"""Reading a prepared dataset: memory-mapped, random access, safe to read from many threads and to send to other processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cadtrain.cad.codec import get_codec
from cadtrain.data.manifest import MANIFEST_NAME, SPLITS, Manifest
from cadtrain.data.sample import POINT_CHANNELS, Sample
from cadtrain.errors import DataError, UsageError

_SCANNED_ROWS = 4096


class PartDataset:
    """One split of a prepared dataset. Made by `open`; two copies in two processes share the file's pages."""

    def __init__(self, path: Path, split: str, manifest: Manifest, table: pa.Table) -> None:
        self.path = path
        self.split = split
        self.manifest = manifest
        # One list of batches instead of a chunked column each: a row is found by one search and sliced without a copy.
        self._batches = [batch for batch in table.to_batches() if batch.num_rows]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self._table = table

    @classmethod
    def open(cls, path: Path, split: str) -> PartDataset:
        """Open a split (`train`, `validation`, `test`) of the dataset in `path`; reads no rows.

        Raises `DataError` for a folder that is no prepared dataset, is not finished, was written by a newer format or another
        codec version, or holds other rows than its manifest says; the error says what was found and what to run.
        """
        path = Path(path)
        manifest = Manifest.read(path)
        if split not in SPLITS:
            raise UsageError(f"no split named {split!r}.", hint=f"Splits are {', '.join(SPLITS)}.")
        _check_codec(manifest, path)
        table = _load_table(path / split)
        stated = manifest.counts.get(split, 0)
        if table.num_rows != stated:
            raise DataError(
                f"{table.num_rows} rows, but {MANIFEST_NAME} says {stated}",
                where=str(path / split),
                hint="The folder was changed after it was made. Prepare it again with `--overwrite`.",
            )
        return cls(path, split, manifest, table)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index` (negative counts from the end); raises `IndexError` outside the split.

        `points` is a read-only view of the mapped file.
        """
        batch, row = self._place(index)
        return _sample(
            batch, row, points=_points(batch.column("points"), row), images=_images(batch.column("images"), row)
        )

    def texts(self, index: int) -> Sample:
        """As `[index]`, without points and images, of which nothing is read."""
        batch, row = self._place(index)
        return _sample(batch, row, points=None, images=())

    def _place(self, index: int) -> tuple[pa.RecordBatch, int]:
        size = len(self)
        position = index + size if index < 0 else index
        if not 0 <= position < size:
            raise IndexError(f"sample {index} of a split of {size}")
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        return self._batches[number], position - int(self._starts[number])

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy in another process maps the files itself; nothing of the data travels.
        return (PartDataset.open, (self.path, self.split))

    def captions(self) -> list[str]:
        """Every sample's caption."""
        return self.column("caption")

    def column(self, name: str) -> list[Any]:
        """A whole column as Python values (not `points` or `images`, which are read by sample)."""
        if name in ("points", "images") or name not in self._table.column_names:
            known = [known for known in self._table.column_names if known not in ("points", "images")]
            raise UsageError(f"no column named {name!r} to read whole.", hint=f"Known: {', '.join(known)}.")
        return self._table.column(name).to_pylist()

    def has_column(self, name: str) -> bool:
        """Whether the split has that column."""
        return name in self._table.column_names

    def scan(self, *names: str) -> Iterator[tuple[list[Any], ...]]:
        """These columns as Python values, some thousand rows at a time; an optional column that is not there is all None."""
        there = [name for name in names if name in self._table.column_names]
        for batch in self._table.select(there).to_batches(max_chunksize=_SCANNED_ROWS):
            columns = {name: batch.column(name).to_pylist() for name in there}
            yield tuple(columns.get(name) or [None] * batch.num_rows for name in names)

    def values(self, name: str, positions: Sequence[int]) -> list[Any]:
        """The values of a few samples in a column."""
        return self._table.column(name).take(pa.array(positions, pa.int64())).to_pylist()

    @cached_property
    def has_points(self) -> np.ndarray:
        """bool[N]: which samples have a point cloud."""
        return pc.is_valid(self._table.column("points")).to_numpy().astype(bool)

    @cached_property
    def num_images(self) -> np.ndarray:
        """int64[N]: views of each sample."""
        return pc.fill_null(pc.list_value_length(self._table.column("images")), 0).to_numpy().astype(np.int64)

    @cached_property
    def has_images(self) -> np.ndarray:
        """bool[N]: which samples have at least one view."""
        return self.num_images > 0

    @property
    def digest(self) -> str:
        """Changes whenever the split's rows, their order, or the meaning of their text change."""
        manifest = self.manifest
        text = f"{manifest.digests[self.split]} {manifest.codec} {manifest.codec_version} {len(self)}"
        return blake2b(text.encode(), digest_size=16).hexdigest()


def _check_codec(manifest: Manifest, path: Path) -> None:
    codec = get_codec(manifest.codec)
    if codec.version != manifest.codec_version:
        raise DataError(
            f"sequences written by codec {manifest.codec!r} version {manifest.codec_version}, "
            f"this cadtrain has version {codec.version}",
            where=str(path / MANIFEST_NAME),
            hint="Prepare the dataset again with this cadtrain, or use the version that made it.",
        )


def _load_table(folder: Path) -> pa.Table:
    # Imported here: `datasets` takes a second or two to import, and commands that only read a manifest need not wait for it.
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder), keep_in_memory=False)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DataError(
            f"cannot be opened as a dataset on disk ({error})",
            where=str(folder),
            hint="The folder is damaged or incomplete. Prepare it again with `--overwrite`.",
        ) from error
    if not isinstance(loaded, datasets.Dataset):
        raise DataError(f"a {type(loaded).__name__} where one split belongs", where=str(folder))
    missing = {"id", "document", "caption", "sequence", "points", "images"} - set(loaded.column_names)
    if missing:
        raise DataError(
            f"columns missing: {', '.join(sorted(missing))}",
            where=str(folder),
            hint="Prepare it again with `--overwrite`.",
        )
    return loaded.data.table


def _sample(batch: pa.RecordBatch, row: int, *, points: np.ndarray | None, images: tuple[bytes, ...]) -> Sample:
    return Sample(
        id=batch.column("id")[row].as_py(),
        document=batch.column("document")[row].as_py(),
        caption=batch.column("caption")[row].as_py(),
        sequence=batch.column("sequence")[row].as_py(),
        points=points,
        images=images,
    )


def _points(column: pa.Array, row: int) -> np.ndarray | None:
    if not column[row].is_valid:
        return None
    return column[row].values.to_numpy(zero_copy_only=True).reshape(-1, POINT_CHANNELS)


def _images(column: pa.Array, row: int) -> tuple[bytes, ...]:
    scalar = column[row]
    return tuple(item["bytes"].as_py() for item in scalar) if scalar.is_valid else ()
