"""Checkpoints that `transformers.Trainer` really wrote under DeepSpeed, on two CPU ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cadtrain.checkpoint.source import find_checkpoint
from cadtrain.convert.service import convert_checkpoint
from cadtrain.errors import UsageError

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("source", ["checkpoint-2", "checkpoint-2/global_step2", "checkpoint-4", "."])
def test_the_weights_are_the_live_ones(trainer_checkpoints: Path, tmp_path: Path, stage: int, source: str) -> None:
    """Named by one of its checkpoints, by its shards, or by the output folder, which means the newest."""
    folder = trainer_checkpoints / f"zero{stage}"
    result = convert_checkpoint(folder / source, tmp_path / "out.bin")
    step = 2 if "2" in source else 4
    assert (result.zero_stage, result.num_ranks) == (stage, 2)
    state = torch.load(tmp_path / "out.bin", weights_only=True)
    live = torch.load(folder / f"live-{step}.pt", weights_only=True)
    assert set(state) == set(live)
    for name, expected in live.items():
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name].to(expected.dtype), expected), name
    assert not torch.equal(state["lm_head.weight"], state["lm_head.weight"].bfloat16().float()), "trained weights are in fp32"


def test_a_step_of_the_output_folder(trainer_checkpoints: Path) -> None:
    folder = trainer_checkpoints / "zero3"
    assert find_checkpoint(folder, step=2).shards == folder / "checkpoint-2" / "global_step2"
    with pytest.raises(UsageError, match="there are 2, 4"):
        find_checkpoint(folder, step=3)
