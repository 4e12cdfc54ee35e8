"""Plans of steps and the packs made from them: the same samples on any number of ranks, counted right."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from cadtrain.data.examples import ExampleBuilder, ExampleShape, count_tokens
from cadtrain.data.feed import Draw, Feed, PackOrder, StepPlan
from cadtrain.errors import DataError
from tests.data.test_examples import Letters
from tests.train.tiny import MemoryParts

TEXT = {"text": 1.0}
MIXED = {"text": 0.2, "text+point": 0.3, "text+image": 0.2, "text+point+image": 0.3}
SHAPE = ExampleShape(tokens_per_view=3, views=1, image_size=14, point_tokens=4, num_points=5)


def make_feed(
    parts: MemoryParts | None = None, *, max_sample_tokens: int = 200, budget: int = 200, batch: int = 8
) -> Feed:
    """A feed over parts in memory, of 40 to 101 tokens with all their modalities."""
    parts = parts or MemoryParts(30)
    lengths = count_tokens(Letters(), "Do.", parts.captions(), parts.column("sequence"))
    return Feed(
        parts, lengths, ExampleBuilder(Letters(), "Do.", SHAPE, seed=4), global_batch_size=batch, micro_batch_tokens=budget,  # type: ignore[arg-type]
        max_sample_tokens=max_sample_tokens, modality_sets=tuple(MIXED),
    )  # fmt: skip


def draws_of(plan: StepPlan) -> list[Draw]:
    return [draw for row in plan.packs for order in row for draw in order.draws]


@pytest.mark.parametrize("step", [0, 3, 4, 11])
def test_a_step_has_the_same_samples_on_any_number_of_ranks(step: int) -> None:
    plans = [make_feed().plan_step(step, MIXED, world_size=world_size) for world_size in (1, 2, 3, 8)]
    expected = Counter(draws_of(plans[0]))
    assert expected.total() == (6 if step % 4 == 3 else 8), "the fourth batch of 30 samples is short"
    for plan in plans:
        assert Counter(draws_of(plan)) == expected
        assert (plan.num_samples, plan.num_tokens, plan.num_targets) == (
            plans[0].num_samples, plans[0].num_tokens, plans[0].num_targets,
        )  # fmt: skip
        assert plan.epoch == step // 4


def test_an_epoch_sees_every_sample_once_and_the_next_in_another_order() -> None:
    feed = make_feed()
    epochs = [
        [draw.index for step in range(4) for draw in draws_of(feed.plan_step(4 * e + step, MIXED, world_size=2))]
        for e in (0, 1)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(30))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_the_plan_counts_what_the_packs_hold(world_size: int) -> None:
    """The loss is divided by the planned count: it must be the number of labels in all ranks' packs."""
    feed = make_feed()
    for step in (0, 3):
        plan = feed.plan_step(step, MIXED, world_size=world_size)
        packs = [feed.make_pack(order) for rank in range(world_size) for order in plan.for_rank(rank)]
        assert sum(pack.num_targets for pack in packs) == plan.num_targets
        assert sum(pack.num_tokens for pack in packs if pack.sample_ids) == plan.num_tokens
        assert max(pack.num_tokens for pack in packs) <= 200
        assert len(packs) == world_size * len(plan.packs), "every rank has as many micro-steps"


def test_ranks_share_a_step_without_overlap() -> None:
    plan = make_feed().plan_step(1, MIXED, world_size=3)
    seen = [draw.index for rank in range(3) for order in plan.for_rank(rank) for draw in order.draws]
    assert sorted(seen) == sorted(draw.index for draw in draws_of(plan))
    assert len(set(seen)) == 8


def test_a_stage_says_which_modules_run_whatever_was_drawn() -> None:
    feed = make_feed()
    for probabilities, expected in (
        (TEXT, (False, False)),
        ({"text": 0.3, "point": 0.7}, (False, True)),
        (MIXED, (True, True)),
    ):
        plan = feed.plan_step(0, probabilities, world_size=2)
        assert {(order.use_images, order.use_points) for row in plan.packs for order in row} == {expected}
    pack = feed.make_pack(PackOrder(0, (Draw(0, "text"),), use_images=True, use_points=True))
    assert pack.pixel_values is not None
    assert pack.points is not None


def test_making_a_pack_again_gives_the_same_tensors() -> None:
    feed = make_feed()
    order = feed.plan_step(2, {"text+point+image": 1.0}, world_size=1).packs[0][0]
    one, other = feed.make_pack(order), make_feed().make_pack(order)
    for name, value in one.model_inputs().items():
        assert np.array_equal(value, other.model_inputs()[name]), name  # type: ignore[arg-type]


def test_samples_that_are_too_long_are_left_out_and_counted() -> None:
    """With all modalities: a sample must fit whatever it shows, so that its place in the order is always its own."""
    feed = make_feed()
    totals = (
        np.maximum(feed.lengths.prompt, feed.lengths.bare_prompt)
        + feed.lengths.target
        + SHAPE.modality_tokens("text+point+image")
    )
    limit = int(np.median(totals))
    short = make_feed(max_sample_tokens=limit, budget=limit)
    assert short.kept.tolist() == np.flatnonzero(totals <= limit).tolist()
    assert short.num_left_out == 30 - short.num_samples > 0
    steps = -(-short.num_samples // 8)
    seen = [draw.index for step in range(steps) for draw in draws_of(short.plan_step(step, TEXT, world_size=1))]
    assert sorted(seen) == short.kept.tolist()
    exactly = make_feed(max_sample_tokens=int(totals.max()), budget=int(totals.max()))
    assert exactly.num_left_out == 0, "a sample of exactly the limit fits"


def test_no_sample_that_fits_is_an_error_with_the_number_to_set() -> None:
    lengths = make_feed().lengths
    shortest = int((lengths.prompt + lengths.target).min()) + SHAPE.modality_tokens("text+point+image")
    with pytest.raises(DataError, match=f"every one of the 30 samples .*the shortest has {shortest}") as caught:
        make_feed(max_sample_tokens=shortest - 1)
    assert caught.value.where == "data.max_sample_tokens"
    assert f"at least {shortest}" in (caught.value.hint or "")


def parts_without(points: tuple[int, ...] = (), images: tuple[int, ...] = ()) -> MemoryParts:
    parts = MemoryParts(30)
    parts.has_points[list(points)] = False
    parts.has_images[list(images)] = False
    return parts


def test_samples_that_lack_a_modality_show_what_they_have() -> None:
    feed = make_feed(parts_without(points=tuple(range(15)), images=tuple(range(10, 30))))
    draws = [draw for step in range(8) for draw in draws_of(feed.plan_step(step, MIXED, world_size=2))]
    assert len(draws) == 60
    assert {draw.modalities for draw in draws if 10 <= draw.index < 15} == {"text"}
    assert all("point" not in draw.modalities for draw in draws if draw.index < 15)
    assert all("image" not in draw.modalities for draw in draws if draw.index >= 10)
    assert {draw.modalities for draw in draws} == {"text", "text+point", "text+image"}


def test_samples_with_none_of_the_sets_are_passed_over_and_counted() -> None:
    feed = make_feed(parts_without(points=(3, 4, 5)))
    plans = [feed.plan_step(step, {"text+point": 1.0}, world_size=2) for step in range(4)]
    assert sum(plan.num_without_modality for plan in plans) == 3
    assert sorted(draw.index for plan in plans for draw in draws_of(plan)) == [
        i for i in range(30) if i not in (3, 4, 5)
    ]
    for plan in plans:
        assert plan.num_targets == sum(int(feed.lengths.target[draw.index]) + 1 for draw in draws_of(plan))


def test_a_step_whose_samples_all_lack_the_modality_still_has_a_pack_for_every_rank() -> None:
    feed = make_feed(parts_without(points=tuple(range(30))))
    plan = feed.plan_step(0, {"point": 1.0}, world_size=3)
    assert (plan.num_samples, plan.num_targets, plan.num_without_modality) == (0, 0, 8)
    assert [len(plan.for_rank(rank)) for rank in range(3)] == [1, 1, 1]
    assert feed.make_pack(plan.packs[0][0]).num_targets == 0


@pytest.mark.parametrize("world_size", [1, 3])
def test_validation_shows_the_first_samples_with_one_set_under_the_stages_modules(world_size: int) -> None:
    feed = make_feed(parts_without(images=(2, 11)))
    plans = list(feed.validation_plans("text+image", MIXED, world_size=world_size, max_samples=20))
    draws = [draw for plan in plans for draw in draws_of(plan)]
    assert sorted(draw.index for draw in draws) == [i for i in range(20) if i not in (2, 11)]
    assert {draw.modalities for draw in draws} == {"text+image"}
    assert {order.use_points for plan in plans for row in plan.packs for order in row} == {True}
    assert {plan.epoch for plan in plans} == {-1}


def test_validation_with_a_set_that_no_sample_has_is_empty() -> None:
    feed = make_feed(parts_without(points=tuple(range(30))))
    assert list(feed.validation_plans("point", MIXED, world_size=2, max_samples=20)) == []
