"""Reading ahead: packs are built by threads while the model computes.

Threads are enough because the work (decoding PNGs, gathering rows, tokenizing) happens outside Python's lock.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Generic, TypeVar

Order = TypeVar("Order")
Made = TypeVar("Made")


class ReadAhead(Generic[Order, Made]):
    """Applies `make` to orders in `num_workers` threads, at most `depth` results ahead, in order.

    `waited_seconds` is the time the consumer has waited for results. With no workers, `make` runs when asked.
    """

    def __init__(
        self, make: Callable[[Order], Made], orders: Iterable[Order], *, num_workers: int, depth: int = 4
    ) -> None:
        self._make = make
        self._orders = iter(orders)
        self._depth = max(depth, num_workers)
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="packs") if num_workers else None
        self._pending: deque[Future[Made]] = deque()
        self.waited_seconds = 0.0

    def __iter__(self) -> Iterator[Made]:
        return self

    def __next__(self) -> Made:
        started = time.perf_counter()
        try:
            if self._pool is None:
                return self._make(next(self._orders))
            self._fill()
            if not self._pending:
                raise StopIteration
            result = self._pending.popleft().result()
            self._fill()
            return result
        finally:
            self.waited_seconds += time.perf_counter() - started

    def prime(self) -> None:
        """Take up the first orders now, before the first result is asked for."""
        if self._pool is not None:
            self._fill()
        else:
            self._orders = chain([next(self._orders)], self._orders)

    def _fill(self) -> None:
        assert self._pool is not None
        while len(self._pending) < self._depth:
            try:
                order = next(self._orders)
            except StopIteration:
                return
            self._pending.append(self._pool.submit(self._make, order))

    def close(self) -> None:
        """Drop what is under way and end the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def __enter__(self) -> ReadAhead[Order, Made]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
