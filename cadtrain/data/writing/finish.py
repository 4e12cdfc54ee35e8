"""The last step of writing a dataset: blocks into one dataset, without the duplicates, or with equal designs in one split.

Nothing that the blocks hold is changed or removed here, so that a finish that was cut short is simply done again. Of the rows only
hashes are in memory; of the files only those are rewritten that hold a row to leave out or to move.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cadtrain.data.manifest import COSTS_NAME, FAILURES_NAME, MANIFEST_NAME, MOVED, SPLITS, Manifest, write_whole
from cadtrain.data.writing import blocks
from cadtrain.data.writing.costs import CostsFile
from cadtrain.data.writing.duplicates import Duplicates, find_redundant, into_one_split
from cadtrain.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cadtrain.data.writing.writer import Plan


def write_dataset(
    folder: Path, plan: Plan, schema: pa.Schema, num_blocks: int, skipped: Iterable[dict[str, Any]]
) -> None:
    """Write everything into `folder` that makes its blocks a dataset, the manifest last.

    Raises `DataError` when no row at all was written; `skipped` are the ledger's lines for inputs that were left out before any
    work.
    """
    fates = _decide(folder, plan, num_blocks)
    splits = {split: _Split() for split in SPLITS}
    ledger = _Ledger(folder / FAILURES_NAME, fates)
    with ledger, CostsFile(folder / COSTS_NAME) as costs:
        ledger.write(skipped)
        start = 0
        for number in range(num_blocks):
            record = blocks.Record.read(folder / "journal" / f"{number:05d}.json")
            own = fates.part(start, len(record.rows))
            ledger.remember(record, start)
            ledger.write(record.entries)
            costs.write(record.costs)
            for name, split in splits.items():
                _take_block(folder, name, number, record, own, schema, split)
            start += len(record.rows)
        ledger.write(ledger.duplicates())
        ledger.write(ledger.moves())
    if not start:
        raise DataError(ledger.nothing_usable(), hint="Nothing was written.")
    for name, split in splits.items():
        _write_split_files(folder / name, schema, split)
    _manifest(plan, splits, ledger).write(folder)


@dataclass(frozen=True, slots=True)
class _Fates:
    """What becomes of rows [N] of `splits`: `twins` as from `find_redundant`, `placed` and `leaders` as from `into_one_split`."""

    splits: NDArray[np.uint8]
    twins: NDArray[np.int64]
    placed: NDArray[np.uint8]
    leaders: NDArray[np.int64]

    def part(self, start: int, count: int) -> _Fates:
        """Those of `count` rows from `start` on; what they name is still counted over all rows."""
        rows = slice(start, start + count)
        return _Fates(self.splits[rows], self.twins[rows], self.placed[rows], self.leaders[rows])


def _decide(folder: Path, plan: Plan, num_blocks: int) -> _Fates:
    """What becomes of the rows of all blocks, in the order of the journal."""
    columns: tuple[list[Any], ...] = ([], [], [], [])
    for number in range(num_blocks):
        rows = blocks.Record.read(folder / "journal" / f"{number:05d}.json").rows
        columns[0].append(np.array([int(row.key, 16) for row in rows], dtype=np.uint64))
        columns[1].append(np.array([int(row.own_key, 16) for row in rows], dtype=np.uint64))
        columns[2].append(np.array([SPLITS.index(row.split) for row in rows], dtype=np.uint8))
        columns[3].append(np.array([row.is_whole for row in rows], dtype=bool))
    if not num_blocks:
        none, nowhere = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint8)
        return _Fates(nowhere, none, nowhere, none)
    keys, own_keys, splits, is_whole = (np.concatenate(column) for column in columns)
    twins = find_redundant(keys, own_keys, splits, is_whole, plan.duplicates)
    if plan.duplicates is Duplicates.ONE_SPLIT:
        return _Fates(splits, twins, *into_one_split(keys, splits))
    return _Fates(splits, twins, splits, np.arange(len(keys)))


@dataclass(slots=True)
class _Split:
    """What is known of a split so far: its files, its rows, who wrote their captions, the hash of their hashes."""

    files: list[str] = field(default_factory=list)
    count: int = 0
    captions: Counter[str] = field(default_factory=Counter)
    hasher: Any = field(default_factory=lambda: blake2b(digest_size=16))


def _take_block(
    folder: Path,
    name: str,
    number: int,
    record: blocks.Record,
    fates: _Fates,
    schema: pa.Schema,
    split: _Split,
) -> None:
    """Add to `split` a block's rows that belong to split `name`, its own first, then those that come from other splits.

    Rows that are not all of their split's in the block are written into a file of their own, beside the block's.
    """
    stays = (fates.twins < 0) & (fates.placed == SPLITS.index(name))
    for source in (name, *(other for other in SPLITS if other != name)):
        positions = np.flatnonzero(fates.splits == SPLITS.index(source))
        keep = stays[positions]
        if not keep.any():
            continue
        path = blocks.block_path(folder, name, number)
        if source != name or not keep.all():
            path = path.with_name(f"{path.stem}-{'distinct' if source == name else f'from-{source}'}.arrow")
            with blocks.arrow_file(path, schema) as stream:
                for batch in blocks.rebatched(_kept_rows(blocks.block_path(folder, source, number), keep)):
                    stream.write_batch(batch)
        split.files.append(path.name)
        split.count += int(keep.sum())
        for position in positions[keep]:
            row = record.rows[position]
            split.hasher.update(bytes.fromhex(row.digest))
            split.captions[row.caption_source] += 1


def _kept_rows(path: Path, keep: NDArray[np.bool_]) -> Iterator[pa.RecordBatch]:
    start = 0
    for batch in blocks.read_batches(path):
        yield batch.filter(pa.array(keep[start : start + batch.num_rows]))
        start += batch.num_rows


class _Ledger:
    """`failures.jsonl` on its way, with the rows that are named in it as duplicates or as moved."""

    def __init__(self, path: Path, fates: _Fates) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._fates = fates
        self._named: dict[int, tuple[str, str, str]] = {}
        self._dropped = np.flatnonzero(fates.twins >= 0)
        self._moved = np.flatnonzero(fates.leaders != np.arange(len(fates.leaders)))
        self._wanted = np.unique(
            np.concatenate([self._dropped, fates.twins[self._dropped], self._moved, fates.leaders[self._moved]])
        )
        self.dropped: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self._first = ""

    def __enter__(self) -> _Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def write(self, entries: Iterable[dict[str, Any]]) -> None:
        """Write lines, and count what they say was left out, or used in spite of a fault."""
        for entry in entries:
            self._file.write(json.dumps(entry) + "\n")
            if entry["dropped"]:
                self.dropped[entry["kind"]] += 1
                self._first = self._first or f"{entry['file']}: {entry['reason']}"
            else:
                self.notes[entry["kind"]] += 1

    def remember(self, record: blocks.Record, start: int) -> None:
        """Keep the names of these rows, and of those whose designs they repeat, among the rows that begin with number `start`."""
        low, high = np.searchsorted(self._wanted, [start, start + len(record.rows)])
        for index in self._wanted[low:high]:
            row = record.rows[index - start]
            self._named[int(index)] = (row.id, row.file, row.split)

    def duplicates(self) -> Iterator[dict[str, Any]]:
        """A line for each row that is left out because another has the same sequence."""
        for index in self._dropped:
            (part, file, split), (twin, _, other) = self._named[int(index)], self._named[int(self._fates.twins[index])]
            reason = f"the same quantized sequence as {twin} in {other}; left out of {split}"
            yield {"id": part, "file": file, "kind": "duplicate", "reason": reason, "dropped": True}

    def moves(self) -> Iterator[dict[str, Any]]:
        """A line for each row that is in another split than its document's because an equal design is there."""
        for index in self._moved:
            (part, file, split), (twin, _, other) = (
                self._named[int(index)],
                self._named[int(self._fates.leaders[index])],
            )
            reason = f"the same quantized sequence as {twin} in {other}; moved there from {split}"
            yield {"id": part, "file": file, "kind": MOVED, "reason": reason, "dropped": False}

    def nothing_usable(self) -> str:
        """Why there is no row."""
        if not self.dropped:
            return "no usable part: there was no input"
        kinds = ", ".join(f"{number} × {kind}" for kind, number in self.dropped.most_common())
        return f"no usable part: {kinds}; the first: {self._first}"


def _manifest(plan: Plan, splits: dict[str, _Split], ledger: _Ledger) -> Manifest:
    captions = sum((split.captions for split in splits.values()), Counter[str]())
    captions.pop("", None)  # rows of which that was not written down
    digests = {name: split.hasher.hexdigest() for name, split in splits.items()}
    return Manifest(
        source=plan.source,
        seed=plan.seed,
        codec=plan.codec.name,
        codec_version=plan.codec.version,
        counts={name: split.count for name, split in splits.items()},
        num_points=plan.num_points,
        num_views=plan.num_views,
        image_size=plan.image_size,
        digest=blake2b("".join(digests[name] for name in SPLITS).encode(), digest_size=16).hexdigest(),
        digests=digests,
        failures=dict(sorted(ledger.dropped.items())),
        notes=dict(sorted(ledger.notes.items())),
        captions=dict(sorted(captions.items())),
        settings={**plan.settings, "duplicates": str(plan.duplicates), "fingerprint": plan.fingerprint},
    )


def _write_split_files(folder: Path, schema: pa.Schema, split: _Split) -> None:
    """Make the folder one that `datasets.load_from_disk` opens."""
    if not split.files:
        split.files.append("data-00000.arrow" if not (folder / "data-00000.arrow").exists() else "data-none.arrow")
        with blocks.arrow_file(folder / split.files[0], schema):
            pass
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in split.files],
        "_fingerprint": split.hasher.hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": folder.name,
    }
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    info = {
        "citation": "", "description": "Parts prepared by cadtrain.", "features": features, "homepage": "", "license": "",
        "splits": {folder.name: {"name": folder.name, "num_bytes": 0, "num_examples": split.count, "dataset_name": "cadtrain"}},
    }  # fmt: skip
    write_whole(folder / "state.json", json.dumps(state, indent=2))
    write_whole(folder / "dataset_info.json", json.dumps(info, indent=2))


def remove_all_but_the_dataset(folder: Path, *, but: frozenset[str] = frozenset()) -> None:
    """Remove what only the work needed from a folder that `write_dataset` has filled; what `but` names stays."""
    files = {MANIFEST_NAME, FAILURES_NAME, COSTS_NAME} | but
    for entry in folder.iterdir():
        if entry.name in SPLITS:
            state = json.loads((entry / "state.json").read_text(encoding="utf-8"))
            keep = {"state.json", "dataset_info.json", *(file["filename"] for file in state["_data_files"])}
            for path in entry.iterdir():
                if path.name not in keep:
                    path.unlink()
        elif entry.name in files:
            continue
        elif entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
