"""Predicted memory against every tensor of steps that the real engine takes on CPU ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cadtrain.cli.worst_step import plan_worst_step, take_worst_step
from cadtrain.launch.planning import LaunchRequest


def write_run(path: Path, stage: int) -> None:
    """A language model of 29 million weights, all of which learn, in bf16; packs so small that what ZeRO shares out matters most."""
    shapes = {
        "model_type": "qwen3", "hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1536, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 8192, "tie_word_embeddings": True,
    }  # fmt: skip
    run = {
        "precision": "bf16",
        "model": {"language": {"tokenizer": "bytes", "config": shapes}, "recompute": "full"},
        "data": {"max_sample_tokens": 256},
        "curriculum": [{"name": "text", "duration": "3 steps", "modalities": {"text": 1.0}}],
        "zero": {"stage": stage},
        "batch": {"global_batch_size": 8, "micro_batch_tokens": 256},
    }
    path.write_text(json.dumps(run), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "within"), [(0, 0.04), (1, 0.02), (2, 0.04), (3, 0.03)])
def test_passes_hold_what_is_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, within: float
) -> None:
    monkeypatch.setattr("cadtrain.launch.devices._gpus_from_nvml", lambda: ())
    write_run(tmp_path / "run.yaml", stage)
    request = LaunchRequest(config=str(tmp_path / "run.yaml"), gpus=2, run_dir=tmp_path / "run")
    taken = take_worst_step(plan_worst_step(request), announce=lambda text: None)
    assert len(taken.ranks) == 2
    # Adam on the CPU makes copies that the fused one on a GPU does not, so the update is left out.
    assert taken.predicted.allocated == pytest.approx(taken.worst.passes, rel=within)
    states = taken.predicted.weights + taken.predicted.optimizer
    assert taken.worst.held > states
