"""The checks in order, from the ground up."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cadtrain.doctor.child import run_python
from cadtrain.doctor.collective import check_collective
from cadtrain.doctor.compilers import check_compilers, check_extensions
from cadtrain.doctor.finding import Finding, Report, fail, ok
from cadtrain.doctor.gpu_health import (
    GpuHealth,
    check_health,
    check_topology,
    check_visible,
    read_health,
    read_topology,
)
from cadtrain.doctor.gpus import check_attention, check_driver, check_gpus, check_torch, count_nvlinks
from cadtrain.doctor.hosts import check_hosts
from cadtrain.doctor.leftovers import check_processes, check_unfinished
from cadtrain.doctor.machine import check_disk, check_limits, check_memory, check_shared_memory
from cadtrain.doctor.measure import check_rates
from cadtrain.doctor.network import check_host_name, check_port
from cadtrain.doctor.packages import check_cad_kernel, check_extras, check_packages, check_python
from cadtrain.errors import EnvironmentFault
from cadtrain.launch.devices import Gpu, GpuRequest, choose_devices, find_gpus
from cadtrain.launch.hosts import PLAIN_SSH, Host, RemoteShell

_DEEPSPEED = "import deepspeed, sys; print('version', deepspeed.__version__)"


@dataclass(frozen=True, slots=True)
class Scope:
    """What to look at."""

    quick: bool = False
    """Leave out what takes longer than a few seconds: DeepSpeed's import, the all-reduce and the write test."""
    bench: bool = False
    """Measure: three collectives by message size, matrix products, copies."""
    gpus: GpuRequest = None
    """What a run would ask for with `--gpus`."""
    run_folder: Path = Path("runs")
    port: int | None = None
    hosts: tuple[Host, ...] = ()
    shell: RemoteShell = PLAIN_SSH


def examine(scope: Scope = Scope(), *, watch: Callable[[str], None] = lambda text: None) -> Report:
    """Run the checks in `scope` and return the report; never raises for what it finds. `watch` is told what is looked at."""
    return Report(tuple(_findings(scope, watch)))


def _findings(scope: Scope, watch: Callable[[str], None]) -> Iterator[Finding]:
    watch("Python and packages")
    yield from check_python()
    yield from check_packages()
    watch("GPUs")
    gpus = find_gpus()
    # Asked even where no GPU is visible: a mask may name what is not there.
    health = read_health() or []
    yield from _gpu_findings(gpus, health, scope.gpus)
    watch("torch")
    facts, findings = check_torch(gpus)
    yield from findings
    yield from check_driver(facts)
    yield from check_attention(facts, has_gpu=bool(gpus))
    yield from check_extras(has_gpu=bool(gpus))
    if not scope.quick:
        watch("DeepSpeed")
        yield from check_deepspeed(has_gpu=bool(gpus))
    watch("the CAD kernel")
    yield from check_cad_kernel()
    watch("the host")
    yield from check_memory(num_gpus=len(gpus))
    yield from check_shared_memory(num_gpus=len(gpus))
    yield from check_limits()
    yield from check_compilers(compiles="with --offload" if gpus else "never", torch_cuda=facts.cuda if facts else None)
    if gpus:
        yield from check_extensions()
    yield from check_host_name()
    yield from check_port(scope.port)
    if scope.hosts:
        watch(f"{len(scope.hosts)} hosts")
        yield from check_hosts(scope.hosts, scope.shell, scope.run_folder, has_gpu=bool(gpus))
    yield from check_processes()
    yield from check_unfinished(scope.run_folder)
    yield from check_disk(scope.run_folder, write=not scope.quick)
    if not scope.quick and facts is not None:
        yield from _measured(gpus, health, scope, watch)


def _gpu_findings(gpus: tuple[Gpu, ...], health: list[GpuHealth], requested: GpuRequest) -> Iterator[Finding]:
    links = read_topology() if len(gpus) > 1 else None
    count = len(requested) if isinstance(requested, tuple) else requested
    yield from check_visible(health=health)
    yield from check_gpus(gpus, count, tell_links=not links)
    yield from check_health(gpus, health)
    yield from check_topology(gpus, links or {})


def _measured(
    gpus: tuple[Gpu, ...], health: list[GpuHealth], scope: Scope, watch: Callable[[str], None]
) -> Iterator[Finding]:
    try:
        devices = choose_devices(gpus, scope.gpus)
    except EnvironmentFault:
        # Fewer GPUs than asked for: said above.
        return
    used = {gpu.uuid for gpu in devices.gpus}
    slots = [item.pcie_bytes for item in health if item.uuid in used and item.pcie_bytes]
    pcie = min(slots, default=None)
    watch(f"{'collectives' if scope.bench else 'an all-reduce'} over {devices.num_ranks} ranks")
    yield from check_collective(
        devices, dict(os.environ), num_nvlinks=count_nvlinks(devices.gpus), pcie_bytes=pcie, bench=scope.bench
    )
    if scope.bench:
        watch("matrix products and copies")
        yield from check_rates(pcie_bytes=pcie)


def check_deepspeed(*, has_gpu: bool) -> Iterator[Finding]:
    """DeepSpeed's import, which asks for compilers and drivers of its own accord."""
    result = run_python(_DEEPSPEED, seconds=180, environment={} if has_gpu else {"DS_ACCELERATOR": "cpu"})
    line = next((row for row in result.stdout.splitlines() if row.startswith("version ")), None)
    if result.is_good and line is not None:
        yield ok("DeepSpeed", f"{line.removeprefix('version ')} imports ({result.seconds:.1f} s)")
    else:
        yield fail("DeepSpeed", result.reason(), "pip install --force-reinstall --no-deps deepspeed")
