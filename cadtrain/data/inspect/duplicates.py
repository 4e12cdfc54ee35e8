"""Equal designs under several names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cadtrain.data.inspect.tally import printable

_EXAMPLES = 5
_NAMES = 4


@dataclass(frozen=True, slots=True)
class Group:
    """`count` designs that are equal, and the first names of them."""

    count: int
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Designs whose quantized sequence another one has too.

    `repeats` counts designs beyond the first of each group, `across_documents` groups with more than one document, `examples` are the
    largest groups.
    """

    distinct: int
    repeats: int
    groups: int
    largest: int
    across_documents: int
    examples: tuple[Group, ...]


def find_duplicates(
    hashes: NDArray[np.uint64], documents: NDArray[np.uint64], name_of: Callable[[int], str]
) -> Duplicates:
    """Groups of equal `hashes` [N] (of sequences), with the hash of each one's document [N]."""
    order = np.argsort(hashes, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(hashes[order]) != 0]) if len(order) else np.zeros(0, dtype=np.int64)
    sizes = np.diff(np.r_[starts, len(order)])
    grouped = [(int(starts[g]), int(sizes[g])) for g in np.flatnonzero(sizes > 1)]
    largest = sorted(grouped, key=lambda pair: -pair[1])[:_EXAMPLES]
    return Duplicates(
        distinct=len(starts),
        repeats=int(len(order) - len(starts)),
        groups=len(grouped),
        largest=int(sizes.max(initial=0)),
        across_documents=sum(len(np.unique(documents[order[start : start + size]])) > 1 for start, size in grouped),
        examples=tuple(
            Group(size, tuple(printable(name_of(i)) for i in order[start : start + min(size, _NAMES)].tolist()))
            for start, size in largest
        ),
    )


@dataclass(frozen=True, slots=True)
class Documents:
    """Documents, and those of which there is more than one variant."""

    count: int
    with_variants: int
    most_variants: int

    @classmethod
    def of(cls, hashes: NDArray[np.uint64]) -> Documents:
        """From the hash of each part's document [N]."""
        _, counts = np.unique(hashes, return_counts=True)
        return cls(len(counts), int((counts > 1).sum()), int(counts.max(initial=0)))
