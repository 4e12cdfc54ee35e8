"""Packs: nothing lost, nothing twice, nothing over the budget, no rank left waiting."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cadtrain.data.packing import StepPacks, pack_step


def loads(packs: StepPacks, lengths: list[int]) -> list[list[int]]:
    """Tokens of every pack, [micro][rank]."""
    return [[sum(lengths[row] for row in rows) for rows in micro] for micro in packs.packs]


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 100), max_size=60), world_size=st.integers(1, 8), slack=st.integers(0, 200))
def test_every_sample_once_and_no_pack_over_the_budget(lengths: list[int], world_size: int, slack: int) -> None:
    budget = max(lengths, default=1) + slack
    packs = pack_step(lengths, world_size=world_size, budget=budget)
    assert sorted(row for micro in packs.packs for rows in micro for row in rows) == list(range(len(lengths)))
    assert max(load for micro in loads(packs, lengths) for load in micro) <= budget
    assert packs.num_micro_steps >= 1
    assert all(len(micro) == world_size for micro in packs.packs), "every rank has a pack in every micro-step"


def cost(grid: list[list[int]]) -> int:
    """Tokens that the slowest rank of each micro-step computes: what a step takes."""
    return sum(max(micro) for micro in grid)


def longest_first(lengths: list[int], *, world_size: int, budget: int) -> list[list[int]]:
    """Tokens [micro][rank] by the plain rule: the longest sample into the emptiest pack, a micro-step more until it fits."""
    micro_steps = max(1, -(-sum(lengths) // (world_size * budget)))
    while True:
        packs = [0] * (micro_steps * world_size)
        for length in sorted(lengths, reverse=True):
            packs[packs.index(min(packs))] += length
        if max(packs) <= budget:
            packs.sort(reverse=True)
            return [packs[m * world_size : (m + 1) * world_size] for m in range(micro_steps)]
        micro_steps += 1


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=60), world_size=st.integers(1, 8), budget=st.integers(100, 250))
def test_it_is_at_least_as_good_as_longest_first_into_the_emptiest(lengths: list[int], world_size: int, budget: int) -> None:
    """No more micro-steps, and with as many no more waiting, but for the 0.2 % at which it stops to look."""
    found = loads(pack_step(lengths, world_size=world_size, budget=budget), lengths)
    plain = longest_first(lengths, world_size=world_size, budget=budget)
    assert len(found) <= len(plain)
    assert len(found) < len(plain) or cost(found) <= 1.002 * cost(plain)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_hardly_wait_for_each_other(world_size: int) -> None:
    """Lengths spread as those of designs are: within 1 % of the least, which is the tokens of a rank or the longest sample."""
    draws = np.random.default_rng(1)
    for _ in range(20):
        lengths = np.minimum(draws.lognormal(6.0, 1.1, size=32 * world_size).astype(int) + 100, 8192).tolist()
        found = loads(pack_step(lengths, world_size=world_size, budget=8192), lengths)
        assert cost(found) <= 1.01 * max(max(lengths), sum(lengths) / world_size)


def test_a_little_more_than_one_micro_step_gives_two_equal_ones() -> None:
    """No nearly empty second one."""
    lengths = np.random.default_rng(2).multinomial(16_500 - 64 * 100, [1 / 64] * 64) + 100
    found = loads(pack_step(lengths.tolist(), world_size=2, budget=8192), lengths.tolist())
    assert len(found) == 2
    assert all(load == pytest.approx(16_500 / 4, rel=0.002) for micro in found for load in micro)


def test_a_long_sample_has_company_on_the_other_ranks() -> None:
    """Its micro-step is as long on every rank, and the other one is short: 12,000 tokens in the time of a rank's share."""
    lengths = [8_000] + [500] * 80
    found = loads(pack_step(lengths, world_size=4, budget=8_192), lengths)
    assert found == [[8_000] * 4, [4_000] * 4]
    assert cost(longest_first(lengths, world_size=4, budget=8_192)) == 13_500


def test_the_tightest_way_is_found_where_the_plain_rule_overfills_a_pack() -> None:
    lengths = [5, 5, 4, 4, 3, 3, 3]
    assert loads(pack_step(lengths, world_size=1, budget=9), lengths) == [[9], [9], [9]]
    assert len(longest_first(lengths, world_size=1, budget=9)) == 4


@pytest.mark.parametrize(("world_size", "budget"), [(4, 8_192), (64, 8_192), (8, 131_072)])
def test_a_thousand_samples_are_placed_in_milliseconds(world_size: int, budget: int) -> None:
    lengths = np.random.default_rng(3).integers(50, 3_000, size=1024).tolist()
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        pack_step(lengths, world_size=world_size, budget=budget)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.015, "2 to 4 ms on a quiet machine"


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 100), min_size=2, max_size=40), seed=st.integers(0, 100))
def test_the_loads_do_not_depend_on_the_order_of_the_samples(lengths: list[int], seed: int) -> None:
    shuffled = np.random.default_rng(seed).permutation(lengths).tolist()
    one, other = (pack_step(rows, world_size=3, budget=150) for rows in (lengths, shuffled))
    assert loads(one, lengths) == loads(other, shuffled)
    assert one == pack_step(list(lengths), world_size=3, budget=150)


def test_loads_are_balanced_within_a_micro_step() -> None:
    lengths = np.random.default_rng(0).integers(20, 400, size=64).tolist()
    packs = pack_step(lengths, world_size=4, budget=1024)
    for micro in loads(packs, lengths):
        assert max(micro) - min(micro) < 40, micro
    assert packs.num_micro_steps == -(-sum(lengths) // (4 * 1024)), "no more micro-steps than the tokens need"


def test_a_micro_step_more_where_the_rule_overfills_a_pack() -> None:
    """Three samples of 60 need three packs of 100, although 180 tokens would fit into two."""
    packs = pack_step([60, 60, 60], world_size=1, budget=100)
    assert packs.packs == (((0,),), ((1,),), ((2,),))


def test_a_pack_may_be_full_but_not_one_token_over() -> None:
    assert pack_step([60, 60, 40, 40], world_size=1, budget=100).num_micro_steps == 2
    assert pack_step([60, 60, 41, 39], world_size=1, budget=100).num_micro_steps == 3, "60 + 41 is one too many"


def test_fewer_samples_than_ranks_leave_empty_packs() -> None:
    packs = pack_step([5], world_size=3, budget=10)
    assert packs.packs == (((0,), (), ()),)


def test_an_empty_step_is_one_empty_micro_step() -> None:
    assert pack_step([], world_size=2, budget=10).packs == (((), ()),)


def test_a_sample_over_the_budget_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"11 tokens .* pack of 10"):
        pack_step([3, 11, 4], world_size=2, budget=10)
