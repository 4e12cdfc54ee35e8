"""Rows on their way to disk: chunks while the work runs, blocks once all chunks of one are there.

A chunk is the rows of a few inputs (`writer.CHUNK_ITEMS`), in one Arrow file and one JSON file; the JSON is renamed into place last, so
that a chunk is there whole or not at all. Chunks are finished in any order. A block is consecutive chunks put together, one file a
split, and is what the finished dataset consists of; what is known of its rows is in the journal:

    chunks/0000017.arrow  chunks/0000017.json       train/data-00001.arrow  validation/data-00001.arrow  journal/00001.json

How rows are cut into batches depends on the rows alone, so that an interrupted run writes the same bytes as one that was not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa

from cadtrain.data.manifest import SPLITS, write_whole
from cadtrain.data.writing.columns import Row, RowHash, record_batch

BATCH_ROWS = 64


@dataclass(frozen=True, slots=True)
class RowRecord:
    """What the journal knows of a row: enough to find duplicates and to hash the dataset without reading it.

    `digest` hashes all of the row, `key` its sequence, `own_key` its sequence together with its document, 8 bytes each but the
    first, in hexadecimal. `is_whole` is False for a state on the way to a design.
    """

    id: str
    file: str
    split: str
    digest: str
    key: str
    own_key: str
    is_whole: bool = True
    caption_source: str = ""

    @classmethod
    def of(cls, row: Row, split: str, file: str, is_whole: bool) -> RowRecord:
        """The record of a row."""
        hasher = RowHash()
        hasher.update(row)
        own = f"{row.document}\n{row.sequence}"
        keys = _short_hash(row.sequence), _short_hash(own)
        return cls(row.id, file, split, hasher.hexdigest(), *keys, is_whole, row.caption_source)


def _short_hash(text: str) -> str:
    return blake2b(text.encode("utf-8"), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True)
class Cost:
    """What an input took: `kind` is why no part came of it, or None; memory is the worker's peak, the kernel included."""

    id: str
    kind: str | None
    seconds: float
    peak_mib: float | None


@dataclass(slots=True)
class Record:
    """All that is known of a finished chunk or block."""

    rows: list[RowRecord] = field(default_factory=list)
    entries: list[dict[str, Any]] = field(default_factory=list)
    """Lines of the ledger."""
    costs: list[Cost] = field(default_factory=list)

    def extend(self, other: Record) -> None:
        """Put `other` behind this one."""
        self.rows += other.rows
        self.entries += other.entries
        self.costs += other.costs

    def write(self, path: Path, **more: Any) -> None:
        """Write it to `path`, whole or not at all; `more` goes beside it."""
        rows = [
            [r.id, r.file, SPLITS.index(r.split), r.digest, r.key, r.own_key, int(r.is_whole), r.caption_source]
            for r in self.rows
        ]
        costs = [[c.id, c.kind, round(c.seconds, 4), c.peak_mib and round(c.peak_mib, 1)] for c in self.costs]
        write_whole(path, json.dumps({"rows": rows, "entries": self.entries, "costs": costs} | more))

    @classmethod
    def read(cls, path: Path) -> Record:
        """What `write` wrote."""
        return cls.parse(json.loads(path.read_text(encoding="utf-8")))

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> Record:
        """What `write` wrote, as JSON values."""
        rows = [
            RowRecord(part, file, SPLITS[split], digest, key, own, bool(whole), *source)
            # Work that was begun by a version before caption sources were kept here is gone on with.
            for part, file, split, digest, key, own, whole, *source in raw["rows"]
        ]
        return cls(rows, raw["entries"], [Cost(*cost) for cost in raw["costs"]])


@contextmanager
def arrow_file(path: Path, schema: pa.Schema) -> Iterator[pa.RecordBatchStreamWriter]:
    """A new Arrow stream, on the disk when the `with` ends."""
    with path.open("wb") as file:
        with pa.ipc.new_stream(file, schema) as stream:
            yield stream
        file.flush()
        os.fsync(file.fileno())


def read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The file's batches, one at a time; they are views of the mapped file."""
    with pa.memory_map(str(path), "rb") as file, pa.ipc.open_stream(file) as stream:
        yield from stream


class ChunkWriter:
    """The rows of one chunk, in memory until `commit`."""

    def __init__(self) -> None:
        self._rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
        self._record = Record()

    def add(self, row: Row, split: str, *, file: str | None = None, is_whole: bool = True) -> None:
        """Take a row for a split; `file` is the ledger's name for where it comes from."""
        self._rows[split].append(row)
        self._record.rows.append(RowRecord.of(row, split, file or row.id, is_whole))

    def note(self, entry: dict[str, Any]) -> None:
        """Take a line of the ledger."""
        self._record.entries.append(entry)

    def cost(self, cost: Cost) -> None:
        """Take what an input took."""
        self._record.costs.append(cost)

    def commit(self, folder: Path, number: int, schema: pa.Schema) -> None:
        """Write the chunk as `number`; it exists once this has returned."""
        path = folder / f"{number:07d}.arrow"
        counts = [len(self._rows[split]) for split in SPLITS]
        with arrow_file(path, schema) as stream:
            for split in SPLITS:
                # One batch a split, in the order of the splits: `assemble` tells them apart by their counts.
                if rows := self._rows[split]:
                    stream.write_batch(record_batch(rows, schema))
        self._record.write(folder / f"{number:07d}.json", counts=counts, size=path.stat().st_size)


def is_chunk_whole(folder: Path, number: int) -> bool:
    """Whether the chunk's rows are all there; its JSON is taken as found."""
    raw = json.loads((folder / f"{number:07d}.json").read_text(encoding="utf-8"))
    path = folder / f"{number:07d}.arrow"
    return path.is_file() and path.stat().st_size == raw["size"]


def read_chunk_record(folder: Path, number: int) -> Record:
    """The record of a finished chunk."""
    return Record.read(folder / f"{number:07d}.json")


def block_path(folder: Path, split: str, number: int) -> Path:
    """The file of a block's rows of one split."""
    return folder / split / f"data-{number:05d}.arrow"


def assemble(folder: Path, number: int, chunks: Sequence[int], schema: pa.Schema) -> None:
    """Make block `number` of `folder` from its finished chunks, and remove them; a split without rows gets no file."""
    source = folder / "chunks"
    raws = [json.loads((source / f"{chunk:07d}.json").read_text(encoding="utf-8")) for chunk in chunks]
    record = Record()
    for raw in raws:
        record.extend(Record.parse(raw))
    for position, split in enumerate(SPLITS):
        path = block_path(folder, split, number)
        path.unlink(missing_ok=True)  # what an interrupted assembly left
        if not any(raw["counts"][position] for raw in raws):
            continue
        with arrow_file(path, schema) as stream:
            for batch in rebatched(_of_split(source, chunks, raws, position)):
                stream.write_batch(batch)
    record.write(folder / "journal" / f"{number:05d}.json")
    for chunk in chunks:
        remove_chunk(source, chunk)


def _of_split(
    source: Path, chunks: Sequence[int], raws: Sequence[dict[str, Any]], position: int
) -> Iterator[pa.RecordBatch]:
    for chunk, raw in zip(chunks, raws, strict=True):
        counts = raw["counts"]
        if counts[position]:
            index = sum(1 for count in counts[:position] if count)
            yield from (batch for k, batch in enumerate(read_batches(source / f"{chunk:07d}.arrow")) if k == index)


def remove_chunk(folder: Path, number: int) -> None:
    """Remove a chunk's files; the JSON first, so that a chunk without rows is never taken for one."""
    for suffix in (".json", ".arrow"):
        (folder / f"{number:07d}{suffix}").unlink(missing_ok=True)


def rebatched(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of `BATCH_ROWS`, the last one with the rest; holds at most one batch more than it is given."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        while sum(part.num_rows for part in waiting) >= BATCH_ROWS:
            joined = pa.concat_batches(waiting)
            yield joined.slice(0, BATCH_ROWS)
            waiting = [joined.slice(BATCH_ROWS)]
    if sum(part.num_rows for part in waiting):
        yield pa.concat_batches(waiting)
