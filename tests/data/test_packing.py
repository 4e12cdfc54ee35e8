"""Packs: nothing lost, nothing twice, nothing over the budget, no rank left waiting."""

from __future__ import annotations

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


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=60), world_size=st.integers(1, 8))
def test_loads_differ_by_less_than_one_sample(lengths: list[int], world_size: int) -> None:
    """The LPT rule: the fullest pack without its last sample is no fuller than the emptiest one."""
    packs = pack_step(lengths, world_size=world_size, budget=200)
    flat = [load for micro in loads(packs, lengths) for load in micro]
    assert max(flat) - min(flat) <= max(lengths)


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
