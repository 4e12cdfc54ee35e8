"""Work over many inputs in shares, on all cores; a share whose worker dies is done again one input at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

from cadtrain.geometry.sandbox import Failure, KernelPool

T = TypeVar("T")
R = TypeVar("R")

Progress = Callable[[int, int], None]
"""Takes inputs done and inputs in all."""

_SHARE_SECONDS = 600.0
_INPUT_SECONDS = 60.0


def no_progress(_done: int, _total: int) -> None:
    """Takes progress and says nothing."""


def in_shares(
    work: Callable[[list[T]], R],
    inputs: Iterable[T],
    *,
    share_size: int,
    workers: int,
    lost: Callable[[T, Failure], R],
    done: Callable[[int], None],
) -> Iterator[R]:
    """`work`'s results for shares of `inputs`, in order, as they come; nothing is kept.

    `work` is a picklable function that answers a list of inputs and counts what is wrong with one of them instead of raising.
    `lost` answers for an input that killed its worker or took a minute, `done` is told the size of each finished share. With one
    worker the work is done in this process.
    """
    source = iter(inputs)
    if workers == 1:
        for share in _shares(source, share_size):
            yield work(share)
            done(len(share))
        return
    under_way: list[list[T]] = []

    def given() -> Iterator[list[T]]:
        for share in _shares(source, share_size):
            under_way.append(share)
            yield share

    with KernelPool(workers, _SHARE_SECONDS, preload=()) as pool, KernelPool(1, _INPUT_SECONDS, preload=()) as lone:
        for outcome in pool.map(work, given()):
            share = under_way.pop(0)
            if outcome.failure is None:
                assert outcome.value is not None
                yield outcome.value
            elif outcome.failure.kind in ("crashed", "time_limit"):
                for item, single in zip(share, lone.map(work, [[item] for item in share]), strict=True):
                    yield lost(item, single.failure) if single.failure else _value(single.value)
            else:
                raise RuntimeError(f"{outcome.failure.reason}\n{outcome.failure.detail}")
            done(len(share))


def _value(value: R | None) -> R:
    assert value is not None
    return value


def _shares(source: Iterator[T], size: int) -> Iterator[list[T]]:
    while share := list(islice(source, size)):
        yield share
