"""Hashes of the live weights, taken when they are saved, so that a conversion can prove that it gave back the same values.

The manifest's hashes say that files are what was written; these say that the weights put together from them are what the
ranks held. They know nothing of DeepSpeed's files: each rank hashes the spans of the flattened weights that it holds, and
notes which span of which weight that is. Whoever has the whole weight, read from any layout, hashes the same spans again.

    engine/zero_pp_rank_3_weight_sums.json   {"format": 1, "hash": "xxh3-128",
                                              "spans": [[NAME, "float32", numel, start, count, hash], …]}

The spans of one weight, over all ranks' files, follow one another without a gap.

The hash is XXH3-128 of a span's bytes, little-endian: two different spans agree by chance once in 2^128. It finds damage and
mistakes, not malice: whoever writes the file can write its hashes too. Hashing runs at the speed of memory (20 GB/s a core,
a disk writes 0.3 to 5), so a save that writes 12 bytes a trained weight and hashes 4 of them pays about a hundredth. In a save
at once values on a GPU are copied to the host once more for it, 64 MiB at a time; behind the training the save's own copies are
hashed, when they are written. Tied weights stand under their first name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from cadtrain.checkpoint.layout import write_atomically
from cadtrain.checkpoint.shard_writer import Derived
from cadtrain.errors import CheckpointError

FORMAT = 1
_FILE = "zero_pp_rank_{rank}_weight_sums.json"
"""Named like DeepSpeed's shards: whoever records a checkpoint's files sees which rank wrote it."""
_PIECE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Span:
    """`count` values from `start` of a flattened weight, and their hash."""

    start: int
    count: int
    xxh3: str


@dataclass(frozen=True, slots=True)
class WeightSum:
    """One weight's spans in order; together they are the whole weight."""

    dtype: torch.dtype
    numel: int
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class LiveSpan:
    """What a rank holds of one weight of `numel` values: `values`, flat, begin at `start` of it."""

    name: str
    numel: int
    start: int
    values: torch.Tensor
    is_constant: bool = False
    """Whether the values never change in this process."""


def sums_name(rank: int) -> str:
    """The name of a rank's file."""
    return _FILE.format(rank=rank)


def sums_of(spans: Iterable[LiveSpan], known: dict[tuple[str, int, int], str] | None = None) -> Derived:
    """A rank's file, to be made when it is written: what the rank holds, hashed. No collective.

    Values in host memory are hashed now, and so are constant ones, once: `known` keeps their hashes from one call to the
    next, so that a frozen model is hashed once a run. Other values on a GPU are hashed when the text is made.
    """
    known = {} if known is None else known
    rows = [
        [span.name, _dtype_name(span.values.dtype), span.numel, span.start, span.values.numel(), _hash_or_values(span, known)]
        for span in spans
        if span.values.numel() or not span.numel
    ]  # fmt: skip
    return Derived(rows, _text_of)


def _text_of(rows: list[list[Any]]) -> str:
    hashed = [[*row[:-1], row[-1] if isinstance(row[-1], str) else hash_values(row[-1])] for row in rows]
    return json.dumps({"format": FORMAT, "hash": "xxh3-128", "spans": hashed}, separators=(",", ":")) + "\n"


def _hash_or_values(span: LiveSpan, known: dict[tuple[str, int, int], str]) -> str | torch.Tensor:
    if not span.is_constant:
        return span.values if _can_wait(span.values) else hash_values(span.values)
    key = (span.name, span.start, span.values.numel())
    if key not in known:
        known[key] = hash_values(span.values)
    return known[key]


def _can_wait(values: torch.Tensor) -> bool:
    """Whether a save copies `values` to the host in any case, as it does with what trains on a GPU."""
    return values.is_cuda


def write_sums(folder: Path, rank: int, spans: Iterable[LiveSpan]) -> None:
    """Hash what this rank holds and write it into `folder`. Every rank calls it; no collective."""
    sums = sums_of(spans)
    write_atomically(folder / sums_name(rank), sums.text(sums.tensors))


def hash_values(values: torch.Tensor) -> str:
    """XXH3-128 of a flat tensor's bytes, wherever it lives."""
    found = xxhash.xxh3_128()
    count = max(1, _PIECE_BYTES // values.element_size())
    for start in range(0, values.numel(), count):
        _update(found, values[start : start + count])
    return found.hexdigest()


def read_sums(folder: Path) -> dict[str, WeightSum]:
    """The sums of whole weights from all ranks' files in `folder`, by name.

    Raises `CheckpointError` where there are none, and for a file that is newer, is no such thing, or is missing.
    """
    paths = sorted(folder.glob(_FILE.format(rank="*")))
    if not paths:
        raise CheckpointError(
            "holds no hashes of the live weights (…_weight_sums.json); they were not stored when it was saved.",
            where=str(folder),
            hint="Convert without --verify; the files are compared with the manifest in any case.",
        )
    found: dict[str, tuple[str, int, list[Span]]] = {}
    for path in paths:
        for name, dtype, numel, span in _rows(path):
            row = found.setdefault(name, (dtype, numel, []))
            if row[:2] != (dtype, numel):
                raise CheckpointError(
                    f"{name} is {dtype} of {numel} values here and {row[:2]} before.", where=str(path)
                )
            row[2].append(span)
    return {
        name: WeightSum(_dtype(dtype, folder), numel, _in_order(name, numel, spans, folder))
        for name, (dtype, numel, spans) in found.items()
    }


def _rows(path: Path) -> list[tuple[str, str, int, Span]]:
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if int(raw["format"]) > FORMAT:
            raise CheckpointError(
                f"format {raw['format']} is newer than this cadtrain's {FORMAT}.",
                where=str(path),
                hint="Update cadtrain.",
            )
        return [(str(n), str(t), int(k), Span(int(s), int(c), str(h))) for n, t, k, s, c, h in raw["spans"]]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"holds no hashes of weights: {error}", where=str(path)) from error


class RunningCheck:
    """Compares a weight that comes in pieces with its sum, span by span."""

    def __init__(self, expected: WeightSum) -> None:
        self._expected = expected
        self._left: Iterator[Span] = iter(expected.spans)
        self._span: Span | None = None
        self._missing = 0
        self._hash = xxhash.xxh3_128()
        self.fault: str | None = None
        """What differs first, None so far."""

    def update(self, piece: torch.Tensor) -> None:
        """Take the next values, flat, in the type that they are stored in."""
        if piece.dtype != self._expected.dtype:
            self.fault = self.fault or f"is {_dtype_name(piece.dtype)} instead of {_dtype_name(self._expected.dtype)}"
        while piece.numel() and self.fault is None:
            if self._missing == 0:
                self._begin()
                continue
            part = piece[: self._missing]
            _update(self._hash, part)
            self._missing -= part.numel()
            piece = piece[part.numel() :]
            if self._missing == 0:
                self._compare()

    def finish(self) -> str | None:
        """What differs, after the last piece; None where every value is the live one."""
        if self.fault is None and (self._missing or any(span.count for span in self._left)):
            self.fault = "ends too early"
        return self.fault

    def _begin(self) -> None:
        self._span = next(self._left, None)
        if self._span is None:
            self.fault = f"has more than its {self._expected.numel} values"
            return
        self._missing = self._span.count
        self._hash = xxhash.xxh3_128()

    def _compare(self) -> None:
        assert self._span is not None
        if self._hash.hexdigest() != self._span.xxh3:
            last = self._span.start + self._span.count
            self.fault = f"differs from the live weight between values {self._span.start:,} and {last:,}"


def _update(hasher: Any, values: torch.Tensor) -> None:
    hasher.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _in_order(name: str, numel: int, spans: list[Span], folder: Path) -> tuple[Span, ...]:
    spans = sorted(spans, key=lambda span: (span.start, span.count))
    at = 0
    for span in spans:
        if span.start != at or span.count < 0:
            raise CheckpointError(f"the hashes of {name} leave out its values from {at} on.", where=str(folder))
        at += span.count
    if at != numel:
        raise CheckpointError(f"the hashes of {name} are of {at} of its {numel} values.", where=str(folder))
    return tuple(spans)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str, folder: Path) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"the hashes of weights are of values of type {name[:40]!r}.", where=str(folder))
    return found
