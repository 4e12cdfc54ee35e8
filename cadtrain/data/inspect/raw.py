"""What a raw folder holds: which designs can be read, what they are made of, which captions, clouds and pictures go with them."""

from __future__ import annotations

import re
import time
from array import array
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cadtrain.cad.codec import get_codec
from cadtrain.cad.formats import read_design
from cadtrain.cad.quantize import quantize
from cadtrain.data.inspect.duplicates import Documents, Duplicates, find_duplicates
from cadtrain.data.inspect.folder import CaptionTally, RawFolder, count_captions, list_designs
from cadtrain.data.inspect.lengths import LengthOptions, TokenStats, token_stats
from cadtrain.data.inspect.shares import Progress, in_shares, no_progress
from cadtrain.data.inspect.tally import DesignStats, DesignTally, Fault, FaultTally, Number, hash64
from cadtrain.data.inspect.tokens import count_written, open_tokenizer, written
from cadtrain.data.inspect.values import Spread
from cadtrain.data.prepare.sources.clouds import find_cloud
from cadtrain.data.prepare.sources.pictures import find_pictures
from cadtrain.data.splits import document_of
from cadtrain.errors import DataError, GeometryError, SchemaError, UsageError
from cadtrain.geometry.sandbox import Failure

STORED_CODEC = "compact"
SHARE_SIZE = 64
FEWEST_FOR_WORKERS = 512
"""Below this many files, starting processes takes longer than reading them."""

_MM = 1000.0
"""Millimetres in a metre, the files' unit."""
_CLOUD, _PICTURES = 1, 2


@dataclass(frozen=True, slots=True)
class Sources:
    """What lies beside the designs; `clouds` and `pictures` count the inspected designs that have any."""

    captions: int
    captions_without_design: int
    clouds: int
    pictures: int
    caption_faults: tuple[Fault, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RawReport:
    """A raw folder. `files` is all designs found, `inspected` those looked at (`--limit`), `readable + refused` of them.

    `modalities` counts inspected designs by what they have: `text`, `text+point+image`, …, `none`. `size_mm` is the longest side,
    the files' unit being the metre. Duplicates, documents and statistics are over the readable designs.
    """

    kind: str = field(default="raw", init=False)
    path: str
    layout: str
    files: int
    inspected: int
    readable: int
    refused: int
    json_bytes: int
    inspect_seconds: float
    sources: Sources
    modalities: dict[str, int]
    refusals: tuple[Fault, ...]
    documents: Documents
    duplicates: Duplicates
    designs: DesignStats
    size_mm: Spread | None
    captions: Spread | None
    tokens: TokenStats | None

    @property
    def has_designs(self) -> bool:
        """Whether any design could be read."""
        return self.readable > 0


@dataclass(frozen=True, slots=True)
class RawScan:
    """A report, and what a gallery needs to choose from it: the folder, the inspected ids and their designs."""

    report: RawReport
    folder: RawFolder
    ids: list[str]
    tally: DesignTally


@dataclass(slots=True)
class _Share:
    """What a worker found in some files."""

    designs: DesignTally = field(default_factory=DesignTally)
    faults: FaultTally = field(default_factory=FaultTally)
    found: Number = field(default_factory=lambda: array("B"))
    """Bits for each file: a cloud, pictures."""


def inspect_raw(
    path: Path,
    lengths: LengthOptions,
    *,
    limit: int | None = None,
    workers: int = 1,
    progress: Progress = no_progress,
) -> RawScan:
    """Read the designs in or below `path`, or `limit` of them spread evenly; needs no kernel.

    Raises `DataError` where there are none. A design that cannot be used is counted, with the reason.
    """
    start = time.monotonic()
    folder = list_designs(path)
    tokenizer = open_tokenizer(lengths.tokenizer) if lengths.tokenizer else None
    ids = _spread(folder.ids, limit)
    share = _Share()

    def done(number: int) -> None:
        progress(min(len(share.found), len(ids)), len(ids))

    progress(0, len(ids))
    results = in_shares(
        partial(read_share, folder.designs, folder.clouds, folder.pictures, lengths),
        enumerate(ids),
        share_size=SHARE_SIZE,
        workers=workers if len(ids) >= FEWEST_FOR_WORKERS else 1,
        lost=_lost,
        done=done,
    )
    for part in results:
        share.designs.merge(part.designs)
        share.faults.merge(part.faults)
        share.found.extend(part.found)
    captions = count_captions(folder, tokenizer)
    report = _report(folder, ids, share, captions, lengths, time.monotonic() - start)
    return RawScan(report, folder, ids, share.designs)


def _spread(ids: list[str], limit: int | None) -> list[str]:
    if limit is None or limit >= len(ids):
        return ids
    if limit < 1:
        raise UsageError(f"a limit of {limit} designs.", where="--limit", hint="Use 1 or more.")
    return [ids[position * len(ids) // limit] for position in range(limit)]


# -------------------------------------------------------------------------------------------- in the workers


def read_share(
    designs: Path, clouds: Path | None, pictures: Path | None, lengths: LengthOptions, inputs: list[tuple[int, str]]
) -> _Share:
    """Read the designs of (position, id) and count them; the body of a worker."""
    share = _Share()
    texts: list[str | None] = []
    for position, part_id in inputs:
        has_cloud = clouds is not None and find_cloud(clouds, part_id) is not None
        has_pictures = pictures is not None and bool(find_pictures(pictures, part_id))
        share.found.append(has_cloud * _CLOUD + has_pictures * _PICTURES)
        _read_design(share, texts, position, designs / f"{part_id}.json", part_id, lengths)
    if lengths.tokenizer is not None:
        share.designs.tokens.extend(count_written(lengths.tokenizer, lengths.codec or STORED_CODEC, texts))
    return share


def _read_design(
    share: _Share, texts: list[str | None], position: int, path: Path, part_id: str, lengths: LengthOptions
) -> None:
    try:
        sequence = read_design(path)
        quantized = quantize(sequence)
    except SchemaError as error:
        share.faults.add("schema", without_names(error.json_path), part_id, error.message)
    except DataError as error:
        share.faults.add("unreadable", "", part_id, error.message)
    except GeometryError as error:
        share.faults.add(error.kind, "", part_id, error.reason)
    else:
        compact = get_codec(STORED_CODEC).encode(quantized)
        share.designs.add(position, quantized, compact)
        share.designs.sizes.append(max(sequence.material_box().size))
        if lengths.tokenizer is not None:
            texts.append(written(lengths.codec, quantized) if lengths.codec not in (None, STORED_CODEC) else compact)


def _lost(item: tuple[int, str], failure: Failure) -> _Share:
    share = _Share()
    share.found.append(0)
    share.faults.add(failure.kind, "", item[1], failure.reason)
    return share


_NAMED = re.compile(r"\b(entities|profiles)(?:\.\w+|\['(?:[^'\\]|\\.)*'\]|\[\"(?:[^\"\\]|\\.)*\"\])")
_INDEX = re.compile(r"\[\d+\]")


def without_names(json_path: str) -> str:
    """A place with `*` for the names of entities and profiles and for list positions: `$.entities.*.profiles.*.loops[*]`."""
    return _INDEX.sub("[*]", _NAMED.sub(r"\1.*", json_path))


# -------------------------------------------------------------------------------------------- the report


def _report(
    folder: RawFolder, ids: list[str], share: _Share, captions: CaptionTally, lengths: LengthOptions, seconds: float
) -> RawReport:
    tally = share.designs
    caption_of = captions.positions_of(_hashes(ids))
    documents = _hashes([document_of(ids[position]) for position in tally.positions])
    sizes = np.asarray(tally.sizes) * _MM
    found = np.asarray(share.found)
    has_design = np.isin(np.asarray(captions.hashes), _hashes(folder.ids))
    return RawReport(
        path=str(folder.root),
        layout=folder.layout,
        files=len(folder.ids),
        inspected=len(ids),
        readable=len(tally),
        refused=share.faults.total,
        json_bytes=folder.num_bytes,
        inspect_seconds=seconds,
        sources=Sources(
            captions=len(captions.hashes),
            captions_without_design=int((~has_design).sum()),
            clouds=int((found & _CLOUD > 0).sum()),
            pictures=int((found & _PICTURES > 0).sum()),
            caption_faults=captions.faults.faults(),
        ),
        modalities=_modalities(caption_of >= 0, found),
        refusals=share.faults.faults(),
        documents=Documents.of(documents),
        duplicates=find_duplicates(np.asarray(tally.hashes), documents, lambda i: ids[tally.positions[i]]),
        designs=tally.stats(),
        size_mm=Spread.of(sizes[np.isfinite(sizes)]),
        captions=Spread.of(captions.characters),
        tokens=_token_stats(tally, captions, caption_of, lengths) if lengths.tokenizer else None,
    )


def _hashes(names: list[str]) -> NDArray[np.uint64]:
    return np.fromiter((hash64(name) for name in names), dtype=np.uint64, count=len(names))


def _modalities(has_caption: NDArray[np.bool_], found: NDArray[np.uint8]) -> dict[str, int]:
    counts = Counter(zip(has_caption.tolist(), found.tolist(), strict=True))
    named: Counter[str] = Counter()
    for (has_text, bits), number in counts.items():
        names = ["text"] * has_text + ["point"] * bool(bits & _CLOUD) + ["image"] * bool(bits & _PICTURES)
        named["+".join(names) or "none"] += number
    return dict(named.most_common())


def _token_stats(
    tally: DesignTally, captions: CaptionTally, caption_of: NDArray[np.int64], lengths: LengthOptions
) -> TokenStats:
    known = np.append(np.asarray(captions.tokens, dtype=np.int32), np.int32(0))  # -1, no caption, finds the 0
    own = known[caption_of[np.asarray(tally.positions, dtype=np.int64)]]
    return token_stats(
        lengths,
        lengths.codec or STORED_CODEC,
        {"": np.asarray(tally.tokens)},
        {"": own},
        np.asarray(captions.tokens, dtype=np.int32),
    )
