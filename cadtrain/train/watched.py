"""An engine that gives signs of life: what the launcher sees of a rank that trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from cadtrain.checkpoint.shard_writer import ShardSink
from cadtrain.config.sections import Component
from cadtrain.data.collate import Pack
from cadtrain.heartbeat import Heartbeat, module_label
from cadtrain.train.engine import Engine, StepResult


class WatchedEngine:
    """`engine`, with a heartbeat at every micro-step, step, evaluation and save. It is an `Engine` itself."""

    def __init__(self, engine: Engine, heartbeat: Heartbeat) -> None:
        self.device = engine.device
        self._engine, self._heartbeat = engine, heartbeat
        self._step, self._micro_step = 0, 0

    def at_step(self, step: int) -> None:
        """0-based optimizer step `step` is about to begin."""
        self._step, self._micro_step = step, 0

    def set_learning(self, components: Iterable[Component]) -> None:
        """As the engine does."""
        self._engine.set_learning(components)

    def set_recompute(self, num_layers: int) -> None:
        """As the engine does."""
        self._engine.set_recompute(num_layers)

    def start_components(self, components: Iterable[Component]) -> None:
        """As the engine does."""
        self._engine.start_components(components)

    def set_rates(self, rates: Mapping[Component, float]) -> None:
        """As the engine does."""
        self._engine.set_rates(rates)

    def micro_step(self, pack: Pack, *, num_targets: int, is_last: bool) -> torch.Tensor:
        """As the engine does, after a sign."""
        self._micro_step += 1
        self._heartbeat.begin_micro_step(self._step + 1, self._micro_step)
        return self._engine.micro_step(pack, num_targets=num_targets, is_last=is_last)

    def step(self) -> StepResult:
        """As the engine does, with a sign afterwards."""
        result = self._engine.step()
        self._heartbeat.end_step()
        return result

    def evaluate(self, pack: Pack) -> torch.Tensor:
        """As the engine does, after a sign."""
        self._heartbeat.phase("validating")
        return self._engine.evaluate(pack)

    def frozen_names(self) -> frozenset[str]:
        """As the engine does."""
        return self._engine.frozen_names()

    def saved_bytes(self, *, with_frozen: bool = True) -> int:
        """As the engine does."""
        return self._engine.saved_bytes(with_frozen=with_frozen)

    def save(self, folder: Path, sink: ShardSink) -> None:
        """As the engine does, with a sign before, and after: the files are hashed and flushed then."""
        self._heartbeat.phase("saving a checkpoint")
        self._engine.save(folder, sink)
        self._heartbeat.phase("finishing a checkpoint")

    def load(self, folder: Path) -> None:
        """As the engine does."""
        self._engine.load(folder)

    def load_resharded(self, folder: Path) -> None:
        """As the engine does."""
        self._engine.load_resharded(folder)

    def load_weights(self, folder: Path) -> None:
        """As the engine does."""
        self._engine.load_weights(folder)

    def close(self) -> None:
        """As the engine does."""
        self._engine.close()


def tell_modules(model: nn.Module, heartbeat: Heartbeat) -> None:
    """Let `heartbeat` know each repeated block (decoder layers, encoder blocks) and top-level part that `model` enters."""
    for name, module in model.named_modules():
        is_block = name.rpartition(".")[2].isdecimal()
        if name and (is_block or name.count(".") == 0):
            module.register_forward_pre_hook(_hook(heartbeat, module_label(name)))


def _hook(heartbeat: Heartbeat, label: bytes):  # type: ignore[no-untyped-def]
    def tell(module: nn.Module, inputs: object) -> None:
        heartbeat.enter(label)

    return tell
