"""One rank of the doctor's all-reduce: `python -m cadtrain.doctor.collective_rank cuda|cpu SECONDS`."""

from __future__ import annotations

import datetime
import json
import os
import sys
import time

import torch
import torch.distributed as dist

CUDA_ELEMENTS, CPU_ELEMENTS = 64 * 2**20, 2**20
"""fp32 values in the timed tensor: 256 MiB on GPUs, 4 MiB on CPUs."""
REPEATS = 10


def main() -> None:
    """Join, sum, time, and print the facts on rank 0; raises where the sum is wrong."""
    kind, seconds = sys.argv[1], float(sys.argv[2])
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=datetime.timedelta(seconds=seconds))
    pattern = torch.arange(1024, dtype=torch.float32, device=device) % 7
    total = pattern * (rank + 1)
    dist.all_reduce(total)
    if not torch.equal(total, pattern * (count * (count + 1) // 2)):
        raise ArithmeticError(f"the sum over {count} ranks is wrong on rank {rank}")
    values = torch.ones(CUDA_ELEMENTS if kind == "cuda" else CPU_ELEMENTS, device=device)
    dist.all_reduce(values)
    _synchronize(kind)
    start = time.perf_counter()
    for _ in range(REPEATS):
        dist.all_reduce(values)
    _synchronize(kind)
    each = (time.perf_counter() - start) / REPEATS
    # What each link carries, which does not depend on the number of ranks (Source: nccl-tests, PERFORMANCE.md).
    bus = 2 * (count - 1) / count * values.nbytes / each
    if rank == 0:
        print("facts", json.dumps({"bus_bytes_per_second": bus}), flush=True)
    dist.destroy_process_group()


def _synchronize(kind: str) -> None:
    if kind == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
