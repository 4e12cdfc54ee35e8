"""Real DeepSpeed checkpoints, made once a session by two gloo ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cadtrain.launch.planning import free_port

from make_checkpoints import VARIANTS  # isort: skip
from saved import finish, save_sums  # isort: skip

NUM_RANKS = 2


@pytest.fixture(scope="session")
def deepspeed_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one DeepSpeed checkpoint folder for each of `VARIANTS`, each with its `live.pt`."""
    root = tmp_path_factory.mktemp("deepspeed")
    run_on_ranks("make_checkpoints.py", root, *VARIANTS)
    return root


@pytest.fixture(scope="session")
def trainer_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one output folder of `transformers.Trainer` for ZeRO-2 and one for ZeRO-3, each with its live weights."""
    root = tmp_path_factory.mktemp("trainer")
    run_on_ranks("make_trainer_checkpoints.py", root, "zero2", "zero3")
    return root


def run_on_ranks(script: str, root: Path, *arguments: str) -> None:
    """Run a script of this folder on all ranks, with `root` as its first argument."""
    shared = {**os.environ, "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"WORLD_SIZE": str(NUM_RANKS), "LOCAL_SIZE": str(NUM_RANKS), "LOCAL_WORLD_SIZE": str(NUM_RANKS), "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in range(NUM_RANKS):
        command = [sys.executable, str(Path(__file__).with_name(script)), str(root), *arguments]
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with open(root / f"rank_{rank}.log", "w") as log:
            ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [rank.wait(timeout=240) for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert codes == [0] * NUM_RANKS, "\n".join((root / f"rank_{r}.log").read_text()[-3000:] for r in range(NUM_RANKS))


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint of a tiny real model with adapters and a point encoder, as ZeRO-0 writes it, and the live weights."""
    from cadtrain.cad.codec import get_codec
    from cadtrain.config.load import load_run_config
    from cadtrain.model.build import build_model
    from cadtrain.model.tokenizer import build_tokenizer

    stage = "curriculum=[{name: text, duration: 1, modalities: {text: 1.0}}]"
    config = load_run_config("demo", ["model.language.lora={rank: 4, alpha: 8}", "model.image=null", stage]).config
    codec = get_codec(config.data.codec)
    model = build_model(
        config.model, tokenizer=build_tokenizer(config.model.language), codec=codec.name, codec_version=codec.version,
        dtype=torch.float32, device="cpu", seed=0,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    state = model.state_dict()
    buffers = [name for name, _ in model.named_buffers()]
    folder = tmp_path_factory.mktemp("lora") / "run" / "checkpoints" / "step-00000001"
    (folder / "engine").mkdir(parents=True)
    content = {"module": state, "buffer_names": buffers, "optimizer": None, "dp_world_size": 1, "shared_params": None}
    torch.save(content, folder / "engine" / "mp_rank_00_model_states.pt")
    save_sums(folder / "engine", state)
    finish(folder, 1, config, precision="fp32")
    return folder, state
