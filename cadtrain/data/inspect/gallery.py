"""A few designs to look at: chosen over all lengths, with the longest and the faulty ones, each with a small picture."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from cadtrain.cad.codec import get_codec
from cadtrain.cad.formats import read_design
from cadtrain.cad.quantize import dequantize, quantize
from cadtrain.cad.sequence import CadSequence
from cadtrain.data.inspect.folder import captions_of
from cadtrain.data.inspect.prepared import PreparedScan
from cadtrain.data.inspect.raw import STORED_CODEC, RawScan
from cadtrain.data.inspect.shares import Progress, no_progress
from cadtrain.data.inspect.tally import DesignTally
from cadtrain.data.prepare.sources.pictures import find_pictures
from cadtrain.data.sample import encode_image
from cadtrain.errors import CadtrainError, DataError
from cadtrain.geometry.part import Part
from cadtrain.geometry.sandbox import Failure, KernelPool

PICTURE_SIZE = 224
"""Pixels to a side: twice as many as a page shows, for fine screens."""

_MOST_BYTES = 7500
"""Of a picture, so that a page of 300 stays below 5 MB; a rendered one takes 2,000 to 4,000."""

_EXTREMES = 3
"""So many of the longest, and of those with the most steps."""
_FAULTY_SHARE = 6
"""At most one in so many is shown because something is wrong with it, for each kind of fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One design to show. `flags` are words such as `longest` or `not closed`; `picture` is a WebP file, or None, and then
    `picture_fault` says why there is none. `caption_source` is empty where there is no caption, `num_tokens` None without a tokenizer."""

    id: str
    split: str = ""
    caption: str = ""
    caption_source: str = ""
    sequence: str
    num_steps: int
    num_tokens: int | None = None
    flags: tuple[str, ...] = ()
    picture: bytes | None = None
    picture_fault: str = ""


@dataclass(frozen=True, slots=True)
class _Pick:
    """A chosen design: its row in the tally, and what is special about it."""

    row: int
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Draft:
    """A card that waits for its picture: from `stored` bytes, else from building `sequence`."""

    card: Card
    stored: bytes | None
    sequence: CadSequence


def choose(tally: DesignTally, count: int, faulty: dict[str, list[int]]) -> list[_Pick]:
    """`count` designs or fewer, the shortest first and no two equal: the longest, those with the most steps, some of each kind in
    `faulty` (a flag and positions), the rest evenly over the ranks of all lengths. The same tally gives the same choice."""
    lengths, steps = np.asarray(tally.characters), np.asarray(tally.steps)
    marked = {flag: np.isin(np.asarray(tally.positions), np.asarray(p, dtype=np.int64)) for flag, p in faulty.items()}
    chosen: dict[int, int] = {}  # hash -> row
    flags: dict[int, list[str]] = {}

    def take(rows: Iterator[int], most: int, flag: str = "") -> None:
        for row in rows:
            key = tally.hashes[row]
            if most <= 0 or (key not in chosen and len(chosen) >= count):
                return
            is_new = key not in chosen
            if is_new:
                chosen[key] = row
            if flag and chosen[key] == row:
                flags.setdefault(row, []).append(flag)
                most -= 1
            elif is_new:
                most -= 1

    extremes = min(_EXTREMES, max(1, count // 8))
    take(iter(np.argsort(-lengths, kind="stable")[: 2 * extremes].tolist()), extremes, "longest")
    take(iter(np.argsort(-steps, kind="stable")[: 2 * extremes].tolist()), extremes, "most steps")
    for mask in marked.values():
        rows = np.flatnonzero(mask).tolist()
        take(_evenly(rows, len(rows)), max(1, count // _FAULTY_SHARE))
    by_length = np.argsort(lengths, kind="stable").tolist()
    for wanted in (count - len(chosen), len(by_length)):  # a second time, for those that were equal to one before
        take(_evenly(by_length, wanted), count - len(chosen))
    rows = sorted(chosen.values(), key=lambda row: (lengths[row], row))
    return [_Pick(row, (*flags.get(row, ()), *(flag for flag, mask in marked.items() if mask[row]))) for row in rows]


def _evenly(rows: list[int], count: int) -> Iterator[int]:
    """`count` of the rows at even distances."""
    count = min(count, len(rows))
    return (rows[(2 * place + 1) * len(rows) // (2 * count)] for place in range(count))


def make_gallery(
    scan: RawScan | PreparedScan,
    count: int,
    *,
    workers: int,
    time_limit_seconds: float,
    progress: Progress = no_progress,
) -> list[Card]:
    """`count` cards or fewer, the shortest first. Stored views are used where there are any; other parts are built by the kernel, and
    one that cannot be built within the time limit has a card without a picture."""
    if count <= 0:
        return []
    drafts = _raw_drafts(scan, count) if isinstance(scan, RawScan) else _prepared_drafts(scan, count)
    cards = [draft.card for draft in drafts]
    to_build: list[int] = []
    for number, draft in enumerate(drafts):
        picture = _shrunk(draft.stored, draft.card.id) if draft.stored is not None else None
        if picture is None:
            to_build.append(number)
        else:
            cards[number] = replace(draft.card, picture=picture)
    done = len(cards) - len(to_build)
    progress(done, len(cards))
    if to_build:
        with KernelPool(min(workers, len(to_build)), time_limit_seconds) as pool:
            for outcome in pool.map(draw, [drafts[number].sequence for number in to_build]):
                number = to_build[outcome.index]
                cards[number] = _with_part(cards[number], outcome.value, outcome.failure)
                done += 1
                progress(done, len(cards))
    return cards


def draw(sequence: CadSequence) -> Part:
    """The design's solid with one picture; the body of a kernel worker."""
    from cadtrain.geometry.part import make_part

    return make_part(sequence, num_points=0, camera_indices=(0,), image_size=PICTURE_SIZE, seed=0)


def _with_part(card: Card, part: Part | None, failure: Failure | None) -> Card:
    if part is None:
        return replace(card, picture_fault=failure.reason if failure else "not drawn", flags=(*card.flags, "not built"))
    flags = [flag for flag, is_so in (("invalid", not part.is_valid), ("not closed", not part.is_watertight)) if is_so]
    added = tuple(flag for flag in flags if flag not in card.flags)
    return replace(card, picture=_shrunk(part.images[0], card.id), flags=(*card.flags, *added))


def _shrunk(data: bytes, where: str) -> bytes | None:
    """The picture as a small WebP file, or None for bytes that are no picture."""
    try:
        square = encode_image(data, PICTURE_SIZE, where=where)
    except DataError:
        return None
    shrunk = b""
    with Image.open(io.BytesIO(square)) as opened:
        picture = opened.convert("RGB")
    for quality in (80, 50, 20):
        buffer = io.BytesIO()
        picture.save(buffer, format="WEBP", quality=quality, method=4)
        shrunk = buffer.getvalue()
        if len(shrunk) <= _MOST_BYTES:
            break
    return shrunk


# -------------------------------------------------------------------------------------------- drafts


def _raw_drafts(scan: RawScan, count: int) -> list[_Draft]:
    picks = choose(scan.tally, count, {})
    ids = [scan.ids[scan.tally.positions[pick.row]] for pick in picks]
    captions = captions_of(scan.folder, set(ids))
    drafts = []
    for part_id, pick in zip(ids, picks, strict=True):
        try:
            sequence = read_design(scan.folder.design_path(part_id))
            text = get_codec(STORED_CODEC).encode(quantize(sequence))
        except CadtrainError:
            continue  # the file was changed since it was counted
        caption = captions.get(part_id, "")
        card = Card(
            id=part_id,
            caption=caption,
            caption_source="file" if caption else "",
            sequence=text,
            num_steps=scan.tally.steps[pick.row],
            num_tokens=_tokens(scan.tally, pick.row),
            flags=pick.flags,
        )
        drafts.append(_Draft(card, _first_picture(scan.folder.pictures, part_id), sequence))
    return drafts


def _first_picture(folder: Path | None, part_id: str) -> bytes | None:
    for path in find_pictures(folder, part_id)[:1] if folder else ():
        try:
            return path.read_bytes()
        except OSError:
            return None
    return None


def _prepared_drafts(scan: PreparedScan, count: int) -> list[_Draft]:
    codec = get_codec(scan.report.manifest.codec)
    tally, faulty, splits = _over_splits(scan)
    drafts = []
    for pick in choose(tally, count, faulty):
        number = tally.positions[pick.row]
        name, first = splits[bisect_right(splits, number, key=lambda split: split[1]) - 1]
        dataset, position = scan.splits[name].dataset, number - first
        sample = dataset[position]
        source = dataset.values("caption_source", [position])[0] if dataset.has_column("caption_source") else ""
        card = Card(
            id=sample.id,
            split=name,
            caption=sample.caption,
            caption_source=source or "",
            sequence=sample.sequence,
            num_steps=tally.steps[pick.row],
            num_tokens=_tokens(tally, pick.row),
            flags=pick.flags,
        )
        stored = sample.images[0] if sample.images else None
        drafts.append(_Draft(card, stored, dequantize(codec.decode(sample.sequence))))
    return drafts


def _over_splits(scan: PreparedScan) -> tuple[DesignTally, dict[str, list[int]], list[tuple[str, int]]]:
    """All splits as one tally with samples numbered over them, faulty ones by flag, and the first number of each split."""
    tally = DesignTally()
    faulty: dict[str, list[int]] = {"invalid": [], "not closed": []}
    splits: list[tuple[str, int]] = []
    first = 0
    for name, split in scan.splits.items():
        before = len(tally)
        tally.merge(split.designs)
        for row in range(before, len(tally)):
            tally.positions[row] += first
        faulty["invalid"] += [first + position for position in split.invalid]
        faulty["not closed"] += [first + position for position in split.open]
        if len(split.dataset):
            splits.append((name, first))
        first += len(split.dataset)
    return tally, faulty, splits


def _tokens(tally: DesignTally, row: int) -> int | None:
    return tally.tokens[row] if len(tally.tokens) and tally.tokens[row] >= 0 else None
