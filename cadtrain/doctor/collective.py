"""Collectives over all ranks a run would have, in child processes with a time limit: a hang is a finding."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping

from cadtrain.doctor.child import ChildResult, run_all
from cadtrain.doctor.finding import Finding, fail, ok, warn
from cadtrain.launch.devices import RankDevices
from cadtrain.launch.environment import environment_changes
from cadtrain.launch.planning import free_port
from cadtrain.units import format_bytes

MODULE = "cadtrain.doctor.collective_rank"
READY = "ready"
"""What a rank writes before it waits for its peers."""
NVLINK_BYTES = 25e9
"""Bytes a second of one NVLink in one direction (generations 3 and 4; later ones give more)."""
NVLINK_SHARE, PCIE_SHARE = 0.4, 0.2
"""Parts of a link's rate below which a large message surely does not use it. Rings through PCIe share switches."""


def check_collective(
    devices: RankDevices,
    environ: dict[str, str],
    *,
    num_nvlinks: int = 0,
    pcie_bytes: float | None = None,
    bench: bool = False,
    seconds: float = 180,
    module: str = MODULE,
) -> Iterator[Finding]:
    """Sum a known tensor over the ranks and measure the bandwidth; at most `seconds`.

    With `bench` for three collectives and three sizes. `num_nvlinks` and `pcie_bytes` (a slot's bytes a second) say what
    the links should give.
    """
    name = "collectives" if bench else "all-reduce"
    backend = "NCCL" if devices.kind == "cuda" else "gloo"
    results = _run_ranks(devices, environ, bench=bench, seconds=seconds, module=module)
    failed = {rank: result for rank, result in enumerate(results) if not result.is_good}
    if failed:
        yield _failure(name, backend, results, failed)
        return
    line = next((row for row in results[0].stdout.splitlines() if row.startswith("facts ")), None)
    if line is None:
        yield fail(name, f"{backend}: rank 0 gave no result", "Run again with --debug.")
        return
    rates: dict[str, dict[str, float]] = json.loads(line.removeprefix("facts "))
    if len(results) == 1:
        yield ok(name, f"{backend} over 1 rank: sum right")
        return
    yield from _judge(rates, f"{backend} over {len(results)} ranks: sum right", num_nvlinks, pcie_bytes)


def _judge(
    rates: Mapping[str, Mapping[str, float]], head: str, num_nvlinks: int, pcie_bytes: float | None
) -> Iterator[Finding]:
    if num_nvlinks:
        expected, share, what = num_nvlinks * NVLINK_BYTES, NVLINK_SHARE, f"{num_nvlinks} NVLinks a GPU"
    else:
        expected, share, what = pcie_bytes or 0.0, PCIE_SHARE, "the PCIe slots"
    for name, by_size in rates.items():
        text = f"{head}, " if name == "all-reduce" else ""
        parts = (
            f"{rate / 1e9:.1f} GB/s at {format_bytes(int(size)).replace('.0', '')}" for size, rate in by_size.items()
        )
        text += f"bus bandwidth {', '.join(parts)}"
        best = max(by_size.values())
        if expected and best < share * expected:
            yield warn(
                name,
                f"{text}; {what} give {expected / 1e9:.0f} GB/s",
                "See nvidia-smi nvlink -s and nvidia-smi topo -m; unset NCCL_P2P_DISABLE; in a virtual machine or with ACS on, "
                "GPUs cannot talk directly. NCCL_DEBUG=INFO names the path taken.",
            )
        else:
            yield ok(name, text)


def _run_ranks(
    devices: RankDevices, environ: dict[str, str], *, bench: bool, seconds: float, module: str
) -> list[ChildResult]:
    count = devices.num_ranks
    shared = {
        **environment_changes(devices, environ),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(count),
        "CUDA_VISIBLE_DEVICES": ",".join(devices.ids),
    }
    command = [sys.executable, "-m", module, devices.kind, str(seconds), *(["bench"] if bench else [])]
    environments = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return run_all([command] * count, environments, seconds=seconds)


def _failure(name: str, backend: str, results: list[ChildResult], failed: dict[int, ChildResult]) -> Finding:
    crashed = {rank: result for rank, result in failed.items() if result.status is not None}
    rank, result = next(iter((crashed or failed).items()))
    text = f"{backend} over {len(results)} ranks: rank {rank} {result.reason()}"
    absent = [str(number) for number, each in enumerate(results) if READY not in each.stdout.split()]
    if absent and len(absent) < len(results):
        text += f"; the others waited for rank {', '.join(absent)}, which never came"
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
