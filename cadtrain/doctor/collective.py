"""An all-reduce over all ranks a run would have, in child processes with a time limit: a hang is a finding."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

from cadtrain.doctor.child import ChildResult, run_all
from cadtrain.doctor.finding import Finding, fail, ok, warn
from cadtrain.launch.devices import RankDevices
from cadtrain.launch.environment import environment_changes
from cadtrain.launch.planning import free_port

MODULE = "cadtrain.doctor.collective_rank"
SLOW_NVLINK_BYTES = 30e9
"""Bus bandwidth in bytes a second below which NVLinks are surely not used."""


def check_collective(
    devices: RankDevices, environ: dict[str, str], *, num_nvlinks: int = 0, seconds: float = 180, module: str = MODULE
) -> Iterator[Finding]:
    """Sum a known tensor over the ranks and measure the bandwidth; at most `seconds`."""
    name = "all-reduce"
    backend = "NCCL" if devices.kind == "cuda" else "gloo"
    results = _run_ranks(devices, environ, seconds=seconds, module=module)
    failed = {rank: result for rank, result in enumerate(results) if not result.is_good}
    if failed:
        yield _failure(name, backend, failed, len(results))
        return
    line = next((row for row in results[0].stdout.splitlines() if row.startswith("facts ")), None)
    if line is None:
        yield fail(name, f"{backend}: rank 0 gave no result", "Run again with --debug.")
        return
    facts = json.loads(line.removeprefix("facts "))
    text = f"{backend} over {len(results)} ranks: sum right"
    if len(results) > 1:
        text += f", bus bandwidth {facts['bus_bytes_per_second'] / 1e9:.1f} GB/s"
    if num_nvlinks and len(results) > 1 and facts["bus_bytes_per_second"] < SLOW_NVLINK_BYTES:
        yield warn(
            name,
            f"{text}; there are {num_nvlinks} NVLinks a GPU",
            "See `nvidia-smi nvlink -s`; unset NCCL_P2P_DISABLE.",
        )
    else:
        yield ok(name, text)


def _run_ranks(devices: RankDevices, environ: dict[str, str], *, seconds: float, module: str) -> list[ChildResult]:
    count = devices.num_ranks
    shared = {
        **environment_changes(devices, environ),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(count),
        "CUDA_VISIBLE_DEVICES": ",".join(devices.ids),
    }
    command = [sys.executable, "-m", module, devices.kind, str(seconds)]
    environments = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return run_all([command] * count, environments, seconds=seconds)


def _failure(name: str, backend: str, failed: dict[int, ChildResult], count: int) -> Finding:
    crashed = {rank: result for rank, result in failed.items() if result.status is not None}
    rank, result = next(iter((crashed or failed).items()))
    text = f"{backend} over {count} ranks: rank {rank} {result.reason()}"
    if backend == "gloo":
        return fail(
            name, text, "See that 127.0.0.1 can be reached and no firewall is in between; set GLOO_SOCKET_IFNAME=lo."
        )
    if crashed:
        return fail(name, text, "Run with NCCL_DEBUG=INFO to see why; often /dev/shm is too small.")
    return fail(
        name,
        text,
        "GPUs cannot reach each other: try NCCL_P2P_DISABLE=1 (then mend ACS/IOMMU in the BIOS), or NCCL_SOCKET_IFNAME=lo.",
    )
