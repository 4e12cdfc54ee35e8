"""What cadtrain writes for DeepSpeed, against DeepSpeed itself."""

from __future__ import annotations

import json
import os
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from cadtrain.config.deepspeed_blocks import (
    AioBlock,
    Bf16Block,
    CometBlock,
    CommsLoggerBlock,
    CompileBlock,
    FolderMonitorBlock,
    Fp16Block,
    ThroughputTimerBlock,
    WandbBlock,
)
from cadtrain.config.deepspeed_config import build_deepspeed_config, deepspeed_config_for
from cadtrain.config.deepspeed_lint import OWNED, REMOVED, RENAMED, UNSUPPORTED
from cadtrain.config.deepspeed_reasons import REASONS, explain, flatten
from cadtrain.config.deepspeed_schema import DeepSpeedConfig
from cadtrain.config.deepspeed_zero import LeafModuleBlock, OffloadOptimizerBlock, OffloadParamBlock, ZeroBlock
from cadtrain.config.load import load_run_config
from cadtrain.config.schema import all_keys, fields_of
from cadtrain.config.yaml_source import dotted
from cadtrain.errors import UsageError

COMBINATIONS = [
    {"zero_stage": stage, "offload_optimizer": optimizer, "offload_parameters": parameters, "precision": precision}
    for stage, optimizer, parameters, precision in product((0, 1, 2, 3), (False, True), (False, True), ("bf16", "fp32"))
    if not (optimizer and stage == 0) and not (parameters and stage != 3)
]


@pytest.fixture(scope="module")
def deepspeed_config() -> Any:
    """DeepSpeed's own `runtime.config` module, on the CPU."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return pytest.importorskip("deepspeed.runtime.config")


@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_deepspeed_accepts_every_combination_and_drops_nothing(
    combination: dict[str, Any], deepspeed_config: Any
) -> None:
    written = build_deepspeed_config(world_size=1, **combination).to_dict()
    read = deepspeed_config.DeepSpeedConfig(json.loads(json.dumps(written)))
    assert read.train_batch_size == read.train_micro_batch_size_per_gpu == read.gradient_accumulation_steps == 1
    assert read.gradient_clipping == 1.0
    assert read.grad_accum_dtype == ("fp32" if combination["zero_stage"] else combination["precision"])
    assert read.bfloat16_config.enabled == (combination["precision"] == "bf16")
    assert read.keep_in_fp32_modules == ["inv_freq"]
    assert read.checkpoint_tag_validation_fail
    assert not read.load_universal_checkpoint
    assert not read.timers_config.enabled
    for name, value in written.items():
        if not isinstance(value, dict) and name != "communication_data_type":
            assert getattr(read, name) == value, name
    assert_same(written["zero_optimization"], read.zero_config)
    assert_same(written["bf16"], read.bfloat16_config)


def assert_same(written: dict[str, Any], read: BaseModel) -> None:
    """Every written value stands in the model that DeepSpeed made of it."""
    by_alias = read.model_dump(by_alias=True)
    for key, value in written.items():
        if isinstance(value, dict):
            for inner, inner_value in value.items():
                assert by_alias[key][inner] == inner_value, f"{key}.{inner}"
        else:
            assert by_alias[key] == value, key


@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_no_auto_no_null_and_a_reason_for_everything(combination: dict[str, Any]) -> None:
    config = build_deepspeed_config(world_size=4, **combination)
    for key, value, why in explain(config):
        assert value not in ("auto", None), key
        assert why == REASONS[key]
    assert DeepSpeedConfig.model_validate(config.to_dict()) == config


def test_every_reason_belongs_to_a_key_that_is_written() -> None:
    written = {
        key
        for combination in COMBINATIONS
        for key, _ in flatten(build_deepspeed_config(world_size=1, **combination).to_dict())
    }
    nvme = build_deepspeed_config(zero_stage=3, offload_optimizer=True, offload_parameters=True, nvme_path="/nvme")
    assert set(REASONS) == written | {key for key, _ in flatten(nvme.to_dict())}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"zero_stage": 4}, "stage 4 does not exist"),
        ({"zero_stage": -1}, "stage -1 does not exist"),
        ({"zero_stage": 0, "offload_optimizer": True}, "needs ZeRO stage 1, 2 or 3"),
        ({"zero_stage": 2, "offload_parameters": True}, "needs ZeRO stage 3"),
        ({"zero_stage": 2, "world_size": 0}, "0 GPUs"),
    ],
)
def test_combinations_that_deepspeed_has_not(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        build_deepspeed_config(**arguments)


def test_bucket_sizes_grow_with_the_model_and_stay_in_bounds() -> None:
    def zero(hidden_size: int, **more: Any) -> dict[str, Any]:
        return build_deepspeed_config(zero_stage=3, hidden_size=hidden_size, **more).to_dict()["zero_optimization"]

    tiny, small, large = zero(128), zero(2560), zero(8192)
    assert (
        tiny["reduce_bucket_size"] == tiny["stage3_prefetch_bucket_size"] == 1_000_000
    )  # a laptop holds no 1 GB buckets
    assert small["reduce_bucket_size"] == 12 * 2560**2
    assert small["stage3_prefetch_bucket_size"] == 24 * 2560**2
    assert small["stage3_param_persistence_threshold"] == 256_000
    assert (large["reduce_bucket_size"], large["stage3_prefetch_bucket_size"]) == (200_000_000, 500_000_000)
    assert zero(4096, layer_params=10_000_000)["reduce_bucket_size"] == 10_000_000
    assert zero(4096, prefetch_bucket_size=0)["stage3_prefetch_bucket_size"] == 0
    # An adapter of rank 32 on the widest linear layer (three times the hidden size) stays whole.
    assert zero(4096)["stage3_param_persistence_threshold"] > 32 * 3 * 4096


def test_a_runs_sections_reach_the_file(tmp_path: Path) -> None:
    theirs = tmp_path / "ds.json"
    theirs.write_text('{"comms_logger": {"enabled": true}, "zero_optimization": {"reduce_bucket_size": 5e6}}')
    run = load_run_config(
        "demo", ["optim.gradient_clipping=0.5", "zero.persistence_threshold=7", f"zero.config_file={theirs}"]
    ).config
    built = deepspeed_config_for(run, zero_stage=3, world_size=2, precision="fp32", hidden_size=160).to_dict()
    assert built["gradient_clipping"] == 0.5
    assert built["train_batch_size"] == 2
    assert built["comms_logger"] == {"enabled": True}
    assert built["zero_optimization"]["reduce_bucket_size"] == 5_000_000
    assert built["zero_optimization"]["stage3_param_persistence_threshold"] == 7


# The mirror against the original: a key that DeepSpeed adds, renames or removes shows here.


@pytest.mark.parametrize(
    ("ours", "module", "name", "left_out"),
    [
        (OffloadParamBlock, "runtime.zero.offload_config", "DeepSpeedZeroOffloadParamConfig", set()),
        (OffloadOptimizerBlock, "runtime.zero.offload_config", "DeepSpeedZeroOffloadOptimizerConfig", set()),
        (LeafModuleBlock, "runtime.zero.leaf_module_config", "DeepSpeedZeroLeafModuleConfig", set()),
        (Bf16Block, "runtime.precision_config", "DeepSpeedBF16Config", set()),
        (Fp16Block, "runtime.precision_config", "DeepSpeedFP16Config", set()),
        (CommsLoggerBlock, "comm.config", "CommsLoggerConfig", set()),
        (FolderMonitorBlock, "monitor.config", "TensorBoardConfig", set()),
        (FolderMonitorBlock, "monitor.config", "CSVConfig", set()),
        (WandbBlock, "monitor.config", "WandbConfig", set()),
        (CometBlock, "monitor.config", "CometConfig", set()),
        (CompileBlock, "compile.config", "CompileConfig", set()),
        (ThroughputTimerBlock, "utils.config", "DeepSpeedThroughputTimerConfig", set()),
        (ZeroBlock, "runtime.zero.config", "DeepSpeedZeroConfig", {"zenflow", "cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory",
                                                                  "stage3_gather_fp16_weights_on_model_save"}),
    ],
)  # fmt: skip
def test_blocks_mirror_deepspeed(
    ours: type[BaseModel], module: str, name: str, left_out: set[str], deepspeed_config: Any
) -> None:
    from importlib import import_module

    theirs = getattr(import_module(f"deepspeed.{module}"), name)
    assert set(fields_of(ours)) == set(fields_of(theirs)) - left_out
    for key, field in fields_of(ours).items():
        if ours is not LeafModuleBlock:  # DeepSpeed's default names its expert layers
            original = fields_of(theirs)[key].get_default(call_default_factory=True)
            mine = field.get_default(call_default_factory=True)
            assert key == "leaf_module" or mine == getattr(original, "value", original), key


def test_plain_blocks_mirror_deepspeed(deepspeed_config: Any) -> None:
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT

    assert AioBlock().model_dump() == AIO_DEFAULT_DICT


def test_removed_keys_are_deepspeeds(deepspeed_config: Any) -> None:
    top, zero = deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS, deepspeed_config._REMOVED_ZERO_CONFIG_KEYS
    assert set(REMOVED) == set(top) | {f"zero_optimization.{key}" for key in zero}


def test_the_tables_name_real_keys() -> None:
    known = {dotted(path) for path in all_keys(DeepSpeedConfig)}
    assert set(OWNED) <= known
    assert set(RENAMED.values()) <= known
    assert not (set(UNSUPPORTED) | set(REMOVED) | set(RENAMED)) & (known - {"data_types.param_dtype"})
