"""Parts whose quantized sequences are equal, and which of them a dataset keeps.

Only hashes are held, 8 bytes a row and column, so that millions of rows fit. Two different sequences with one hash (8 bytes) are
expected once in 3 · 10^19 / N² datasets of N rows, 1 in 10^8 for Omni-CAD.
"""

from __future__ import annotations

from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from cadtrain.data.manifest import SPLITS


class Duplicates(StrEnum):
    """What becomes of parts with equal sequences; `docs/data.md` has the reasons for choosing one.

    `OUT_OF_TEST`: a test part that is in train, and a validation part that is in train or test, is left out; test and validation
    hold each design once. `OUT_OF_TRAIN`: test and validation stay whole, and training parts that are in one of them are left out.
    `DROP`: every design once in the whole dataset, in train if it occurs there. `KEEP`: all stay. `ONE_SPLIT`: all stay, and
    equal ones go to one side (`into_one_split`); for datasets in which every part is a document of its own, since it parts variants.
    """

    OUT_OF_TEST = "out-of-test"
    OUT_OF_TRAIN = "out-of-train"
    DROP = "drop"
    KEEP = "keep"
    ONE_SPLIT = "one-split"


OFFERED = tuple(policy for policy in Duplicates if policy is not Duplicates.ONE_SPLIT)
"""The policies for designs from files, where several parts may be of one document."""

# Which split's copy stays, by policy: the lowest number.
_PRECEDENCE = {
    Duplicates.OUT_OF_TEST: {"train": 0, "test": 1, "validation": 2},
    Duplicates.DROP: {"train": 0, "test": 1, "validation": 2},
    Duplicates.OUT_OF_TRAIN: {"test": 0, "validation": 1, "train": 2},
}
_TRAIN = SPLITS.index("train")


def find_redundant(
    keys: NDArray[np.uint64],
    own_keys: NDArray[np.uint64],
    splits: NDArray[np.uint8],
    is_whole: NDArray[np.bool_],
    policy: Duplicates,
) -> NDArray[np.int64]:
    """int64[N]: for each row the row that it repeats and for whose sake it is left out, or -1 for one that stays.

    All arguments are [N]: hashes of the sequence, and of sequence and document together; the split's place in `SPLITS`; False for a
    state on the way to a design. Whatever the policy, such a state is left out where its document has the same one before it or as
    a whole design.
    """
    number = len(keys)
    twins = np.full(number, -1, dtype=np.int64)
    # States of one document: its whole designs go before states, and earlier rows before later ones.
    first = _first_of_group(own_keys, np.where(is_whole, 0, 1).astype(np.int64))
    is_state = ~is_whole & (first != np.arange(number))
    twins[is_state] = first[is_state]
    if policy in (Duplicates.KEEP, Duplicates.ONE_SPLIT):
        return twins
    left = np.flatnonzero(twins < 0)
    rank = np.array([_PRECEDENCE[policy][split] for split in SPLITS], dtype=np.int64)
    kept = left[_first_of_group(keys[left], rank[splits[left]])]
    repeats = kept != left
    in_train = splits[left] == _TRAIN
    if policy is Duplicates.OUT_OF_TEST:
        repeats &= ~in_train
    elif policy is Duplicates.OUT_OF_TRAIN:
        repeats &= in_train & (splits[kept] != _TRAIN)
    twins[left[repeats]] = kept[repeats]
    # What a state repeats may itself repeat another row: that one is there to be looked at.
    chained = np.flatnonzero(is_state)
    through = twins[twins[chained]]
    twins[chained] = np.where(through >= 0, through, twins[chained])
    return twins


def into_one_split(keys: NDArray[np.uint64], splits: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """uint8[N]: for each row its split's place in `SPLITS` when equal `keys` [N] share one; int64[N]: the row that it then follows.

    Of the splits a design lies in, train takes it before test, and test before validation: so only few rows move. Where that would leave a split
    empty, the first design of it that can is gathered there instead. A row that stays follows itself.
    """
    order = _PRECEDENCE[Duplicates.OUT_OF_TEST]
    leaders = _first_of_group(keys, np.array([order[split] for split in SPLITS], dtype=np.int64)[splits])
    present = np.unique(splits)
    for split in present:
        for row in np.flatnonzero(splits == split):
            if (splits[leaders] == split).any():
                break
            gathered = np.where(keys == keys[row], row, leaders)
            if len(np.unique(splits[gathered])) > len(np.unique(splits[leaders])):
                leaders = gathered
    placed = splits[leaders]
    return placed, np.where(placed == splits, np.arange(len(keys)), leaders)


def _first_of_group(keys: NDArray[np.uint64], rank: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64[N]: for each row, the row with the same key that has the lowest rank and, among those, comes first."""
    order = np.lexsort((np.arange(len(keys)), rank, keys))
    ordered = keys[order]
    begins = np.concatenate([[True], ordered[1:] != ordered[:-1]]) if len(keys) else np.zeros(0, dtype=bool)
    starts = np.flatnonzero(begins)
    heads = order[starts][np.cumsum(begins) - 1] if len(keys) else order
    first = np.empty(len(keys), dtype=np.int64)
    first[order] = heads
    return first
