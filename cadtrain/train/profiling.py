"""Profiles of a few steps: torch's trace, with ranges that say which part of the model is at work.

The ranges come from hooks and from wrappers that exist only while a profile is taken; other steps pay nothing.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from cadtrain.data.collate import Pack
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


def kept_profile(work: Callable[[], None], path: Path) -> None:
    """Do `work` under the profiler and write its trace to `path` (`.json.gz`), whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        with profile(activities=_activities(with_host=True)) as profiler:
            work()
        profiler.export_chrome_trace(str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def communication_of(work: Callable[[], Result]) -> tuple[Result, CommunicationTimes]:
    """Do `work` under the profiler, of which nothing is kept but when collectives ran."""
    with tempfile.TemporaryDirectory(prefix="cadtrain-trace-") as folder:
        trace = Path(folder) / "trace.json"
        with profile(activities=_activities(with_host=False)) as profiler:
            result = work()
        profiler.export_chrome_trace(str(trace))
        return result, communication_times(read_trace(trace))


def _activities(*, with_host: bool) -> list[ProfilerActivity]:
    """What to record. Without the host's side a GPU's timeline is disturbed least."""
    if not torch.cuda.is_available():
        return [ProfilerActivity.CPU]
    return [ProfilerActivity.CPU, ProfilerActivity.CUDA] if with_host else [ProfilerActivity.CUDA]
