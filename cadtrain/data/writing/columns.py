"""The columns of a prepared dataset, and rows as Arrow batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa

from cadtrain.data.sample import POINT_CHANNELS


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """One part, ready to be stored.

    `points` is float32[P, 6] or None. `caption_source` says who wrote the caption: `file`, `described` (from the sequence)
    or `generated` (with the part). What the kernel was not asked is None.
    """

    id: str
    document: str
    caption: str
    caption_source: str
    sequence: str
    num_steps: int
    points: np.ndarray | None = None
    images: tuple[bytes, ...] = ()
    volume: float | None = None
    area: float | None = None
    num_faces: int | None = None
    is_valid: bool | None = None
    is_watertight: bool | None = None


_PLAIN: dict[str, tuple[str, pa.DataType]] = {
    "id": ("string", pa.string()),
    "document": ("string", pa.string()),
    "caption": ("string", pa.string()),
    "caption_source": ("string", pa.string()),
    "sequence": ("string", pa.string()),
    "num_steps": ("int32", pa.int32()),
    "volume": ("float64", pa.float64()),
    "area": ("float64", pa.float64()),
    "num_faces": ("int32", pa.int32()),
    "is_valid": ("bool", pa.bool_()),
    "is_watertight": ("bool", pa.bool_()),
}
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def arrow_schema(num_points: int) -> pa.Schema:
    """The Arrow schema, with the metadata by which Hugging Face `datasets` knows views as images.

    `points` is a fixed-size list of `num_points` x 6 floats: consecutive in the file, so reading copies nothing. A dataset
    without points (`num_points` 0) has a list of no fixed size there, all null, which takes no room.
    """
    length = num_points * POINT_CHANNELS
    points = pa.list_(pa.float32(), length) if length else pa.list_(pa.float32())
    fields = [pa.field(name, kind) for name, (_, kind) in _PLAIN.items()]
    fields += [pa.field("points", points), pa.field("images", pa.list_(_IMAGE))]
    features: dict[str, Any] = {name: {"dtype": dtype, "_type": "Value"} for name, (dtype, _) in _PLAIN.items()}
    features["points"] = {"feature": {"dtype": "float32", "_type": "Value"}, "length": length or -1, "_type": "List"}
    features["images"] = {"feature": {"_type": "Image"}, "length": -1, "_type": "List"}
    info = json.dumps({"info": {"features": features}})
    return pa.schema(fields, metadata={"huggingface": info})


def record_batch(rows: Sequence[Row], schema: pa.Schema) -> pa.RecordBatch:
    """The rows as one batch; every row's points must be None or float32 of the schema's length."""
    arrays: list[pa.Array] = [
        pa.array([getattr(row, name) for row in rows], kind) for name, (_, kind) in _PLAIN.items()
    ]
    arrays.append(_points_array(rows, schema.field("points").type))
    images = [[{"bytes": data, "path": None} for data in row.images] for row in rows]
    arrays.append(pa.array(images, schema.field("images").type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _points_array(rows: Sequence[Row], kind: pa.DataType) -> pa.Array:
    if not pa.types.is_fixed_size_list(kind):
        return pa.array([None] * len(rows), kind)
    length = kind.list_size
    flat = np.zeros((len(rows), length), dtype=np.float32)
    missing = np.ones(len(rows), dtype=bool)
    for position, row in enumerate(rows):
        if row.points is not None:
            flat[position] = row.points.reshape(length)
            missing[position] = False
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), type=kind, mask=pa.array(missing))


class RowHash:
    """A hash over what a model sees of rows, in order; the same rows give the same hash however they are stored."""

    def __init__(self) -> None:
        self._hash = blake2b(digest_size=16)

    def update(self, row: Row) -> None:
        """Take in one row."""
        for text in (row.id, row.document, row.caption, row.sequence):
            self._feed(text.encode("utf-8"))
        self._feed(b"" if row.points is None else np.ascontiguousarray(row.points, dtype="<f4").data)
        for data in row.images:
            self._feed(data)

    def hexdigest(self) -> str:
        """The hash of the rows so far."""
        return self._hash.hexdigest()

    def _feed(self, data: bytes | memoryview) -> None:
        # The length goes in front, so that moving a byte from one field to the next is another hash.
        size = data.nbytes if isinstance(data, memoryview) else len(data)
        self._hash.update(size.to_bytes(8, "little"))
        self._hash.update(data)
