"""Arithmetic of times at which something ran: lists of (start, end), any unit.

`union` gives disjoint intervals in order, which the other functions expect.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The times at which at least one ran: disjoint, ascending, none empty."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if end <= start:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def length(intervals: Iterable[Interval]) -> float:
    """Their lengths together."""
    return sum(end - start for start, end in intervals)


def subtract(these: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """The times of `these` at which none of `others` ran."""
    left: list[Interval] = []
    first = 0
    for start, end in these:
        while first < len(others) and others[first][1] <= start:
            first += 1
        at = first
        while at < len(others) and others[at][0] < end:
            if others[at][0] > start:
                left.append((start, others[at][0]))
            start = max(start, others[at][1])
            at += 1
        if start < end:
            left.append((start, end))
    return left


def intersect(these: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """The times at which both ran."""
    return subtract(these, subtract(these, others))
