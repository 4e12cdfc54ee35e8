"""Interval arithmetic against sets of whole moments."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from cadtrain.metrics.intervals import Interval, intersect, length, subtract, union

INTERVALS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 8)).map(lambda row: (float(row[0]), float(row[0] + row[1]))), max_size=8)


def moments(intervals: list[Interval]) -> set[int]:
    return {moment for start, end in intervals for moment in range(int(start), int(end))}


@given(INTERVALS, INTERVALS)
def test_they_are_set_operations(these: list[Interval], others: list[Interval]) -> None:
    first, second = union(these), union(others)
    for found, expected in (
        (first, moments(these)),
        (subtract(first, second), moments(these) - moments(others)),
        (intersect(first, second), moments(these) & moments(others)),
    ):
        assert moments(found) == expected
        assert length(found) == len(expected)
        assert all(start < end for start, end in found)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(found))


def test_touching_ones_become_one() -> None:
    assert union([(2.0, 3.0), (0.0, 2.0), (5.0, 5.0)]) == [(0.0, 3.0)]
