"""One rank of the doctor's collectives: `python -m cadtrain.doctor.collective_rank cuda|cpu SECONDS [bench]`."""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from cadtrain.doctor.collective import READY

CUDA_BYTES, CPU_BYTES = 256 * 2**20, 4 * 2**20
"""Size of the message by which links are judged."""
CUDA_SIZES = (2**20, 16 * 2**20, CUDA_BYTES)
CPU_SIZES = (64 * 2**10, 2**20, CPU_BYTES)
REPEATS = 10


def main() -> None:
    """Join, sum, time, and print the facts on rank 0; raises where the sum is wrong."""
    kind, seconds, is_bench = sys.argv[1], float(sys.argv[2]), "bench" in sys.argv[3:]
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    print(READY, flush=True)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=datetime.timedelta(seconds=seconds))
    pattern = torch.arange(1024, dtype=torch.float32, device=device) % 7
    total = pattern * (rank + 1)
    dist.all_reduce(total)
    if not torch.equal(total, pattern * (count * (count + 1) // 2)):
        raise ArithmeticError(f"the sum over {count} ranks is wrong on rank {rank}")
    sizes = CUDA_SIZES if kind == "cuda" else CPU_SIZES
    names = ("all-reduce", "all-gather", "reduce-scatter") if is_bench else ("all-reduce",)
    rates = {
        name: {size: _bus_rate(name, size, count, device) for size in (sizes if is_bench else sizes[-1:])}
        for name in names
    }
    if rank == 0:
        print("facts", json.dumps(rates), flush=True)
    dist.destroy_process_group()


def _bus_rate(name: str, size: int, count: int, device: torch.device) -> float:
    """Bytes a second that each link carries, which does not depend on the number of ranks (Source: nccl-tests, PERFORMANCE.md)."""
    elements = size // 4 // count * count
    whole = torch.ones(elements, device=device)
    part = torch.ones(elements // count, device=device)
    calls: dict[str, Callable[[], object]] = {
        "all-reduce": lambda: dist.all_reduce(whole),
        "all-gather": lambda: dist.all_gather_into_tensor(whole, part),
        "reduce-scatter": lambda: dist.reduce_scatter_tensor(part, whole),
    }
    call = calls[name]
    call()
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(REPEATS):
        call()
    _synchronize(device)
    each = (time.perf_counter() - start) / REPEATS
    return (2 if name == "all-reduce" else 1) * (count - 1) / count * whole.nbytes / each


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
