"""Reading a split: whole columns a few thousand rows at a time, and the designs in its sequences on all cores."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from cadtrain.cad.codec import get_codec
from cadtrain.data.inspect.lengths import LengthOptions
from cadtrain.data.inspect.shares import in_shares
from cadtrain.data.inspect.tally import DesignTally, FaultTally, Number, hash64
from cadtrain.data.inspect.tokens import count_written, open_tokenizer, written
from cadtrain.data.shards import PartDataset
from cadtrain.errors import GrammarError
from cadtrain.geometry.sandbox import Failure

SHARE_SIZE = 512
FEWEST_FOR_WORKERS = 8192
"""Below this many samples, starting processes takes longer than reading them."""


@dataclass(slots=True)
class SplitScan:
    """A split while it is read, and what a gallery chooses from: `invalid` and `open` are positions."""

    dataset: PartDataset
    designs: DesignTally = field(default_factory=DesignTally)
    faults: FaultTally = field(default_factory=FaultTally)
    hashes: Number = field(default_factory=lambda: array("Q"))
    """Of the sequences of all rows."""
    documents: Number = field(default_factory=lambda: array("Q"))
    steps: Number = field(default_factory=lambda: array("i"))
    sequence_characters: Number = field(default_factory=lambda: array("i"))
    caption_characters: Number = field(default_factory=lambda: array("i"))
    caption_tokens: Number = field(default_factory=lambda: array("i"))
    """Of the designs in `designs`."""
    invalid: Number = field(default_factory=lambda: array("q"))
    open: Number = field(default_factory=lambda: array("q"))
    sources: Counter[str] = field(default_factory=Counter)


def read_rows(scan: SplitScan) -> None:
    """Fill in all that needs no design to be read."""
    names = ("document", "caption", "caption_source", "sequence", "num_steps", "is_valid", "is_watertight")
    first = 0
    for documents, captions, sources, sequences, steps, valid, watertight in scan.dataset.scan(*names):
        scan.documents.extend(hash64(document) for document in documents)
        scan.caption_characters.extend(len(caption) for caption in captions)
        scan.sources.update("unknown" if source is None else source for source in sources)
        scan.hashes.extend(hash64(sequence) for sequence in sequences)
        scan.sequence_characters.extend(len(sequence) for sequence in sequences)
        scan.steps.extend(number or 0 for number in steps)
        scan.invalid.extend(first + row for row, value in enumerate(valid) if value is False)
        scan.open.extend(first + row for row, value in enumerate(watertight) if value is False)
        first += len(documents)


# -------------------------------------------------------------------------------------------- designs


@dataclass(slots=True)
class _Share:
    """What a worker found in some sequences."""

    designs: DesignTally = field(default_factory=DesignTally)
    faults: FaultTally = field(default_factory=FaultTally)
    caption_tokens: Number = field(default_factory=lambda: array("i"))


_Row = tuple[int, str, str, str]
"""Position, id, sequence, caption."""


def read_designs(
    scan: SplitScan, codec: str, lengths: LengthOptions, wanted: int, workers: int, tell: Callable[[int], None]
) -> None:
    """Read the first `wanted` sequences, written in `codec`; `tell` is given how many are done."""
    done = 0

    def count(number: int) -> None:
        nonlocal done
        done += number
        tell(done)

    def rows() -> Iterator[_Row]:
        position = 0
        for columns in scan.dataset.scan("id", "sequence", "caption"):
            for row in zip(*columns, strict=True):
                if position == wanted:
                    return
                yield position, *row
                position += 1

    shares = in_shares(
        partial(read_share, codec, lengths),
        rows(),
        share_size=SHARE_SIZE,
        workers=workers if wanted >= FEWEST_FOR_WORKERS else 1,
        lost=_lost,
        done=count,
    )
    for share in shares:
        scan.designs.merge(share.designs)
        scan.faults.merge(share.faults)
        scan.caption_tokens.extend(share.caption_tokens)


def read_share(codec: str, lengths: LengthOptions, rows: list[_Row]) -> _Share:
    """Read the sequences of rows (position, id, sequence, caption) and count them; the body of a worker."""
    share = _Share()
    texts: list[str | None] = []
    captions: list[str] = []
    stored = get_codec(codec)
    for position, part_id, text, caption in rows:
        try:
            sequence = stored.decode(text)
        except GrammarError as error:
            share.faults.add("grammar", "", part_id, error.message)
            continue
        share.designs.add(position, sequence, text)
        if lengths.tokenizer is not None:
            texts.append(written(lengths.codec, sequence) if lengths.codec not in (None, codec) else text)
            captions.append(caption)
    if lengths.tokenizer is not None:
        share.designs.tokens.extend(count_written(lengths.tokenizer, lengths.codec or codec, texts))
        share.caption_tokens.extend(open_tokenizer(lengths.tokenizer).count(captions).tolist())
    return share


def _lost(row: _Row, failure: Failure) -> _Share:
    share = _Share()
    share.faults.add(failure.kind, "", row[1], failure.reason)
    return share
