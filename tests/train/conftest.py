"""Ranks that the tests of a run share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train.forked import ForkServer
from tests.train.ranks import RankPool, pool_of


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    """Two ranks over gloo, started once for all tests."""
    yield from pool_of(2)


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankPool]:
    """Four ranks over gloo."""
    yield from pool_of(4)


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    """Starts whole runs in about a second."""
    started = ForkServer()
    yield started
    started.close()


@pytest.fixture(scope="session")
def sixteen_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen procedural parts."""
    from cadtrain.data.synth.make import synthesize

    folder = tmp_path_factory.mktemp("parts") / "dataset"
    synthesize(16, folder, num_points=32, num_views=1, image_size=56, workers=2, difficulty="simple", captions="short")
    return folder
