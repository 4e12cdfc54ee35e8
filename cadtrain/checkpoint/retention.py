"""Which checkpoints stay."""

from __future__ import annotations

from collections.abc import Sequence


def steps_to_remove(steps: Sequence[int], *, keep_last: int) -> list[int]:
    """Steps of the checkpoints to remove, given all finished ones in ascending order: all but the newest `keep_last`."""
    return list(steps[:-keep_last]) if keep_last < len(steps) else []
