"""Ranks that the tests of a run share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.train.ranks import RankPool, pool_of


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    """Two ranks over gloo, started once for all tests."""
    yield from pool_of(2)


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankPool]:
    """Four ranks over gloo."""
    yield from pool_of(4)
