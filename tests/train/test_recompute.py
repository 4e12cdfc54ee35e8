"""Whole runs on two ranks whose stages recompute different numbers of layers: the same run, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.train.forked import Fault, ForkServer
from tests.train.small_runs import final_weights, losses, output, write_config


def configure(path: Path, parts: Path, *, stage: int, recompute: str | list[int]) -> Path:
    """The smallest run, with adapters and dropout on their inputs."""
    config = json.loads(write_config(path, parts, stage=stage).read_text())
    config["model"]["recompute"] = recompute
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_run_is_the_same_with_any_number_of_recomputed_layers(
    server: ForkServer, sixteen_parts: Path, tmp_path: Path, stage: int
) -> None:
    """Losses and final weights, with dropout drawn again, through a kill and a resume in the second stage."""
    kept = configure(tmp_path / "kept.yaml", sixteen_parts, stage=stage, recompute="none")
    dialled = configure(tmp_path / "dialled.yaml", sixteen_parts, stage=stage, recompute=[2, 1])
    assert server.run(tmp_path / "kept", kept).is_done, output(tmp_path / "kept")
    killed = server.run(tmp_path / "dialled", dialled, fault=Fault(at=5, only=r"os.rename step-\d+\.tmp$"))
    assert not killed.is_done
    assert server.run(tmp_path / "dialled", dialled, resume=True).is_done, output(tmp_path / "dialled")
    assert dict(losses(tmp_path / "dialled")) == dict(losses(tmp_path / "kept"))
    assert final_weights(tmp_path / "dialled") == final_weights(tmp_path / "kept")
