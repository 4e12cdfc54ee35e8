"""Spreads and their bins."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cadtrain.data.inspect.values import Spread, decade_edges, whole_edges


def test_quantiles_are_values_that_occur() -> None:
    spread = Spread.of(np.arange(1, 102))
    assert spread is not None
    assert (spread.min, spread.median, spread.p90, spread.p99, spread.max) == (1, 51, 91, 100, 101)
    assert isinstance(spread.median, int)
    assert spread.mean == pytest.approx(51)


def test_few_whole_numbers_get_a_bin_each() -> None:
    spread = Spread.of([1, 1, 3])
    assert spread is not None
    assert [(b.low, b.high, b.count) for b in spread.histogram] == [(1, 2, 2), (2, 3, 0), (3, 4, 1)]


def test_bins_grow_with_the_values() -> None:
    assert whole_edges(1, 40) == [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48]
    assert whole_edges(90, 250) == [80, 96, 112, 128, 160, 192, 224, 256]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 10**7), min_size=1))
def test_every_whole_number_is_in_one_bin(values: list[int]) -> None:
    spread = Spread.of(values)
    assert spread is not None
    for found in spread.histogram:
        assert found.count == sum(found.low <= value < found.high for value in values)
    assert sum(found.count for found in spread.histogram) == len(values)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1e9), min_size=1))
def test_every_number_is_in_one_bin(values: list[float]) -> None:
    spread = Spread.of(np.array(values))
    assert spread is not None
    assert sum(found.count for found in spread.histogram) == len(values)
    assert spread.histogram[-1].high > spread.max
    assert all(found.low < found.high for found in spread.histogram)


def test_no_values_have_no_spread() -> None:
    assert Spread.of([]) is None


def test_bins_of_lengths_are_at_1_2_and_5() -> None:
    assert decade_edges(3.0, 70.0) == [2, 5, 10, 20, 50, 100]
    assert decade_edges(0.0, 3e6)[:3] == [0, 5, 10]
    assert len(decade_edges(1e-300, 1e9)) < 24
