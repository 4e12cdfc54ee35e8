"""Other people's DeepSpeed files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cadtrain.config.deepspeed_config import build_deepspeed_config
from cadtrain.config.deepspeed_lint import check_file, merge_user_file
from cadtrain.errors import ConfigError, UsageError

OURS = build_deepspeed_config(zero_stage=3, world_size=4)


def write(folder: Path, values: Any) -> Path:
    path = folder / "ds.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


@pytest.mark.parametrize(
    ("values", "key", "words"),
    [
        ({"gradient_cliping": 1.0}, "gradient_cliping", ["ignore it in silence", "Did you mean `gradient_clipping`?"]),
        ({"stage": 3}, "stage", ["Did you mean `zero_optimization.stage`?"]),
        (
            {"zero_optimization": {"overlap_com": True}},
            "zero_optimization.overlap_com",
            ["Did you mean `overlap_comm`?"],
        ),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage", ["found 4", "one of 0, 1, 2, 3"]),
        (
            {"zero_optimization": {"sub_group_size": "1e9"}},
            "zero_optimization.sub_group_size",
            ["found '1e9'", "a whole number"],
        ),
        (
            {"zero_optimization": {"reduce_bucket_size": 0.5}},
            "zero_optimization.reduce_bucket_size",
            ["found 0.5", "a whole number"],
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "disk"}}},
            "zero_optimization.offload_param.device",
            ["none, cpu, nvme"],
        ),
        ({"zero_optimization": True}, "zero_optimization", ["found true", "a section with keys"]),
        ({"bf16": {"enabled": "yes"}}, "bf16.enabled", ["found 'yes'", "true or false"]),
        ({"bfloat16": {"enabled": True}}, "bfloat16", ["an old spelling", "Write `bf16`"]),
        (
            {"zero_optimization": {"cpu_offload": True}},
            "zero_optimization.cpu_offload",
            ["Write `zero_optimization.offload_optimizer`"],
        ),
        ({"elasticity": {"enabled": True}}, "elasticity", ["removed this key", "--resume"]),
        (
            {"zero_optimization": {"mics_shard_size": 4}},
            "zero_optimization.mics_shard_size",
            ["removed this key", "zero_hpz_partition_size"],
        ),
        ({"pipeline": {}}, "pipeline", ["cadtrain does not use it", "no pipeline stages"]),
        (
            {"activation_checkpointing": {"partition_activatons": True}},
            "activation_checkpointing.partition_activatons",
            ["Did you mean"],
        ),
        ({"checkpoint": {"load_universl": True}}, "checkpoint.load_universl", ["Did you mean `load_universal`?"]),
        ({"scheduler": {"type": "Cosine"}}, "scheduler.type", ["WarmupCosineLR"]),
    ],
)
def test_errors(tmp_path: Path, values: dict[str, Any], key: str, words: list[str]) -> None:
    path = write(tmp_path, values)
    (finding,) = [finding for finding in check_file(path) if finding.level == "error"]
    assert finding.fault.where == f"{path}:1 {key}"
    for word in words:
        assert word in str(finding.fault)


@pytest.mark.parametrize(
    ("values", "key", "words"),
    [
        (
            {"zero_optimization": {"reduce_bucket_size": "auto"}},
            "zero_optimization.reduce_bucket_size",
            "takes its default in silence",
        ),
        ({"train_batch_size": "auto"}, "train_batch_size", "does not know the word"),
        ({"zero_optimization": {"overlap_comm": False}}, "zero_optimization.overlap_comm", "while nothing is computed"),
        ({"zero_optimization": {"sub_group_size": 0}}, "zero_optimization.sub_group_size", "every parameter"),
        ({"fp16": {"enabled": True}}, "fp16.enabled", "bf16 or fp32"),
        ({"bf16": {"check_grad_overflow": False}}, "bf16.check_grad_overflow", "not finite"),
    ],
)
def test_warnings(tmp_path: Path, values: dict[str, Any], key: str, words: str) -> None:
    path = write(tmp_path, values)
    (finding,) = check_file(path)
    assert (finding.level, finding.fault.where) == ("warning", f"{path}:1 {key}")
    assert words in finding.fault.message


def test_what_cadtrain_writes_has_no_findings(tmp_path: Path) -> None:
    assert check_file(write(tmp_path, OURS.to_dict())) == []


def test_keep_in_fp32_modules_may_say_auto(tmp_path: Path) -> None:
    assert check_file(write(tmp_path, {"data_types": {"keep_in_fp32_modules": "auto"}})) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not readable as JSON"),
        ('{"a": 1,}', "not readable as JSON"),
        ("bf16: {enabled: true}", "not readable as JSON"),
        ('{\n\t"bf16": {"enabled": true}\n\t"fp16": {}\n}', ":3"),
    ],
)
def test_files_that_are_no_json(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_file(write(tmp_path, text))


def test_files_that_hold_no_object_or_are_not_there(tmp_path: Path) -> None:
    assert "holds no JSON object" in check_file(write(tmp_path, "[]"))[0].fault.message
    with pytest.raises(UsageError, match="no such DeepSpeed file") as caught:
        check_file(tmp_path / "dss.json")
    assert "ds.json" in (caught.value.hint or "")


def test_keys_written_twice_are_found_with_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path, '{\n  "bf16": {"enabled": true},\n\t"bf16": {"enabled": false}\n}')
    (finding,) = check_file(path)
    assert str(finding.fault) == f"{path}:3 bf16: written twice, first on line 2. Keep one."


def test_merging_lays_their_values_over_ours(tmp_path: Path) -> None:
    theirs = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "optimizer": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": False,
            "reduce_bucket_size": 1e8,
            "stage3_prefetch_bucket_size": "auto",
        },
        "comms_logger": {"enabled": True},
    }
    merged = merge_user_file(write(tmp_path, theirs), OURS).to_dict()
    ours = OURS.to_dict()
    assert merged["zero_optimization"]["reduce_bucket_size"] == 100_000_000
    assert merged["zero_optimization"]["overlap_comm"] is False
    assert (
        merged["zero_optimization"]["stage3_prefetch_bucket_size"]
        == ours["zero_optimization"]["stage3_prefetch_bucket_size"]
    )
    assert merged["comms_logger"] == {"enabled": True}
    assert (merged["train_batch_size"], merged["bf16"], "optimizer" in merged) == (4, ours["bf16"], False)


@pytest.mark.parametrize(
    ("values", "key", "words"),
    [
        ({"train_batch_size": 64}, "train_batch_size", ["found 64", "the run has 4", "batch.global_batch_size"]),
        ({"optimizer": {"type": "AdamW"}}, "optimizer", ["a block", "it has none", "optim"]),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage", ["found 2", "the run has 3", "zero.stage"]),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param.device",
            ["zero.offload_parameters"],
        ),
        ({"bf16": {"enabled": False}}, "bf16.enabled", ["the run has true", "`precision`"]),
        (
            {"zero_optimization": {"allgather_bucket_size": "auto"}},
            "zero_optimization.allgather_bucket_size",
            ["nothing to stand for"],
        ),
        ({"gradient_cliping": 1.0}, "gradient_cliping", ["Did you mean"]),
    ],
)
def test_conflicts_with_the_run(tmp_path: Path, values: dict[str, Any], key: str, words: list[str]) -> None:
    path = write(tmp_path, values)
    with pytest.raises(ConfigError) as caught:
        merge_user_file(path, OURS)
    (fault,) = caught.value.faults
    assert fault.where == f"{path}:1 {key}"
    for word in words:
        assert word in str(fault)


def test_equal_values_are_no_conflict(tmp_path: Path) -> None:
    values = {
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 3, "offload_param": {"device": "none"}},
        "fp16": {"enabled": False},
    }
    assert merge_user_file(write(tmp_path, values), OURS).to_dict()["zero_optimization"]["offload_param"] == {
        "device": "none"
    }
