"""Packs: which samples of an optimizer step go to which rank and micro-batch.

Samples are placed longest first into the emptiest pack (the LPT rule of multiprocessor scheduling), over
the fewest micro-steps that hold them, so ranks finish together. The result is a pure function of the lengths.

Source: R. L. Graham, "Bounds on Multiprocessing Timing Anomalies", SIAM J. Appl. Math. 17 (1969).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

Placement = tuple[tuple[int, ...], ...]


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

    Raises `ValueError` if one sample alone is longer than the budget. An empty step gives one empty micro-step.
    """
    if any(length > budget for length in lengths):
        raise ValueError(f"a sample of {max(lengths)} tokens does not fit into a pack of {budget}")
    micro_steps = max(1, -(-sum(lengths) // (world_size * budget)))
    while True:
        bins = _longest_first(lengths, micro_steps * world_size, budget)
        if bins is not None:
            break
        micro_steps += 1
    # Heaviest packs together: packs of about equal size run in the same micro-step, so no rank waits long.
    bins.sort(key=lambda rows: (-sum(lengths[row] for row in rows), rows))
    grid = tuple(tuple(tuple(rows) for rows in bins[m * world_size : (m + 1) * world_size]) for m in range(micro_steps))
    return StepPacks(grid)


def _longest_first(lengths: Sequence[int], num_bins: int, budget: int) -> list[list[int]] | None:
    """Positions a bin, each ascending; None if the rule overfills one."""
    heap = [(0, number) for number in range(num_bins)]
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        load, number = heapq.heappop(heap)
        if load + lengths[row] > budget:
            return None
        bins[number].append(row)
        heapq.heappush(heap, (load + lengths[row], number))
    for rows in bins:
        rows.sort()
    return bins
