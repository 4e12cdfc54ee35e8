"""Checkpoints of a run, finished by hand around shards, for tests of what reads them."""

from __future__ import annotations

from pathlib import Path

import torch

from cadtrain.checkpoint.manifest import Manifest, record_files
from cadtrain.checkpoint.weight_sums import LiveSpan, write_sums
from cadtrain.config.load import to_yaml
from cadtrain.config.sections import RunConfig


def finish(folder: Path, step: int, config: RunConfig | None = None, precision: str = "bf16") -> Path:
    """Make a checkpoint of ours of a folder that holds `engine/`."""
    if config is not None:
        (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "state.json").write_text("{}")
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    Manifest(step, 2, 2, precision, {}, record_files(folder, names)).write(folder)
    return folder


def save_sums(engine: Path, live: dict[str, torch.Tensor]) -> None:
    """The hashes that a single rank would have left of these weights; a tied one stands under its first name."""
    first = {tensor.data_ptr(): name for name, tensor in reversed(live.items())}
    spans = [
        LiveSpan(name, tensor.numel(), 0, tensor.reshape(-1)) for name, tensor in live.items() if first[tensor.data_ptr()] == name
    ]
    write_sums(engine, 0, spans)
