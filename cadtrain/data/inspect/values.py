"""How numbers are spread: a few quantiles, and a histogram whose bins grow with the values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_MOST_FINE_BINS = 14
"""Whole numbers within a range this wide get a bin each."""


@dataclass(frozen=True, slots=True)
class Bin:
    """`count` values v with `low` <= v < `high`."""

    low: float
    high: float
    count: int


@dataclass(frozen=True, slots=True)
class Spread:
    """The distribution of some numbers; quantiles are values that occur. Whole numbers are stored as `int`."""

    count: int
    mean: float
    min: float
    median: float
    p90: float
    p99: float
    max: float
    histogram: tuple[Bin, ...]

    @classmethod
    def of(cls, values: Sequence[float] | NDArray[np.generic]) -> Spread | None:
        """The spread of whole or other numbers, none of them negative; None for no values."""
        array = np.asarray(values)
        if not array.size:
            return None
        is_whole = array.dtype.kind in "iu"
        plain = int if is_whole else float
        low, median, p90, p99, high = (plain(v) for v in np.quantile(array, [0, 0.5, 0.9, 0.99, 1], method="nearest"))
        edges = whole_edges(int(low), int(high)) if is_whole else decade_edges(low, high)
        counts, _ = np.histogram(array, bins=[*edges[:-1], np.inf])  # the last bin's own end would count as inside it
        bins = tuple(Bin(edges[i], edges[i + 1], int(n)) for i, n in enumerate(counts))
        return cls(int(array.size), float(array.mean()), low, median, p90, p99, high, bins)


def whole_edges(low: int, high: int) -> list[float]:
    """Ends of bins over whole numbers `low` to `high`: each its own where they are few, else 1, 2, … 8, 12, 16, 24, 32, …, or
    steps half as large (8, 10, 12, 14, 16, 20, …) over a range of less than four octaves."""
    if high - low < _MOST_FINE_BINS:
        return list(range(low, high + 2))
    parts = 4 if high < 16 * max(low, 1) else 2
    edges = list(range(8))
    step = 8
    while step <= high:
        edges += [step + step * part // parts for part in range(parts)]
        step *= 2
    edges.append(step)
    return _around(edges, low, high)


def decade_edges(low: float, high: float) -> list[float]:
    """Ends of bins over numbers at 1, 2 and 5 times the powers of ten, over six decades at most: what is smaller, and 0, falls into
    the first bin, which then begins at 0."""
    smallest = max(low, high * 1e-6)
    if not smallest > 0:
        return [0.0, 1.0]
    # A logarithm just below a whole number comes out as that number: one decade more below finds its edges all the same.
    exponents = range(math.floor(math.log10(smallest)) - 1, math.floor(math.log10(high)) + 2)
    powers = sorted({float(f"{digit}e{exponent}") for exponent in exponents for digit in (1, 2, 5)} | {0.0})
    edges = _around(powers, smallest, high)
    return edges if edges[0] <= low else [0.0, *edges[1:]]


def _around(edges: list[float] | list[int], low: float, high: float) -> list[float]:
    """The shortest run of `edges` with every value from `low` to `high` in a bin."""
    first = max(i for i, edge in enumerate(edges) if edge <= low)
    last = next(i for i, edge in enumerate(edges) if edge > high)
    return list(edges[first : last + 1])
