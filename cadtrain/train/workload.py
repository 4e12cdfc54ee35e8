"""What a measurement trains on: the run's own samples, or full rows of random tokens as other trainers are measured on.

Legend: T tokens of a pack, S sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from cadtrain.config.measure import TokenRows
from cadtrain.data.collate import Pack
from cadtrain.data.feed import Draw, Feed, PackOrder, StepPlan
from cadtrain.model.flops import PackContent

VARIETY = 4
"""Different packs of random tokens a rank; then they come again."""


class Workload(Protocol):
    """Steps of packs, and what each pack holds."""

    micro_batch_tokens: int
    """What a full pack holds."""

    def describe(self) -> str:
        """What it is, for people."""
        ...

    def plan_step(self, step: int, probabilities: Mapping[str, float], *, world_size: int) -> StepPlan:
        """The plan of 0-based optimizer step `step`, the same on every rank."""
        ...

    def make_pack(self, order: PackOrder) -> Pack:
        """The tensors of one pack."""
        ...

    def content(self, order: PackOrder) -> PackContent:
        """What the pack holds, dummies left out."""
        ...


class DataWorkload:
    """The samples of the run, drawn and packed as in training."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self.micro_batch_tokens = feed.micro_batch_tokens
        self.plan_step, self.make_pack = feed.plan_step, feed.make_pack

    def describe(self) -> str:
        """As `Workload` says."""
        return f"the run's own data: {self._feed.num_samples:,} samples"

    def content(self, order: PackOrder) -> PackContent:
        """As `Workload` says."""
        lengths, shape = self._feed.lengths, self._feed.builder.shape
        total = PackContent()
        for draw in order.draws:
            tokens = lengths.text_tokens(draw.index, draw.modalities) + shape.modality_tokens(draw.modalities)
            kinds = draw.modalities.split("+")
            total += PackContent(
                tokens=tokens, targets=int(lengths.target[draw.index]) + 1, pairs=tokens * tokens / 2,
                views=shape.views * ("image" in kinds), clouds=int("point" in kinds), sequences=1,
            )  # fmt: skip
        return total


class TokenWorkload:
    """Packs of `rows` with ids below `vocab_size`, text alone: the encoders do not run."""

    def __init__(self, rows: TokenRows, *, vocab_size: int, seed: int) -> None:
        self._rows, self._vocab_size, self._seed = rows, vocab_size, seed
        self.micro_batch_tokens = rows.tokens

    def describe(self) -> str:
        """As `Workload` says."""
        return f"random tokens: packs of {self._rows.sequences} x {self._rows.length:,}, every position a target, text alone"

    def plan_step(self, step: int, probabilities: Mapping[str, float], *, world_size: int) -> StepPlan:
        """As `Workload` says."""
        rows = self._rows
        packs = tuple(
            PackOrder(0, (Draw((step % VARIETY) * world_size + rank, "text"),) * rows.sequences, False, False)
            for rank in range(world_size)
        )
        total = world_size * rows.tokens
        return StepPlan(0, (packs,), world_size * rows.sequences, total, total, 0)

    def make_pack(self, order: PackOrder) -> Pack:
        """As `Workload` says."""
        rows, number = self._rows, order.draws[0].index
        draws = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        ids = torch.randint(0, self._vocab_size, (rows.tokens,), generator=draws)
        return Pack(
            input_ids=ids,
            position_ids=torch.arange(rows.length).repeat(rows.sequences),
            cu_seqlens=torch.arange(0, rows.tokens + 1, rows.length, dtype=torch.int32),
            labels=ids.roll(-1),
            target_positions=torch.arange(rows.tokens),
            max_seqlen=rows.length,
            pixel_values=None,
            image_positions=None,
            points=None,
            point_positions=None,
            sample_ids=(f"random-{number}",) * rows.sequences,
        )

    def content(self, order: PackOrder) -> PackContent:
        """As `Workload` says."""
        rows = self._rows
        return PackContent(
            tokens=rows.tokens, targets=rows.tokens, pairs=rows.sequences * rows.length**2 / 2, sequences=rows.sequences
        )
