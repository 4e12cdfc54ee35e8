"""Order and draws are functions of (seed, epoch, sample) and of nothing else."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cadtrain.data.order import draw_modalities, draw_points, draw_views, epoch_order, generator, step_samples

SHARES = {"text": 0.2, "text+point": 0.3, "text+image": 0.2, "text+point+image": 0.3}


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 50), count=st.integers(1, 300))
def test_an_epoch_sees_every_sample_once(seed: int, epoch: int, count: int) -> None:
    assert sorted(epoch_order(seed, epoch, count).tolist()) == list(range(count))


def test_orders_differ_between_epochs_and_seeds_and_cannot_be_changed() -> None:
    orders = [epoch_order(seed, epoch, 100).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(0, 0, 100)[0] = 5


@settings(deadline=None)
@given(count=st.integers(1, 60), batch=st.integers(1, 20), first_epoch=st.integers(0, 3))
def test_the_steps_of_an_epoch_hold_every_sample_once(count: int, batch: int, first_epoch: int) -> None:
    """The short batch at the end of an epoch is trained as well, and no batch spans two epochs."""
    per_epoch = -(-count // batch)
    seen = []
    for step in range(first_epoch * per_epoch, (first_epoch + 1) * per_epoch):
        epoch, positions = step_samples(3, step, count, batch)
        assert epoch == first_epoch
        assert 1 <= len(positions) <= batch
        seen += positions.tolist()
    assert sorted(seen) == list(range(count))


def test_draws_do_not_depend_on_what_was_drawn_before() -> None:
    """The heart of resuming: a sample's draw is the same whatever came first."""

    def draw(index: int) -> tuple[str | None, list[int], float]:
        points = np.arange(60, dtype=np.float32).reshape(10, 6)
        return (
            draw_modalities(5, 2, index, SHARES, has_points=True, has_images=True),
            draw_views(5, 2, index, 8, 3),
            float(draw_points(5, 2, index, points, 4).sum()),
        )

    forwards = {index: draw(index) for index in range(20)}
    backwards = {index: draw(index) for index in reversed(range(20))}
    assert forwards == backwards
    assert len(set(map(str, forwards.values()))) > 10


def test_every_purpose_epoch_and_seed_has_numbers_of_its_own() -> None:
    keys = [
        (s, e, i, p)
        for s in (0, 1)
        for e in (-1, 0, 1)
        for i in (0, 1)
        for p in ("order", "modalities", "views", "points")
    ]
    assert len({generator(*key).random() for key in keys}) == len(keys)


def test_modalities_follow_their_probabilities() -> None:
    drawn = Counter(draw_modalities(0, 0, index, SHARES, has_points=True, has_images=True) for index in range(4000))
    assert set(drawn) == set(SHARES)
    for key, share in SHARES.items():
        assert drawn[key] / 4000 == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize(
    ("has_points", "has_images", "expected"),
    [(False, True, {"text", "text+image"}), (True, False, {"text", "text+point"}), (False, False, {"text"})],
)
def test_a_sample_shows_only_what_it_has(has_points: bool, has_images: bool, expected: set[str]) -> None:
    drawn = {draw_modalities(0, 0, index, SHARES, has_points=has_points, has_images=has_images) for index in range(200)}
    assert drawn == expected


def test_a_sample_without_any_of_the_sets_shows_nothing() -> None:
    assert draw_modalities(0, 0, 7, {"text+point": 1.0, "image": 0.0}, has_points=False, has_images=True) is None


@settings(deadline=None)
@given(available=st.integers(1, 8), wanted=st.integers(1, 12), index=st.integers(0, 1000))
def test_views_repeat_only_where_they_must(available: int, wanted: int, index: int) -> None:
    views = draw_views(0, 0, index, available, wanted)
    assert len(views) == wanted
    assert views == sorted(views)
    assert len(set(views)) == min(available, wanted)
    assert set(views) <= set(range(available))


@pytest.mark.parametrize(("stored", "wanted"), [(10, 4), (10, 10), (3, 8)])
def test_points_repeat_only_where_they_must(stored: int, wanted: int) -> None:
    points = np.arange(stored * 6, dtype=np.float32).reshape(stored, 6)
    drawn = draw_points(0, 0, 1, points, wanted)
    assert drawn.shape == (wanted, 6)
    assert drawn.dtype == np.float32
    rows = {tuple(row) for row in drawn.tolist()}
    assert rows <= {tuple(row) for row in points.tolist()}
    if wanted <= stored:
        assert len(rows) == wanted
