"""Token lengths, and what a budget of tokens keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cadtrain.data.inspect.values import Spread
from cadtrain.errors import UsageError

DEFAULT_BUDGETS = (512, 1024, 2048, 4096)


@dataclass(frozen=True, slots=True)
class LengthOptions:
    """Which lengths are measured: `tokenizer` as `tokens.resolve_tokenizer` gives it, or None for none; `label` is its name for
    people, `codec` the written form that is measured (None: as stored, `compact` for raw designs), `budgets` are tokens."""

    tokenizer: str | None = None
    label: str = ""
    codec: str | None = None
    budgets: tuple[int, ...] = DEFAULT_BUDGETS


@dataclass(frozen=True, slots=True)
class Budget:
    """What fits into `tokens`: sequences alone, and with their captions before them. `kept_by_split` counts sequences alone;
    it is empty for a raw folder."""

    tokens: int
    kept: int
    dropped: int
    kept_with_caption: int
    dropped_with_caption: int
    kept_by_split: dict[str, int]


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Lengths in tokens, without special tokens, the instruction, and the tokens of points and views.

    `sample` is caption and sequence together. `unwritable` designs are beyond what the codec can write; they count as dropped by
    every budget.
    """

    tokenizer: str
    codec: str
    unwritable: int
    sequence: Spread | None
    caption: Spread | None
    sample: Spread | None
    budgets: tuple[Budget, ...]


def parse_budgets(text: str) -> tuple[int, ...]:
    """`512,1024` -> (512, 1024), sorted and each once; raises `UsageError`."""
    budgets = set()
    for word in text.split(","):
        if not word.strip().isdecimal() or not 0 < int(word) < 2**31:
            raise UsageError(
                f"{word.strip()!r} is no number of tokens.", where=f"--budget {text}", hint="Write e.g. 512,1024,2048."
            )
        budgets.add(int(word))
    return tuple(sorted(budgets))


def token_stats(
    options: LengthOptions,
    codec: str,
    sequences: Mapping[str, Sequence[int] | NDArray[np.int32]],
    captions: Mapping[str, Sequence[int] | NDArray[np.int32]],
    caption_lengths: NDArray[np.int32] | None = None,
) -> TokenStats:
    """Statistics over splits (a raw folder is one, named "") written in `codec`, from tokens of each design's sequence (-1: unwritable) and of its
    caption (0: none). `caption_lengths` replaces the lengths of the captions where designs do not have one each."""
    target = {split: np.asarray(lengths) for split, lengths in sequences.items()}
    whole = {split: np.where(t < 0, -1, t + np.asarray(captions[split])) for split, t in target.items()}
    all_targets, all_wholes = (np.concatenate([*found.values()]) for found in (target, whole))
    all_captions = (
        np.concatenate([np.asarray(captions[split]) for split in target])
        if caption_lengths is None
        else caption_lengths
    )
    fits = (all_targets >= 0).sum()
    budgets = []
    for tokens in options.budgets:
        by_split = {split: int(((t >= 0) & (t <= tokens)).sum()) for split, t in target.items()}
        kept = sum(by_split.values())
        kept_whole = int(((all_wholes >= 0) & (all_wholes <= tokens)).sum())
        size = len(all_targets)
        named = {split: number for split, number in by_split.items() if split}
        budgets.append(Budget(tokens, kept, size - kept, kept_whole, size - kept_whole, named))
    return TokenStats(
        tokenizer=options.label,
        codec=codec,
        unwritable=int(len(all_targets) - fits),
        sequence=Spread.of(all_targets[all_targets >= 0]),
        caption=Spread.of(all_captions[all_captions > 0]),
        sample=Spread.of(all_wholes[all_wholes >= 0]),
        budgets=tuple(budgets),
    )
