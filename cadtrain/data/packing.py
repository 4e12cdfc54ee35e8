"""Packs: which samples of an optimizer step go to which rank and micro-batch.

Ranks wait for the fullest pack of every micro-step, so a placement costs the sum of its micro-steps' fullest packs. Three ways
to place are known here, and over the fewest micro-steps that hold the samples the cheapest is taken:

    flat         longest first into the emptiest of all packs (the LPT rule of multiprocessor scheduling): all micro-steps equal
    tall first   where a sample is longer than the mean pack, its micro-step is filled to that sample's length on every rank, and
                 the others are lower for it
    tight        longest first into the fullest pack with room (best fit decreasing), where the other two overfill one

Then samples change places within each micro-step until its packs are equal. The result is a pure function of the lengths.

Sources: R. L. Graham, "Bounds on Multiprocessing Timing Anomalies", SIAM J. Appl. Math. 17 (1969); D. S. Johnson, "Near-optimal
bin packing algorithms", MIT (1973).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

Placement = tuple[tuple[int, ...], ...]
Bin = list[int]
"""Samples of one pack, as numbers in the order of falling length."""

_EVEN_ENOUGH = 1.002
"""Fullest pack of a micro-step over its mean pack from which on no sample changes its place any more."""


@dataclass(frozen=True, slots=True)
class StepPacks:
    """`packs[micro][rank]` holds the positions (in the step's batch) of the samples of one pack; it may be empty."""

    packs: tuple[Placement, ...]

    @property
    def num_micro_steps(self) -> int:
        """Micro-steps of the optimizer step, the same on every rank."""
        return len(self.packs)


def pack_step(lengths: Sequence[int], *, world_size: int, budget: int) -> StepPacks:
    """Place samples of `lengths` tokens into packs of at most `budget` tokens on `world_size` ranks.

    Fullest micro-steps come first, and in each the fullest pack is rank 0's. Raises `ValueError` if one sample alone is longer
    than the budget. An empty step gives one empty micro-step.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    sizes = [lengths[row] for row in order]
    if sizes and sizes[0] > budget:
        raise ValueError(f"a sample of {sizes[0]} tokens does not fit into a pack of {budget}")
    least = max(1, -(-sum(sizes) // (world_size * budget)))
    ways = _loose(sizes, least, world_size, budget)
    if not ways:
        tight = _tight(sizes, budget)
        micro_steps = -(-len(tight) // world_size)
        tight += [[] for _ in range(micro_steps * world_size - len(tight))]
        ways = [*_loose(sizes, micro_steps, world_size, budget), _rows(sizes, tight, world_size)]
    for way in ways:
        for row in way:
            _even_out(sizes, row)
        way.sort(key=lambda row: -_load(sizes, row[0]))
    placed = min(ways, key=lambda way: sum(_load(sizes, row[0]) for row in way))
    return StepPacks(tuple(tuple(tuple(sorted(order[number] for number in pack)) for pack in row) for row in placed))


def _loose(sizes: list[int], micro_steps: int, world_size: int, budget: int) -> list[list[list[Bin]]]:
    """Those of the first two ways that keep to the budget: packs [micro][rank] of samples whose falling lengths are `sizes`."""
    ways = (_flat(sizes, micro_steps, world_size, budget), _tall_first(sizes, micro_steps, world_size, budget))
    return [way for way in ways if way is not None]


def _flat(sizes: list[int], micro_steps: int, world_size: int, budget: int) -> list[list[Bin]] | None:
    packs, left = _spread(sizes, range(len(sizes)), micro_steps * world_size, budget)
    return None if left else _rows(sizes, packs, world_size)


def _tall_first(sizes: list[int], micro_steps: int, world_size: int, budget: int) -> list[list[Bin]] | None:
    """None also where no sample is longer than the mean pack, or nobody waits: then it is the flat way."""
    rows: list[list[Bin]] = []
    rest: Sequence[int] = range(len(sizes))
    total = sum(sizes)
    while world_size > 1 and rest and micro_steps - len(rows) > 1:
        num_packs = (micro_steps - len(rows)) * world_size
        if sizes[rest[0]] * num_packs <= total:
            break
        packs, rest = _spread(sizes, rest, world_size, sizes[rest[0]])
        rows.append(packs)
        total -= sum(_load(sizes, pack) for pack in packs)
    if not rows:
        return None
    packs, left = _spread(sizes, rest, (micro_steps - len(rows)) * world_size, budget)
    return None if left else rows + _rows(sizes, packs, world_size)


def _tight(sizes: list[int], budget: int) -> list[Bin]:
    """As few packs as best fit decreasing needs."""
    packs: list[Bin] = []
    rooms: list[tuple[int, int]] = []  # of the packs, ascending
    for number, size in enumerate(sizes):
        place = bisect_left(rooms, (size, 0))
        if place == len(rooms):
            rooms.append((budget, len(packs)))
            packs.append([])
        room, pack = rooms.pop(place)
        packs[pack].append(number)
        insort(rooms, (room - size, pack))
    return packs


def _spread(sizes: list[int], samples: Sequence[int], num_packs: int, height: int) -> tuple[list[Bin], list[int]]:
    """Each sample in turn into the emptiest pack, if that keeps it within `height`; the packs, and what found no place."""
    packs: list[Bin] = [[] for _ in range(num_packs)]
    heap = [(0, pack) for pack in range(num_packs)]
    left: list[int] = []
    for number in samples:
        load, pack = heap[0]
        if load + sizes[number] > height:
            left.append(number)
            continue
        packs[pack].append(number)
        heapq.heapreplace(heap, (load + sizes[number], pack))
    return packs, left


def _rows(sizes: list[int], packs: list[Bin], world_size: int) -> list[list[Bin]]:
    """Packs [micro][rank], those of about equal size in the same micro-step."""
    packs = sorted(packs, key=lambda pack: -_load(sizes, pack))
    return [packs[start : start + world_size] for start in range(0, len(packs), world_size)]


def _even_out(sizes: list[int], row: list[Bin]) -> None:
    """Let the fullest pack of a micro-step give a sample away, or exchange one for a shorter one, as long as that helps; fullest first."""
    mean = sum(_load(sizes, pack) for pack in row) / len(row)
    for _ in range(8 * len(row)):
        row.sort(key=lambda pack: -_load(sizes, pack))
        load = _load(sizes, row[0])
        if load <= _EVEN_ENOUGH * mean or len(row[0]) == 1:
            return
        if not any(_exchange(sizes, row[0], pack, load - _load(sizes, pack)) for pack in reversed(row[1:])):
            return
    row.sort(key=lambda pack: -_load(sizes, pack))


def _exchange(sizes: list[int], full: Bin, other: Bin, gap: int) -> bool:
    """Move what comes nearest to half the `gap` between two packs from `full` to `other`; whether anything makes them more equal."""
    partners = sorted((sizes[number], number) for number in other)
    partners.insert(0, (0, -1))  # nothing in exchange
    best: tuple[float, int, int] = (gap / 2, -1, -1)
    for number in full:
        place = bisect_left(partners, (sizes[number] - gap / 2, -1))
        for size, partner in partners[max(0, place - 1) : place + 1]:
            off = abs(sizes[number] - size - gap / 2)
            if off < best[0]:
                best = (off, number, partner)
    _, given, taken = best
    if given < 0:
        return False
    full.remove(given)
    other.append(given)
    if taken >= 0:
        other.remove(taken)
        full.append(taken)
    return True


def _load(sizes: list[int], pack: Bin) -> int:
    return sum(sizes[number] for number in pack)
