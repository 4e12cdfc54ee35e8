"""Real processes over gloo for tests: a pool of ranks that is started once and runs one function after another.

Starting a rank (torch, transformers, DeepSpeed) takes ten times as long as most tests; the pool pays that once.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import queue
import socket
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch


class RankPool:
    """`world_size` processes in one gloo process group; `run` calls a function on all of them."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._workers: list[Any] = []

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 240.0) -> list[Any]:
        """Each rank's result of the module-level `function(*arguments)`; fails with the first rank's traceback.

        Results are plain values and tensors. After a failure or a hang the ranks are killed and started anew next time.
        """
        if not self._workers:
            self._start()
        for orders in self._orders:
            orders.put((function, arguments))
        results: dict[int, Any] = {}
        try:
            for _ in range(self.world_size):
                rank, result, failure = self._results.get(timeout=timeout)
                assert failure is None, f"rank {rank} failed:\n{failure}"
                results[rank] = torch.load(io.BytesIO(result), weights_only=True)
        except queue.Empty:
            pytest.fail(f"ranks {sorted(set(range(self.world_size)) - set(results))} gave nothing in {timeout} s")
        finally:
            if len(results) < self.world_size:
                self.close()
        return [results[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        """Kill the ranks."""
        for worker in self._workers:
            worker.kill()
            worker.join()
        self._workers = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._results: Any = context.Queue()
        self._orders: list[Any] = [context.Queue() for _ in range(self.world_size)]
        self._workers = [
            context.Process(target=_serve, args=(rank, self.world_size, port, self._orders[rank], self._results), daemon=True)
            for rank in range(self.world_size)
        ]
        for worker in self._workers:
            worker.start()


def _serve(rank: int, world_size: int, port: int, orders: Any, results: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    # The variable comes too late for a torch that is imported already, and threads that spin starve the other ranks.
    torch.set_num_threads(1)
    while True:
        function, arguments = orders.get()
        try:
            # As bytes: a tensor in a queue is a handle to memory that goes away with this process.
            buffer = io.BytesIO()
            torch.save(function(*arguments), buffer)
            results.put((rank, buffer.getvalue(), None))
        except BaseException:
            results.put((rank, None, traceback.format_exc()))
            raise


def pool_of(world_size: int) -> Iterator[RankPool]:
    """A pool for a fixture."""
    pool = RankPool(world_size)
    yield pool
    pool.close()
