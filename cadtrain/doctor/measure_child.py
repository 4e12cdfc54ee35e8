"""Measures what this machine's devices do: `python -m cadtrain.doctor.measure_child`; prints one line of facts."""

from __future__ import annotations

import json
import time
from typing import Any

import torch

CUDA_WIDTH, CPU_WIDTH = 8192, 1024
COPY_BYTES = 256 * 2**20
REPEATS = 10


def main() -> None:
    """Matrix product and copies from and to host memory, on every visible GPU; on the CPU the product alone."""
    facts: dict[str, Any] = {"gpus": []}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.device("cuda", index)
            facts["gpus"].append(
                {
                    "name": torch.cuda.get_device_name(index),
                    "flops": _matmul(device, torch.bfloat16, CUDA_WIDTH),
                    "to_device": _copy(device, to_device=True),
                    "to_host": _copy(device, to_device=False),
                }
            )
    else:
        facts["cpu"] = {
            "flops": _matmul(torch.device("cpu"), torch.float32, CPU_WIDTH),
            "threads": torch.get_num_threads(),
        }
    print("facts", json.dumps(facts), flush=True)


def _matmul(device: torch.device, dtype: torch.dtype, width: int) -> float:
    left = torch.randn(width, width, device=device).to(dtype)
    right = torch.randn(width, width, device=device).to(dtype)
    return 2 * width**3 / _time(lambda: left @ right, device)


def _copy(device: torch.device, *, to_device: bool) -> float:
    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    source, target = (host, there) if to_device else (there, host)
    return COPY_BYTES / _time(lambda: target.copy_(source, non_blocking=True), device)


def _time(call: Any, device: torch.device) -> float:
    """Seconds of one call, the mean of several after a warm-up."""
    for _ in range(2):
        call()
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(REPEATS):
        call()
    _synchronize(device)
    return (time.perf_counter() - start) / REPEATS


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
