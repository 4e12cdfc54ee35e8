"""Keys that are right alone and wrong together, and what the lint finds in configurations that others ship."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cadtrain.config.deepspeed_config import build_deepspeed_config
from cadtrain.config.deepspeed_lint import check_file
from cadtrain.config.deepspeed_rules import contradictions
from tests.config.public_deepspeed import PUBLIC


def found(values: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [(row.level, ".".join(map(str, row.path)), row.message) for row in contradictions(values)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"train_batch_size": 64, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 4}, []),
        (
            {"train_batch_size": 100, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 4},
            [("error", "train_batch_size", "100 is no multiple of 8 per GPU × 4 accumulation steps.")],
        ),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, [("error", "fp16.enabled", "bf16 is enabled as well.")]),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            [("error", "zero_optimization.offload_param.device", "needs stage 3, found stage 2.")],
        ),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            [("error", "zero_optimization.offload_optimizer.device", "needs stage 1, 2 or 3, found stage 0.")],
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            [("error", "zero_optimization.offload_optimizer.device", "NVMe needs a folder.")],
        ),
        (
            {"zero_optimization": {"stage": 2, "stage3_max_live_parameters": 1e9}},
            [("warning", "zero_optimization.stage3_max_live_parameters", "has no effect in stage 2.")],
        ),
        (
            {"zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 500_000_000}},
            [
                (
                    "warning", "zero_optimization.reduce_bucket_size",
                    "500,000,000 elements with overlap_comm take up to 4.5 GB on each GPU.",
                )
            ],
        ),
        ({"zero_optimization": {"stage": "auto", "offload_param": {"device": "cpu"}}}, []),
    ],
)  # fmt: skip
def test_rules_between_keys(values: dict[str, Any], expected: list[tuple[str, str, str]]) -> None:
    assert found(values) == expected


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_we_write_breaks_none(stage: int) -> None:
    assert found(build_deepspeed_config(zero_stage=stage, offload_optimizer=stage > 0, offload_parameters=stage == 3).to_dict()) == []  # type: ignore[arg-type]
    if stage == 3:
        config = build_deepspeed_config(zero_stage=3, offload_optimizer=True, offload_parameters=True, nvme_path="/nvme")
        assert found(config.to_dict()) == []
        assert config.to_dict()["zero_optimization"]["offload_param"]["nvme_path"] == "/nvme"
        assert "aio" in config.to_dict()


EXPECTED = {
    "transformers zero3": ["reduce_bucket_size"],
    "axolotl zero3_bf16": ["sub_group_size", "stage3_max_live_parameters", "stage3_max_reuse_distance"],
    "llama-factory z3 offload": ["overlap_comm"],
    "ms-swift zero2": ["gradient_clipping"],
    "older example": ["train_batch_size", "fp16.enabled", "amp", "cpu_offload", "stage3_max_live_parameters"],
}


@pytest.mark.parametrize("name", PUBLIC)
def test_what_is_found_in_configurations_of_others(tmp_path: Path, name: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(PUBLIC[name], indent=2))
    findings = check_file(path)
    places = [finding.fault.where for finding in findings]
    for key in EXPECTED[name]:
        assert any(place.endswith(key) for place in places), (key, places)
    errors = [finding.fault.where for finding in findings if finding.level == "error"]
    assert bool(errors) == (name == "older example"), errors
    if name != "older example":
        assert sum(place.endswith(("train_batch_size", "train_micro_batch_size_per_gpu")) for place in places) == 2, "each unresolved auto is named"
