"""Which checkpoints stay: pure functions of the steps, the rules and the validation losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Retention:
    """The newest `keep_last`, each whose step is a multiple of `keep_every`, and the `keep_best` with the lowest loss."""

    keep_last: int = 2
    keep_every: int | None = None
    """In optimizer steps."""
    keep_best: int = 0


def steps_to_remove(steps: Sequence[int], rules: Retention, scores: Mapping[int, float] = {}) -> list[int]:
    """Steps of the checkpoints to remove, given all finished ones in ascending order and validation losses by step.

    Of two equal losses the later step counts as better: it has seen more.
    """
    kept = set(steps[-rules.keep_last :])
    if rules.keep_every:
        kept |= {step for step in steps if step % rules.keep_every == 0}
    ranked = sorted((step for step in steps if step in scores), key=lambda step: (scores[step], -step))
    kept |= set(ranked[: rules.keep_best])
    return [step for step in steps if step not in kept]
