"""Whole runs on two GPUs over NCCL: saved behind the training, verified, gone on with, under a cap of memory.

    pytest -m multi_gpu tests/train/test_multi_gpu.py

`CADTRAIN_TEST_PARTS` names a prepared dataset to use where the CAD kernel is not installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.train.small_runs import NUM_STEPS, losses, metrics, whole_steps, write_config

pytestmark = [
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason=f"needs two GPUs, there are {torch.cuda.device_count()}"),
]


@pytest.fixture(scope="session")
def parts(request: pytest.FixtureRequest) -> Path:
    """A prepared dataset."""
    given = os.environ.get("CADTRAIN_TEST_PARTS")
    found: Path = Path(given).resolve() if given else request.getfixturevalue("sixteen_parts")
    return found


def cadtrain(*arguments: str) -> str:
    """Run a command to its end and give back what it said."""
    command = [sys.executable, "-m", "cadtrain", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_saved_behind_the_training_goes_on_from_any_of_its_checkpoints(
    stage: int, parts: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "run.json", parts, stage=stage, asynchronous=True, keep_last=NUM_STEPS)
    run = tmp_path / "run"
    launch = ("launch", "--gpus", "2", "--no-preflight", "--gpu-memory", "12GB", "--run-dir", str(run))
    cadtrain(*launch[:1], str(config), *launch[1:])
    whole = dict(losses(run))
    assert whole_steps(run) == list(range(1, NUM_STEPS + 1))
    assert sorted(whole) == list(range(1, NUM_STEPS + 1))
    assert all(0 < row["memory_reserved_gib"] <= (12e9 / 2**30) - 2.2 for row in metrics(run))
    assert "every weight in it is the one that was live" in cadtrain(
        "convert", str(run), str(tmp_path / "out.safetensors"), "--verify"
    )
    for step in range(NUM_STEPS // 2 + 1, NUM_STEPS + 1):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    assert f"resumed after step {NUM_STEPS // 2}" in cadtrain(*launch, "--resume")
    again = dict(losses(run))
    # The same samples, weights and moments; some of CUDA's kernels add in an order of their own.
    for step in range(NUM_STEPS // 2 + 1, NUM_STEPS + 1):
        assert again[step] == pytest.approx(whole[step], rel=2e-3), step
