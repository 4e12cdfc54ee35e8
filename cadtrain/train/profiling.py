"""Profiles of a few steps: torch's trace, with ranges that say which part of the model is at work.

The ranges come from hooks and from wrappers that exist only while a profile is taken; other steps pay nothing.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from cadtrain.data.collate import Pack
from cadtrain.errors import DataError
from cadtrain.metrics.timeline import (
    BACKWARD,
    DATA,
    FORWARD,
    MICRO_STEP,
    OPTIMIZER,
    PREFIX,
    CommunicationTimes,
    communication_times,
    read_trace,
)
from cadtrain.model.cad_mllm import CadMllm
from cadtrain.model.footprint import part_of
from cadtrain.train.engine import StepResult

log = logging.getLogger(__name__)

Result = TypeVar("Result")


def part_range(name: str) -> Any:
    """A range of the trace; a context."""
    return record_function(PREFIX + name)


class RangedEngine:
    """The methods of an engine that a step calls, each in its range; `watch_parts` must be open."""

    def __init__(self, engine: Any, open_ranges: ExitStack) -> None:
        self._engine, self._open = engine, open_ranges
        self.device = engine.device

    def micro_step(self, pack: Pack, *, num_targets: int, is_last: bool) -> torch.Tensor:
        """As the engine does. What follows the forward pass is the backward pass."""
        with part_range(MICRO_STEP), self._open:
            loss: torch.Tensor = self._engine.micro_step(pack, num_targets=num_targets, is_last=is_last)
        return loss

    def step(self) -> StepResult:
        """As the engine does."""
        with part_range(OPTIMIZER):
            result: StepResult = self._engine.step()
        return result


def ranged(packs: Iterator[Pack]) -> Iterator[Pack]:
    """`packs`, with a range around the wait for each."""
    while True:
        with part_range(DATA):
            pack = next(packs, None)
        if pack is None:
            return
        yield pack


@contextmanager
def watch_parts(model: CadMllm) -> Iterator[ExitStack]:
    """While open, every part of `model` runs in a range. Gives the stack that `RangedEngine` closes after a backward pass."""
    backward = ExitStack()
    hooks: list[Any] = []
    for name, module in model.named_modules():
        part = FORWARD if name == "" else part_of(name)
        if part is None or isinstance(module, nn.Identity | nn.ModuleDict | nn.ModuleList):
            continue
        opened: list[Any] = []

        def enter(module: nn.Module, args: Any, *, part: str = part, opened: list[Any] = opened) -> None:
            opened.append(part_range(part))
            opened[-1].__enter__()

        def leave(module: nn.Module, args: Any, output: Any, *, opened: list[Any] = opened) -> None:
            if opened:  # none where the module was entered before the hooks were there
                opened.pop().__exit__(None, None, None)

        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    # After the range of the forward pass has ended.
    hooks.append(model.register_forward_hook(lambda *_: backward.enter_context(part_range(BACKWARD)) and None))
    try:
        yield backward
    finally:
        for hook in hooks:
            hook.remove()


def kept_profile(take: Callable[[], object], path: Path, *, steps: int) -> None:
    """Call `take` `1 + steps` times under the profiler and write the trace of the last `steps` to `path` (`.json.gz`), whole
    or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        _profiled(take, temporary, steps=steps, with_host=True)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def communication_of(take: Callable[[], Result], *, steps: int) -> tuple[list[Result], CommunicationTimes]:
    """As `kept_profile`, but only what `take` gave in the last `steps` calls and when collectives ran in them are kept."""
    with tempfile.TemporaryDirectory(prefix="cadtrain-trace-") as folder:
        trace = Path(folder) / "trace.json"
        results = _profiled(take, trace, steps=steps, with_host=False)
        try:
            times = communication_times(read_trace(trace))
        except DataError as error:
            log.warning("collectives cannot be told: %s", error)
            times = CommunicationTimes(0.0, 0.0, {}, False)
        return results, times


def _profiled(take: Callable[[], Result], trace: Path, *, steps: int, with_host: bool) -> list[Result]:
    """The first call is the profiler's own warm-up. Without the host's side a GPU's timeline is disturbed least."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if with_host else [ProfilerActivity.CUDA]
    results = []
    with profile(
        activities=activities,
        schedule=schedule(wait=0, warmup=1, active=steps),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(trace)),
        acc_events=True,  # there is one cycle; without it torch warns of losing others
    ) as profiler:
        for _ in range(1 + steps):
            results.append(take())
            profiler.step()
    return results[1:]
