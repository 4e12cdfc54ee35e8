"""`costs.parquet`: what each input took, in a file of its own, because it is never the same twice and the rest of a dataset is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cadtrain.data.manifest import COSTS_NAME
from cadtrain.data.writing.blocks import Cost

_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("kind", pa.string()),
        ("seconds", pa.float32()),
        ("peak_memory_mib", pa.float32()),
    ]
)


class CostsFile:
    """The file being written, a block's costs at a time; use as a context manager."""

    def __init__(self, path: Path) -> None:
        self._writer = pq.ParquetWriter(str(path), _SCHEMA)

    def __enter__(self) -> CostsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def write(self, costs: Sequence[Cost]) -> None:
        """Add these."""
        if costs:
            columns = zip(*((cost.id, cost.kind, cost.seconds, cost.peak_mib) for cost in costs), strict=True)
            arrays = [pa.array(column, kind) for column, kind in zip(columns, _SCHEMA.types, strict=True)]
            self._writer.write_batch(pa.record_batch(arrays, schema=_SCHEMA))


@dataclass(frozen=True, slots=True)
class CostSummary:
    """What the inputs of a dataset took.

    `slowest` has the five that took longest, each with its id, seconds, peak MiB (None where not known) and the kind of failure it
    ended in (None for a part). Seconds are those of one worker.
    """

    total_seconds: float
    median_seconds: float
    p99_seconds: float
    peak_memory_mib: float | None
    slowest: tuple[tuple[str, float, float | None, str | None], ...]


def read_costs(dataset: Path) -> pa.Table | None:
    """A row for each input of the dataset: id, kind, seconds, peak_memory_mib; None where it was made without (before 0.2)."""
    path = dataset / COSTS_NAME
    return pq.read_table(path) if path.is_file() else None


def summarize_costs(dataset: Path) -> CostSummary | None:
    """What the inputs took, or None where that was not written down."""
    table = read_costs(dataset)
    if table is None or not table.num_rows:
        return None
    seconds, peak = table.column("seconds"), table.column("peak_memory_mib")
    median, p99 = (float(value.as_py()) for value in pc.quantile(seconds, q=[0.5, 0.99]))
    slowest = table.take(pc.select_k_unstable(table, k=5, sort_keys=[("seconds", "descending")])).to_pylist()
    return CostSummary(
        total_seconds=float(pc.sum(seconds).as_py()),
        median_seconds=median,
        p99_seconds=p99,
        peak_memory_mib=pc.max(peak).as_py(),
        slowest=tuple((row["id"], row["seconds"], row["peak_memory_mib"], row["kind"]) for row in slowest),
    )
