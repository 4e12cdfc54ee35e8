"""The checks in order, from the ground up."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from cadtrain.doctor.child import run_python
from cadtrain.doctor.collective import check_collective
from cadtrain.doctor.compilers import check_compilers, check_extensions
from cadtrain.doctor.finding import Finding, Report, fail, ok
from cadtrain.doctor.gpus import check_driver, check_gpus, check_torch, count_nvlinks
from cadtrain.doctor.machine import check_disk, check_limits, check_memory, check_shared_memory
from cadtrain.doctor.packages import check_cad_kernel, check_extras, check_packages, check_python
from cadtrain.errors import EnvironmentFault
from cadtrain.launch.devices import choose_devices, find_gpus

_DEEPSPEED = "import deepspeed, sys; print('version', deepspeed.__version__)"


def examine(
    *,
    quick: bool = False,
    num_ranks: int | None = None,
    run_folder: Path = Path("runs"),
    watch: Callable[[str], None] = lambda text: None,
) -> Report:
    """Run every check and return the report; never raises for what it finds.

    `quick` leaves out what takes longer than a few seconds: DeepSpeed's import, the all-reduce and the write test.
    `num_ranks` is what a run would ask for with `--gpus`. `watch` is told what is being looked at.
    """
    return Report(tuple(_findings(quick=quick, num_ranks=num_ranks, run_folder=run_folder, watch=watch)))


def _findings(
    *, quick: bool, num_ranks: int | None, run_folder: Path, watch: Callable[[str], None]
) -> Iterator[Finding]:
    watch("Python and packages")
    yield from check_python()
    yield from check_packages()
    watch("GPUs")
    gpus = find_gpus()
    yield from check_gpus(gpus, num_ranks)
    watch("torch")
    facts, findings = check_torch(gpus)
    yield from findings
    yield from check_driver(facts)
    yield from check_extras(has_gpu=bool(gpus))
    if not quick:
        watch("DeepSpeed")
        yield from check_deepspeed(has_gpu=bool(gpus))
    watch("the CAD kernel")
    yield from check_cad_kernel()
    watch("the host")
    yield from check_memory(num_gpus=len(gpus))
    yield from check_shared_memory(num_gpus=len(gpus))
    yield from check_limits()
    yield from check_compilers(has_gpu=bool(gpus), torch_cuda=facts.cuda if facts else None)
    yield from check_extensions()
    yield from check_disk(run_folder, write=not quick)
    if quick or facts is None:
        return
    try:
        devices = choose_devices(gpus, num_ranks)
    except EnvironmentFault:
        # Fewer GPUs than asked for: said above.
        return
    watch(f"an all-reduce over {devices.num_ranks} ranks")
    yield from check_collective(devices, dict(os.environ), num_nvlinks=count_nvlinks(devices.gpus))


def check_deepspeed(*, has_gpu: bool) -> Iterator[Finding]:
    """DeepSpeed's import, which asks for compilers and drivers of its own accord."""
    result = run_python(_DEEPSPEED, seconds=180, environment={} if has_gpu else {"DS_ACCELERATOR": "cpu"})
    line = next((row for row in result.stdout.splitlines() if row.startswith("version ")), None)
    if result.is_good and line is not None:
        yield ok("DeepSpeed", f"{line.removeprefix('version ')} imports ({result.seconds:.1f} s)")
    else:
        yield fail("DeepSpeed", result.reason(), "pip install --force-reinstall --no-deps deepspeed")
