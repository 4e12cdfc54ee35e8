"""Whole runs through the command line, with real ranks: the curriculum, a kill, a resume, a conversion."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.train.ranks import RankPool
from tests.train.tiny import CONFIG_FIELDS, IMAGE_FIELDS, build, make_engine, make_feed, model_config

COMPONENT_RATES = dict.fromkeys(("language", "image_encoder", "image_projector", "point_encoder", "point_projector"), 1e-3)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four procedural parts."""
    from cadtrain.data.synth.make import synthesize

    folder = tmp_path_factory.mktemp("parts") / "dataset"
    synthesize(24, folder, num_points=64, num_views=1, image_size=56, workers=2)
    return folder


@pytest.fixture
def config_file(tmp_path: Path, dataset: Path) -> Path:
    """Three stages of four steps each."""
    stages = [
        {"name": "text", "modalities": {"text": 1.0}},
        {"name": "points", "modalities": {"text": 0.3, "text+point": 0.7}},
        {"name": "images", "modalities": {"text": 0.2, "text+point": 0.3, "text+image": 0.2, "text+point+image": 0.3}},
    ]
    config = {
        "name": "tiny",
        "model": {
            "language": {"config": {**CONFIG_FIELDS, "max_position_embeddings": 2048}, "tokenizer": "bytes", "lora": {"rank": 4, "dropout": 0.1}},
            "image": {"config": IMAGE_FIELDS, "image_size": 28, "trainable": True},
            "point": {"num_latents": 4, "width": 24, "num_heads": 2, "num_layers": 1, "trainable": True},
            "projector_width": 32,
        },
        "data": {"path": str(dataset), "num_points": 32, "max_sample_tokens": 1024, "validation_samples": 2, "num_workers": 1},
        "curriculum": [{**stage, "duration": "4 steps", "learning_rate": 1e-3, "warmup": "1 steps"} for stage in stages],
        "batch": {"global_batch_size": 6, "micro_batch_tokens": 1024},
        "checkpoint": {"every": "3 steps", "keep_last": 3},
        "logging": {"tensorboard": False},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(config))
    return path


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "cadtrain", *arguments]


def _launch(*arguments: str, timeout: float = 240.0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(_command("launch", *arguments), capture_output=True, text=True, timeout=timeout, env=environment, check=False)


def _metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in _metrics(run) if not row.get("validation")]


def _ranks_of(run: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "train" in words and str(run) in words and "deepspeed.launcher.launch" not in words:
            found.append(process)
    return found


def test_a_killed_run_resumes_with_the_losses_of_an_uninterrupted_one(config_file: Path, tmp_path: Path) -> None:
    """kill -9 of every rank in the middle of a stage, resume: every loss of all three stages is the same, bit for bit."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = [str(config_file), "--gpus", "2", "--zero", "3"]
    done = _launch(*options, "--run-dir", str(whole))
    assert done.returncode == 0, done.stderr
    expected = _losses(whole)
    assert [step for step, _ in expected] == list(range(1, 13))

    process = subprocess.Popen(_command("launch", *options, "--run-dir", str(killed)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 200
    while not (killed / "checkpoints" / "step-00000006").is_dir():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < limit
        time.sleep(0.02)
    for rank in _ranks_of(killed):
        rank.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == 128 + signal.SIGKILL
    assert len(_losses(killed)) < 12

    resumed = _launch("--run-dir", str(killed), "--resume", "--gpus", "2")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed after step" in resumed.stderr
    assert _losses(killed) == expected

    rows = _metrics(killed)
    assert {row["stage"]: set(row["losses"]) for row in rows if row.get("validation")} == {
        "text": {"text"},
        "points": {"text", "text+point"},
        "images": {"text", "text+point", "text+image", "text+point+image"},
    }
    for key in ("step", "stage", "loss", "lr", "tokens", "tokens_per_second", "seconds"):
        assert all(key in row for row in rows if not row.get("validation"))
    assert (killed / "checkpoints" / "latest").read_text().strip() == "step-00000012"
    assert (killed / "logs" / "rank_01.log").is_file()
    _check_other_ranks_and_export(killed, tmp_path)


def _check_other_ranks_and_export(run: Path, tmp_path: Path) -> None:
    """What a finished run allows: no second run in its folder, no resume on another number of ranks, an export that opens."""
    refused = _launch("--run-dir", str(run))
    assert refused.returncode == 2
    assert "already holds a run" in refused.stderr
    target = tmp_path / "exported"
    done = subprocess.run(_command("convert", str(run), str(target)), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    from cadtrain.model import CadMllm

    model = CadMllm.from_pretrained(target)
    assert not any("lora" in name for name, _ in model.named_parameters())


def _train_and_save_on_rank(stage: int, folder: str) -> torch.Tensor:
    """Two steps, a checkpoint, and the live model's logits of one pack."""
    from cadtrain.checkpoint.retention import Retention
    from cadtrain.checkpoint.store import CheckpointStore
    from cadtrain.config.load import to_yaml
    from cadtrain.config.sections import RunConfig
    from cadtrain.distributed import Place

    config, place = model_config(lora=stage == 2), Place.from_environment()
    engine, feed = make_engine(config, stage), make_feed(config)
    probabilities = {"text+point+image": 1.0}
    engine.set_learning(COMPONENT_RATES)
    engine.set_rates(COMPONENT_RATES)
    for step in range(2):
        plan = feed.plan_step(step, probabilities, world_size=2)
        orders = plan.for_rank(place.rank)
        for number, order in enumerate(orders):
            engine.micro_step(feed.make_pack(order), num_targets=plan.num_targets, is_last=number == len(orders) - 1)
        engine.step()
    facts = {"zero_stage": stage, "precision": "fp32", "versions": {}}
    store = CheckpointStore(Path(folder), place=place, retention=Retention(1), facts=facts)
    run = RunConfig(model=config, curriculum=({"name": "one", "duration": "2 steps", "modalities": probabilities},))  # type: ignore[arg-type]
    store.save(2, {}, config_text=to_yaml(run), write_engine=engine.save)
    inputs = feed.make_pack(feed.plan_step(0, probabilities, world_size=1).packs[0][0]).model_inputs()
    engine._engine.eval()
    with torch.no_grad():
        logits = engine._engine(**{**inputs, "labels": None, "target_positions": None}).logits
    engine.close()
    return logits


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_converted_weights_give_the_logits_of_the_live_model(two_ranks: RankPool, tmp_path: Path, stage: int) -> None:
    """Every ZeRO stage (LoRA at stage 2): `.bin` loaded into a fresh model."""
    from cadtrain.convert.service import convert_checkpoint

    live = two_ranks.run(_train_and_save_on_rank, stage, str(tmp_path))[0]
    result = convert_checkpoint(tmp_path / "checkpoints" / "step-00000002", tmp_path / "out.bin", verify=True)
    assert result.verified
    config = model_config(lora=stage == 2)
    model, feed = build(config, seed=1), make_feed(config)
    state = torch.load(tmp_path / "out.bin", weights_only=True)
    outcome = model.load_state_dict(state, strict=False)
    assert not outcome.unexpected_keys
    assert all("lm_head" in key or "inv_freq" in key for key in outcome.missing_keys), outcome.missing_keys
    inputs = feed.make_pack(feed.plan_step(0, {"text+point+image": 1.0}, world_size=1).packs[0][0]).model_inputs()
    model.eval()
    with torch.no_grad():
        logits = model(**{**inputs, "labels": None, "target_positions": None}).logits
    torch.testing.assert_close(logits, live, rtol=1e-5, atol=1e-5)
