"""What each rank sees in each optimizer step: the plan of a step, and the packs made from it.

A step's plan is a pure function of the step number, the stage and the token counts, so every rank computes
the whole of it, knows the global count of target tokens without asking, and resumes at any step at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cadtrain.data.collate import Pack, collate
from cadtrain.data.examples import ExampleBuilder, TokenLengths
from cadtrain.data.order import draw_modalities, step_samples
from cadtrain.data.packing import pack_step
from cadtrain.data.shards import PartDataset
from cadtrain.errors import DataError

VALIDATION_EPOCH = -1


@dataclass(frozen=True, slots=True)
class Draw:
    """One sample of a step: its index in the split and the modality set that it shows."""

    index: int
    modalities: str


@dataclass(frozen=True, slots=True)
class PackOrder:
    """One pack of one rank, still to be made."""

    epoch: int
    draws: tuple[Draw, ...]
    use_images: bool
    use_points: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One optimizer step over all ranks; `packs[micro][rank]`."""

    epoch: int
    packs: tuple[tuple[PackOrder, ...], ...]
    num_samples: int
    num_tokens: int
    num_targets: int
    """Target tokens over all ranks: the loss sum is divided by it."""
    num_without_modality: int
    """Samples passed over because they have none of the modality sets that the stage draws."""

    def for_rank(self, rank: int) -> tuple[PackOrder, ...]:
        """The rank's packs, one a micro-step."""
        return tuple(row[rank] for row in self.packs)


class Feed:
    """A split of a prepared dataset as steps of packs."""

    def __init__(
        self,
        dataset: PartDataset,
        lengths: TokenLengths,
        builder: ExampleBuilder,
        *,
        global_batch_size: int,
        micro_batch_tokens: int,
        max_sample_tokens: int,
        modality_sets: Sequence[str],
    ) -> None:
        """Keep the samples that fit whatever set of `modality_sets` they show; raises `DataError` if none does."""
        self.dataset, self.lengths, self.builder = dataset, lengths, builder
        self.global_batch_size = global_batch_size
        self.micro_batch_tokens = micro_batch_tokens
        worst = max(builder.shape.modality_tokens(key) for key in modality_sets)
        totals = np.maximum(lengths.prompt, lengths.bare_prompt) + lengths.target + worst
        self.kept = np.flatnonzero(totals <= max_sample_tokens)
        self.num_left_out = len(totals) - len(self.kept)
        if len(totals) and not len(self.kept):
            raise DataError(
                f"every one of the {len(totals)} samples has more than {max_sample_tokens} tokens (the shortest has {totals.min()})",
                where="data.max_sample_tokens",
                hint=f"Raise it to at least {totals.min()}; the longest sample has {totals.max()} tokens.",
            )

    @property
    def num_samples(self) -> int:
        """Samples that take part."""
        return len(self.kept)

    def plan_step(self, step: int, probabilities: Mapping[str, float], *, world_size: int) -> StepPlan:
        """The plan of 0-based optimizer step `step` in a stage with these modality probabilities."""
        epoch, positions = step_samples(self.builder.seed, step, len(self.kept), self.global_batch_size)
        return self._plan(epoch, self.kept[positions], probabilities, probabilities, world_size)

    def validation_plans(
        self, modalities: str, stage_probabilities: Mapping[str, float], *, world_size: int, max_samples: int
    ) -> Iterator[StepPlan]:
        """Plans that show the first `max_samples` samples with one modality set, with the stage's modules running."""
        rows = [
            i
            for i in self.kept[:max_samples].tolist()
            if self._draw(VALIDATION_EPOCH, i, {modalities: 1.0}) is not None
        ]
        for start in range(0, len(rows), self.global_batch_size):
            chunk = np.asarray(rows[start : start + self.global_batch_size], dtype=np.int64)
            yield self._plan(VALIDATION_EPOCH, chunk, {modalities: 1.0}, stage_probabilities, world_size)

    def make_pack(self, order: PackOrder) -> Pack:
        """Read, decode and join the samples of one pack."""
        read = self.dataset.__getitem__ if self.builder.features is None else self.dataset.texts
        examples = [
            self.builder.build(read(draw.index), index=draw.index, epoch=order.epoch, modalities=draw.modalities)
            for draw in order.draws
        ]
        return collate(
            examples,
            self.builder.shape,
            use_images=order.use_images,
            use_points=order.use_points,
            filler_id=self.builder.tokenizer.eos_token_id,
            features=self.builder.features,
        )

    def _draw(self, epoch: int, index: int, probabilities: Mapping[str, float]) -> str | None:
        return draw_modalities(
            self.builder.seed,
            epoch,
            index,
            probabilities,
            has_points=bool(self.dataset.has_points[index]),
            has_images=bool(self.dataset.has_images[index]),
        )

    def _plan(
        self,
        epoch: int,
        indices: np.ndarray,
        probabilities: Mapping[str, float],
        stage_probabilities: Mapping[str, float],
        world_size: int,
    ) -> StepPlan:
        drawn = [(index, self._draw(epoch, index, probabilities)) for index in indices.tolist()]
        draws = [Draw(index, modalities) for index, modalities in drawn if modalities is not None]
        sizes = [
            self.lengths.text_tokens(draw.index, draw.modalities) + self.builder.shape.modality_tokens(draw.modalities)
            for draw in draws
        ]
        use_images = any("image" in key for key in stage_probabilities)
        use_points = any("point" in key for key in stage_probabilities)
        placed = pack_step(sizes, world_size=world_size, budget=self.micro_batch_tokens)
        packs = tuple(
            tuple(PackOrder(epoch, tuple(draws[row] for row in rows), use_images, use_points) for rows in micro)
            for micro in placed.packs
        )
        return StepPlan(
            epoch=epoch,
            packs=packs,
            num_samples=len(draws),
            num_tokens=sum(sizes),
            num_targets=sum(int(self.lengths.target[draw.index]) + 1 for draw in draws),
            num_without_modality=len(drawn) - len(draws),
        )
