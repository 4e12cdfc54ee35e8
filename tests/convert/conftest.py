"""Real DeepSpeed checkpoints, made once a session by two gloo ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cadtrain.launch.planning import free_port

from make_checkpoints import VARIANTS  # isort: skip

NUM_RANKS = 2


@pytest.fixture(scope="session")
def deepspeed_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one DeepSpeed checkpoint folder for each of `VARIANTS`, each with its `live.pt`."""
    root = tmp_path_factory.mktemp("deepspeed")
    script = Path(__file__).with_name("make_checkpoints.py")
    shared = {**os.environ, "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"WORLD_SIZE": str(NUM_RANKS), "LOCAL_SIZE": str(NUM_RANKS), "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in range(NUM_RANKS):
        command = [sys.executable, str(script), str(root), *VARIANTS]
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with open(root / f"rank_{rank}.log", "w") as log:
            ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [rank.wait(timeout=240) for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert codes == [0] * NUM_RANKS, "\n".join((root / f"rank_{r}.log").read_text()[-3000:] for r in range(NUM_RANKS))
    return root
