"""The order in which samples are seen, and every random choice about a sample, as pure functions.

A choice depends on (seed, epoch, sample index) and on nothing else: not on the rank, the number of ranks,
the worker, or what was drawn before. So every rank knows what every other rank sees, a run resumes at any
step in O(1), and it sees the same samples on any number of GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

_PURPOSES = {"order": 0, "modalities": 1, "views": 2, "points": 3}


def generator(seed: int, epoch: int, index: int, purpose: str) -> np.random.Generator:
    """A generator of its own for one choice; `epoch` -1 is validation."""
    key = np.array([np.uint64(seed), np.uint64((epoch + 1) * len(_PURPOSES) + _PURPOSES[purpose])], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, index]))


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """int64[num_samples]: the permutation in which an epoch sees the samples (read-only)."""
    order = generator(seed, epoch, 0, "order").permutation(num_samples)
    order.setflags(write=False)
    return order


def step_samples(seed: int, step: int, num_samples: int, global_batch_size: int) -> tuple[int, np.ndarray]:
    """The epoch of 0-based optimizer step `step` and the int64 positions of its samples.

    An epoch has ceil(num_samples / global_batch_size) steps; its last one may be short, nothing is dropped.
    """
    epoch, batch = divmod(step, -(-num_samples // global_batch_size))
    start = batch * global_batch_size
    return epoch, epoch_order(seed, epoch, num_samples)[start : start + global_batch_size]


def draw_modalities(
    seed: int, epoch: int, index: int, probabilities: Mapping[str, float], *, has_points: bool, has_images: bool
) -> str | None:
    """The modality set that sample `index` shows in `epoch`, among those that it has; None if it has none of them.

    The same uniform number serves every stage, so a sample's draw changes between stages only as far as the
    probabilities do.
    """
    open_sets = {
        key: share
        for key, share in probabilities.items()
        if (has_points or "point" not in key) and (has_images or "image" not in key)
    }
    total = sum(open_sets.values())
    if total <= 0:
        return None
    target = generator(seed, epoch, index, "modalities").random() * total
    for key, share in open_sets.items():
        target -= share
        if target < 0:
            return key
    return key


def draw_views(seed: int, epoch: int, index: int, available: int, wanted: int) -> list[int]:
    """`wanted` view numbers out of `available`, without repetition as far as they last, in ascending order."""
    choices = generator(seed, epoch, index, "views")
    if wanted <= available:
        return sorted(choices.choice(available, wanted, replace=False).tolist())
    return sorted([*range(available), *choices.integers(0, available, wanted - available).tolist()])


def draw_points(seed: int, epoch: int, index: int, points: np.ndarray, wanted: int) -> np.ndarray:
    """float32[wanted, 6] out of float32[P, 6]: without repetition where P suffices."""
    rows = generator(seed, epoch, index, "points").choice(len(points), wanted, replace=len(points) < wanted)
    return np.ascontiguousarray(points[rows])
