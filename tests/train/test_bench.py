"""`--bench` and `--profile` through the command line, with real ranks; and the workloads that they measure on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cadtrain.config.load import load_run_config
from cadtrain.config.measure import MeasureRequest, TokenRows
from cadtrain.errors import UsageError
from cadtrain.metrics.timeline import PREFIX, read_trace
from cadtrain.model.flops import PackContent
from cadtrain.train.workload import DataWorkload, TokenWorkload
from tests.train.small_runs import write_config
from tests.train.tiny import make_feed, model_config


def _cadtrain(*arguments: str, temporary: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(temporary)}
    command = [sys.executable, "-m", "cadtrain", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False)


def test_two_ranks_are_measured_and_profiled_and_leave_no_checkpoint(sixteen_parts: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.json", sixteen_parts, stage=3)
    run = tmp_path / "run"
    done = _cadtrain(
        "launch", str(config), "--gpus", "2", "--run-dir", str(run), "--no-preflight", "--bench", "4", "--bench-warmup", "1",
        "--bench-stage", "stage1", "--profile", "--profile-steps", "1", "--profile-ranks", "all", "--json", temporary=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bench"] == json.loads((run / "bench.json").read_text())
    assert {path.name for path in run.iterdir()} == {
        ".launch.lock", "bench.json", "config.yaml", "environment.json", "logs", "profile",
    }  # fmt: skip
    _check_report(found["bench"], sixteen_parts, config)
    _check_profile(found["profile"], run / "profile")
    refused = _cadtrain("launch", str(config), "--run-dir", str(run), "--bench", "1", temporary=tmp_path)
    assert refused.returncode == 2
    assert "already holds a run" in refused.stderr


def _check_report(report: dict[str, Any], dataset: Path, config: Path) -> None:
    """The measured steps are the run's own: those of the stage, with the samples that training would see."""
    assert (report["num_ranks"], report["zero_stage"], report["steps"], report["warmup_steps"]) == (2, 3, 4, 1)
    assert report["workload"]["stage"] == "stage1"
    assert report["workload"]["modalities"] == {"text": 0.3, "text+point": 0.3, "text+point+image": 0.4}
    assert set(report["workload"]["learning"]) == {"language", "image_projector", "point_encoder", "point_projector"}
    steps = report["each_step"]
    from cadtrain.model.tokenizer import build_tokenizer
    from cadtrain.train.run import open_feeds

    settings = load_run_config(str(config)).config
    feed = open_feeds(settings, dataset, build_tokenizer(settings.model.language, ())).train
    probabilities = settings.curriculum[1].probabilities()
    plans = [feed.plan_step(3 + 1 + number, probabilities, world_size=2) for number in range(4)]
    assert [(s["samples"], s["tokens"], s["target_tokens"]) for s in steps] == [
        (plan.num_samples, plan.num_tokens, plan.num_targets) for plan in plans
    ]
    assert [sum(map(sum, step["rank_tokens"])) for step in steps] == [step["tokens"] for step in steps]
    assert all(len(row) == 2 for step in steps for row in step["rank_tokens"])
    total = sum(step["seconds"] for step in steps)
    assert report["mean"]["tokens_per_second"] == pytest.approx(sum(s["tokens"] for s in steps) / total)
    assert report["mean"]["mfu"] is None
    assert "peak" in report["no_mfu"]
    assert report["model_flops_per_step"] > 0
    assert 0 < report["pack_fill"] <= 1 <= report["imbalance"]["max"]
    assert 0 <= report["data_wait_share"]["mean"] <= report["data_wait_share"]["max"] < 1
    shares = report["communication"]
    assert 0 < shares["exposed_share"] <= shares["share"] < 1
    assert "all-gather" in shares["kinds"]
    assert report["loss"]["last"] > 0


def _check_profile(profile: dict[str, Any], folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {"rank_00.json.gz", "rank_01.json.gz", "summary.json", "summary.txt"}
    assert profile == json.loads((folder / "summary.json").read_text())
    assert list(profile["ranks"]) == ["0", "1"]
    for found in profile["ranks"].values():
        parts = found["parts_ms"]
        assert {"attention", "MLP", "norms", "LoRA", "image encoder", "point encoder", "point projector", "image projector",
                "embedding", "logits and loss", "backward", "optimizer"} <= set(parts)  # fmt: skip
        whole = sum(parts.values()) + sum(found["gaps_ms"].values())
        whole += found["exposed_communication_ms"] + found["exposed_copies_ms"] + found["data_wait_ms"]
        assert whole == pytest.approx(found["step_ms"])
        assert found["exposed_communication_ms"] > 0
    names = {name for rows in read_trace(folder / "rank_01.json.gz").ranges.values() for *_, name in rows}
    assert {"step", "data", "micro_step", "forward", "backward", "optimizer"} <= names
    text = (folder / "summary.txt").read_text()
    assert "forward: attention" in text
    assert "rank 1, ms" in text
    assert PREFIX not in text


def test_one_process_on_random_tokens_needs_no_data_and_leaves_nothing(tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.json", tmp_path / "absent", stage=1)
    fields = json.loads(config.read_text())
    fields["data"].pop("path")
    config.write_text(json.dumps(fields))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    options = ["--bench", "2", "--bench-warmup", "1", "--bench-tokens", "64x3"]
    done = _cadtrain("train", str(config), *options, "--json", temporary=temporary)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)["bench"]
    assert "run_dir" not in json.loads(done.stdout)
    assert [path for path in temporary.iterdir() if path.name.startswith("cadtrain-bench")] == []
    assert report["workload"]["rows"] == "64x3"
    assert report["workload"]["learning"] == ["language"]
    assert [(s["samples"], s["tokens"], s["target_tokens"]) for s in report["each_step"]] == [(3, 192, 192)] * 2
    assert report["pack_fill"] == 1
    assert report["communication"] is None
    assert "one process" in report["no_communication"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bench-stage", "text"], "--bench-stage"),
        (["--bench-tokens", "64x2"], "--bench-tokens"),
        (["--json"], "--json"),
        (["--bench", "2", "--resume", "--run-dir", "x"], "--resume"),
        (["--bench", "2", "--bench-tokens", "64"], "LENGTHxSEQUENCES"),
        (["--bench", "2", "--bench-stage", "nosuch"], "Stages: text, text_point, text_point_image"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_starts(options: list[str], words: str, tmp_path: Path) -> None:
    done = _cadtrain("train", "demo", *options, temporary=tmp_path)
    assert done.returncode == 2, done.stderr
    assert words in " ".join(done.stdout.split() + done.stderr.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_a_request_travels_to_the_ranks_as_options() -> None:
    request = MeasureRequest(5, 2, "text", TokenRows(64, 3), 4, True)
    assert request.argv() == [
        "--bench-warmup", "2", "--bench", "5", "--bench-stage", "text", "--bench-tokens", "64x3", "--profile", "--profile-steps", "4",
        "--profile-ranks", "all",
    ]  # fmt: skip
    assert MeasureRequest(0, 3, None, None, 2).argv() == ["--bench-warmup", "3", "--profile", "--profile-steps", "2"]
    assert request.overrides() == ("data.max_sample_tokens=64", "batch.micro_batch_tokens=192")
    for text in ("64", "64x", "x2", "8x2", "64x0", "64*2"):
        with pytest.raises(UsageError):
            TokenRows.parse(text)


def test_random_tokens_fill_their_packs_and_differ_between_ranks_and_steps() -> None:
    work = TokenWorkload(TokenRows(64, 3), vocab_size=50, seed=1)
    packs = {}
    for step in range(5):
        plan = work.plan_step(step, {}, world_size=2)
        assert (plan.num_samples, plan.num_tokens, plan.num_targets, len(plan.packs)) == (6, 384, 384, 1)
        for rank in range(2):
            (order,) = plan.for_rank(rank)
            packs[step, rank] = work.make_pack(order)
            assert work.content(order) == PackContent(tokens=192, targets=192, pairs=3 * 64 * 64 / 2, sequences=3)
    pack = packs[0, 0]
    assert pack.cu_seqlens.tolist() == [0, 64, 128, 192]
    assert pack.position_ids.tolist() == list(range(64)) * 3
    assert pack.num_targets == pack.num_tokens == 192
    assert int(pack.labels.min()) >= 0
    assert int(pack.input_ids.max()) < 50
    assert torch.equal(pack.labels[:-1], pack.input_ids[1:])
    distinct = {tuple(packs[step, rank].input_ids.tolist()) for step in range(4) for rank in range(2)}
    assert len(distinct) == 8
    assert torch.equal(packs[4, 1].input_ids, packs[0, 1].input_ids)


def test_the_content_of_a_pack_is_what_the_pack_holds() -> None:
    feed = make_feed(model_config())
    work = DataWorkload(feed)
    probabilities = {"text": 0.3, "text+point": 0.3, "text+point+image": 0.4}
    for step in range(3):
        plan = feed.plan_step(step, probabilities, world_size=2)
        for order in (order for micro in plan.packs for order in micro):
            pack, content = feed.make_pack(order), work.content(order)
            lengths = pack.cu_seqlens.diff().double()
            assert content.tokens == pack.num_tokens
            assert content.targets == pack.num_targets
            assert content.pairs == float((lengths**2).sum() / 2)
            assert content.sequences == len(lengths)
            assert pack.image_positions is not None
            assert pack.point_positions is not None
            assert content.views * feed.builder.shape.tokens_per_view == len(pack.image_positions)
            assert content.clouds * feed.builder.shape.point_tokens == len(pack.point_positions)
