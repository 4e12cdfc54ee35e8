"""What is in a prepared dataset: reads columns a few thousand rows at a time, and no points or pictures."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from cadtrain.data.inspect.duplicates import Documents, Duplicates, find_duplicates
from cadtrain.data.inspect.ledger import LedgerFault, read_ledger
from cadtrain.data.inspect.lengths import LengthOptions, TokenStats, token_stats
from cadtrain.data.inspect.rows import SplitScan, read_designs, read_rows
from cadtrain.data.inspect.shares import Progress, no_progress
from cadtrain.data.inspect.tally import DesignStats, DesignTally, Fault, FaultTally
from cadtrain.data.inspect.tokens import open_tokenizer
from cadtrain.data.inspect.values import Spread
from cadtrain.data.manifest import FAILURES_NAME, SPLITS, Manifest
from cadtrain.data.shards import PartDataset
from cadtrain.data.writing.costs import read_costs
from cadtrain.errors import UsageError

_LEAK_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class SplitReport:
    """One split. `invalid` counts parts whose solid the kernel was asked about and found at fault, `open` ones not watertight,
    `captions` samples by where their caption is from. Lengths are in characters."""

    samples: int
    documents: int
    with_points: int
    with_images: int
    modalities: dict[str, int]
    captions: dict[str, int]
    invalid: int
    open: int
    steps: Spread | None
    sequence_lengths: Spread | None
    caption_lengths: Spread | None


@dataclass(frozen=True, slots=True)
class Leak:
    """A sample outside the training split whose sequence is in it, under another name."""

    split: str
    id: str
    train_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedReport:
    """A whole dataset.

    `leaks` counts validation and test samples whose sequence also is in the training split (equal designs under other names),
    `failures` left-out inputs by kind, `repairs` inputs that were used in spite of a fault. `undecodable` are samples whose
    sequence cannot be read; they are in no statistics of designs. `seconds` and `peak_memory_mib` are what an input took,
    where the dataset has its costs. `inspected` samples were read for the statistics of designs, the first of each split where
    there was a limit.
    """

    kind: str = field(default="prepared", init=False)
    path: str
    manifest: Manifest
    splits: dict[str, SplitReport]
    leaks: dict[str, int]
    leak_examples: tuple[Leak, ...]
    failures: dict[str, int]
    repairs: dict[str, int]
    ledger: tuple[LedgerFault, ...]
    inspected: int
    inspect_seconds: float
    undecodable: tuple[Fault, ...]
    documents: Documents
    duplicates: Duplicates
    designs: DesignStats
    captions: Spread | None
    tokens: TokenStats | None
    seconds: Spread | None
    peak_memory_mib: Spread | None

    @property
    def has_designs(self) -> bool:
        """Whether any sequence could be read."""
        return self.designs.steps is not None

    @property
    def samples(self) -> int:
        """Samples in all splits."""
        return sum(split.samples for split in self.splits.values())


@dataclass(frozen=True, slots=True)
class PreparedScan:
    """A report, and the splits for a gallery to choose from."""

    report: PreparedReport
    splits: dict[str, SplitScan]


def inspect_dataset(
    path: Path,
    lengths: LengthOptions,
    *,
    limit: int | None = None,
    workers: int = 1,
    progress: Progress = no_progress,
) -> PreparedScan:
    """Look through the dataset in `path`; raises `DataError` as `PartDataset.open` does.

    With `limit` the sequences of so many samples at most are read, spread over the splits by their sizes.
    """
    start = time.monotonic()
    if limit is not None and limit < 1:
        raise UsageError(f"a limit of {limit} samples.", where="--limit", hint="Use 1 or more.")
    if lengths.tokenizer:
        open_tokenizer(lengths.tokenizer)  # a damaged one is told of before the work, not by a worker
    manifest = Manifest.read(path)
    splits = {split: SplitScan(PartDataset.open(path, split)) for split in SPLITS}
    total = sum(len(scan.dataset) for scan in splits.values())
    wanted = {split: _share_of(len(scan.dataset), total, limit) for split, scan in splits.items()}
    before = 0
    for split, scan in splits.items():
        shown = sum(wanted.values())

        def tell(done: int, shown: int = shown, before: int = before) -> None:
            progress(before + done, shown)

        read_rows(scan)
        read_designs(scan, manifest.codec, lengths, wanted[split], workers, tell)
        before += wanted[split]
    return PreparedScan(_report(path, manifest, splits, lengths, start, sum(wanted.values())), splits)


def _share_of(size: int, total: int, limit: int | None) -> int:
    return size if limit is None or limit >= total else min(size, max(1, round(size * limit / total)))


# -------------------------------------------------------------------------------------------- the report


def _report(
    path: Path, manifest: Manifest, splits: dict[str, SplitScan], lengths: LengthOptions, start: float, inspected: int
) -> PreparedReport:
    designs, faults = DesignTally(), FaultTally()
    for scan in splits.values():
        designs.merge(scan.designs)
        faults.merge(scan.faults)
    leaks, examples = _leaks(splits)
    ledger = read_ledger(path / FAILURES_NAME)
    hashes, documents, captions = (
        np.concatenate([np.asarray(getattr(scan, name)) for scan in splits.values()])
        for name in ("hashes", "documents", "caption_characters")
    )
    seconds, memory = _costs(path)
    return PreparedReport(
        path=str(path),
        manifest=manifest,
        splits={split: _split_report(scan) for split, scan in splits.items()},
        leaks=leaks,
        leak_examples=examples,
        failures={fault.kind: fault.count for fault in ledger if fault.dropped},
        repairs={fault.kind: fault.count for fault in ledger if not fault.dropped},
        ledger=ledger,
        inspected=inspected,
        inspect_seconds=time.monotonic() - start,
        undecodable=faults.faults(),
        documents=Documents.of(documents),
        duplicates=find_duplicates(hashes, documents, partial(_name_in, splits)),
        designs=designs.stats(),
        captions=Spread.of(captions),
        tokens=_token_stats(splits, lengths, manifest.codec) if lengths.tokenizer else None,
        seconds=seconds,
        peak_memory_mib=memory,
    )


def _costs(path: Path) -> tuple[Spread | None, Spread | None]:
    """Seconds and MiB that the inputs took, left-out ones included."""
    table = read_costs(path)
    if table is None:
        return None, None
    columns = (table.column(name).drop_null().to_numpy() for name in ("seconds", "peak_memory_mib"))
    seconds, memory = (Spread.of(column) for column in columns)
    return seconds, memory


def _token_stats(splits: dict[str, SplitScan], lengths: LengthOptions, stored_codec: str) -> TokenStats:
    return token_stats(
        lengths,
        lengths.codec or stored_codec,
        {split: scan.designs.tokens for split, scan in splits.items()},
        {split: scan.caption_tokens for split, scan in splits.items()},
    )


def _name_in(splits: dict[str, SplitScan], index: int) -> str:
    """The id of a sample by its number over all splits."""
    for scan in splits.values():
        if index < len(scan.dataset):
            return str(scan.dataset.values("id", [index])[0])
        index -= len(scan.dataset)
    raise IndexError(index)


def _split_report(scan: SplitScan) -> SplitReport:
    points, images = scan.dataset.has_points, scan.dataset.has_images
    modalities: Counter[str] = Counter()
    for has_point in (False, True):
        for has_image in (False, True):
            number = int(((points == has_point) & (images == has_image)).sum())
            if number:
                modalities["text" + "+point" * has_point + "+image" * has_image] = number
    return SplitReport(
        samples=len(scan.dataset),
        documents=len(set(scan.documents)),
        with_points=int(points.sum()),
        with_images=int(images.sum()),
        modalities=dict(modalities.most_common()),
        captions=dict(scan.sources.most_common()),
        invalid=len(scan.invalid),
        open=len(scan.open),
        steps=Spread.of(scan.steps),
        sequence_lengths=Spread.of(scan.sequence_characters),
        caption_lengths=Spread.of(scan.caption_characters),
    )


def _leaks(splits: dict[str, SplitScan]) -> tuple[dict[str, int], tuple[Leak, ...]]:
    train = np.asarray(splits["train"].hashes)
    counts: dict[str, int] = {}
    examples: list[Leak] = []
    for split in SPLITS[1:]:
        own = np.asarray(splits[split].hashes)
        positions = np.flatnonzero(np.isin(own, train))
        counts[split] = len(positions)
        for position in positions[: _LEAK_EXAMPLES - len(examples)].tolist():
            twin = int(np.flatnonzero(train == own[position])[0])
            ids = splits[split].dataset.values("id", [position]) + splits["train"].dataset.values("id", [twin])
            examples.append(Leak(split, *ids))
    return counts, tuple(examples)
