"""How many samples a second the threads that read ahead deliver, and what their time goes into.

    python -m tests.data.feed_rate DATASET [--workers 1,2,4] [--seconds 10]

DATASET is a prepared folder. Packs of up to 8,192 tokens are made as in training, every sample with its text, one view of 224 pixels
and 2,048 points, for `--seconds` with each number of workers; nothing is done with them. Then the same work is done without
threads and its parts are timed. No test: a measurement; `docs/performance.md` quotes its figures.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch

import cadtrain.data.examples as examples
import cadtrain.data.feed as feeds
from cadtrain.data.feed import Feed, PackOrder
from cadtrain.data.loader import ReadAhead
from cadtrain.data.shards import PartDataset
from tests.data.packing_report import open_feed

EVERYTHING = {"text+point+image": 1.0}


def main() -> None:
    """Print rates, then shares."""
    options = argparse.ArgumentParser(description="Samples a second from a prepared dataset.")
    options.add_argument("dataset", type=Path)
    options.add_argument("--workers", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 4])
    options.add_argument("--seconds", type=float, default=10.0)
    given = options.parse_args()
    torch.set_num_threads(1)  # as in a rank
    feed = open_feed(given.dataset, batch=64, budget=8192)
    print(f"{len(os.sched_getaffinity(0))} cores")
    for workers in given.workers:
        print(f"{workers} workers: {rate(feed, workers, given.seconds):6.0f} samples/s")
    print_shares(feed, given.seconds)


def orders(feed: Feed) -> Iterator[PackOrder]:
    """The packs of a single rank, epoch after epoch."""
    for step in count():
        yield from feed.plan_step(step, EVERYTHING, world_size=1).for_rank(0)


def rate(feed: Feed, workers: int, seconds: float) -> float:
    """Samples a second that `workers` threads deliver; 0 is the consumer's own thread."""
    delivered = 0
    with ReadAhead(feed.make_pack, orders(feed), num_workers=workers) as packs:
        next(packs)
        started = time.perf_counter()
        while (took := time.perf_counter() - started) < seconds:
            delivered += next(packs).pixel_values.shape[0]  # type: ignore[union-attr]
    return delivered / took


class Clock:
    """Adds up the time within functions."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def around(self, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, timed as `what`."""

        def timed(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started

        return timed


def print_shares(feed: Feed, seconds: float) -> None:
    """Milliseconds a sample in one thread, and the share of each part."""
    clock, number = Clock(), 0
    examples.decode_image = clock.around("decoding the PNG", examples.decode_image)
    examples.draw_points = clock.around("drawing points", examples.draw_points)
    feeds.collate = clock.around("joining into a pack", feeds.collate)
    PartDataset.__getitem__ = clock.around("reading the row", PartDataset.__getitem__)  # type: ignore[method-assign]
    tokenizer = feed.builder.tokenizer
    object.__setattr__(feed.builder, "tokenizer", _Timed(tokenizer, clock.around("tokenizing", tokenizer.__call__)))
    started = time.perf_counter()
    for order in orders(feed):
        number += len(feed.make_pack(order).pixel_values)  # type: ignore[arg-type]
        if (took := time.perf_counter() - started) >= seconds:
            break
    print(f"one thread, {1e3 * took / number:.2f} ms a sample:")
    for what, spent in sorted(clock.seconds.items(), key=lambda item: -item[1]):
        print(f"  {what:<20} {1e3 * spent / number:6.2f} ms  {spent / took:6.1%}")


class _Timed:
    """A tokenizer whose calls are timed."""

    def __init__(self, tokenizer: Any, call: Callable[..., Any]) -> None:
        self.eos_token_id = tokenizer.eos_token_id
        self._call = call

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._call(*arguments, **named)


if __name__ == "__main__":
    main()
