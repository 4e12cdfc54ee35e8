"""The checks that `cadtrain launch` makes before it starts: those that take no time, a few seconds where a network is gone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cadtrain.doctor.compilers import check_compilers, check_extensions
from cadtrain.doctor.finding import Finding, Report, Verdict, fail, warn
from cadtrain.doctor.gpu_health import check_health, check_visible, read_health
from cadtrain.doctor.leftovers import check_processes
from cadtrain.doctor.machine import check_disk, check_limits, check_memory, check_shared_memory
from cadtrain.doctor.network import check_host_name
from cadtrain.errors import EnvironmentFault
from cadtrain.hub import CONFIG_FILES, WEIGHT_FILES, require
from cadtrain.launch.planning import LaunchPlan
from cadtrain.plan.stage import pretrained_sources

if TYPE_CHECKING:
    from cadtrain.config.sections import ModelConfig

CHECKPOINT_BYTES = 256 * 2**20
"""Room without which no run is worth its start; what a checkpoint takes is checked when it is written."""


def preflight(plan: LaunchPlan) -> Report:
    """What is wrong with this machine for `plan`; findings that are fine are left out. Never raises for what it finds."""
    return Report(tuple(finding for finding in _findings(plan) if finding.verdict is not Verdict.OK))


def _findings(plan: LaunchPlan) -> Iterator[Finding]:
    gpus = plan.devices.gpus
    if gpus:
        # A driver that does not answer in this time is not waited for here; `cadtrain doctor` looks longer.
        health = read_health(seconds=5) or []
        yield from check_visible(health=health)
        yield from check_health(gpus, health)
    yield from check_memory(num_gpus=len(gpus))
    yield from check_shared_memory(num_gpus=len(gpus))
    yield from check_limits()
    if gpus and plan.config.zero.offload_optimizer:
        # DeepSpeed compiles its host optimizer then; without offloading, and on CPU ranks, it compiles nothing.
        yield from check_compilers(compiles="now", torch_cuda=None)
        yield from check_extensions()
    yield from check_pretrained(plan.config.model, is_elsewhere=plan.cluster is not None)
    yield from check_host_name()
    yield from check_processes()
    yield from check_disk(plan.run_dir, write=False, wanted=CHECKPOINT_BYTES)


def check_pretrained(model: ModelConfig, *, is_elsewhere: bool = False) -> Iterator[Finding]:
    """The first pretrained part of `model` that would have to be downloaded although the hub cannot be reached.

    A warning where the ranks' hosts are other ones (`is_elsewhere`): their caches and networks may be, too.
    """
    sources = pretrained_sources(model)
    weights = [(source, where, WEIGHT_FILES) for source, where, files in sources if files == CONFIG_FILES]
    for source, where, files in [*sources, *weights]:
        try:
            require(source, where, *files)
        except EnvironmentFault as error:
            yield (warn if is_elsewhere else fail)(where, error.message.rstrip("."), error.hint or "")
            return
