"""Whole weights from real DeepSpeed shards equal the live ones, whatever the ZeRO stage and precision."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from cadtrain.checkpoint.zero_shards import ShardedWeights
from cadtrain.errors import CheckpointError

from make_checkpoints import VARIANTS  # isort: skip


def live_weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "live.pt", weights_only=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_converted_weights_equal_the_live_ones(deepspeed_checkpoints: Path, variant: str) -> None:
    folder = deepspeed_checkpoints / variant
    live = live_weights(folder)
    weights = ShardedWeights.open(folder / "global_step3")
    assert set(weights) == set(live)
    for name, expected in live.items():
        info, tensor = weights.info[name], weights[name]
        assert tensor.dtype == info.dtype
        # Training in bf16 goes on from the fp32 weights; what the model sees is their rounding.
        assert torch.equal(tensor.to(expected.dtype), expected), name
    kinds = {name: info.kind for name, info in weights.info.items()}
    assert {name for name, kind in kinds.items() if kind == "buffer"} == {"table", "index"}
    assert weights.info["head.weight"].alias_of == "embedding.weight"
    assert weights.info["hidden.weight"].dtype == torch.float32
    assert kinds["backbone.weight"] == "frozen" or variant == "zero0-fp32"
    assert weights["index"].dtype == torch.int64
    assert int(variant[4]) == weights.stage


@pytest.mark.parametrize("variant", ["zero0-bf16", "zero1-bf16", "zero2-bf16", "zero3-bf16"])
def test_bf16_checkpoints_give_more_than_bf16(deepspeed_checkpoints: Path, variant: str) -> None:
    weights = ShardedWeights.open(deepspeed_checkpoints / variant / "global_step3")
    for name in ("embedding.weight", "hidden.weight"):
        assert not torch.equal(weights[name], weights[name].bfloat16().float()), name


def copy_of(deepspeed_checkpoints: Path, variant: str, target: Path) -> Path:
    return Path(shutil.copytree(deepspeed_checkpoints / variant / "global_step3", target / "engine"))


@pytest.mark.parametrize(
    ("variant", "name", "message"),
    [
        ("zero3-bf16", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", "optim_states of rank 1 are missing"),
        ("zero3-bf16", "zero_pp_rank_1_mp_rank_00_model_states.pt", "model_states of rank 1 are missing"),
        ("zero2-fp32", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "optim_states of rank 0 are missing"),
        ("zero2-fp32", "mp_rank_00_model_states.pt", "no DeepSpeed model states"),
    ],
)
def test_missing_files_are_named(deepspeed_checkpoints: Path, tmp_path: Path, variant: str, name: str, message: str) -> None:
    folder = copy_of(deepspeed_checkpoints, variant, tmp_path)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=message):
        ShardedWeights.open(folder)


def test_files_of_more_ranks_are_refused(deepspeed_checkpoints: Path, tmp_path: Path) -> None:
    folder = copy_of(deepspeed_checkpoints, "zero2-fp32", tmp_path)
    name = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
    shutil.copy(folder / name.format(1), folder / name.format(2))
    with pytest.raises(CheckpointError, match=r"saved by 2 ranks, but zero_pp_rank_2"):
        ShardedWeights.open(folder)


def test_a_cut_file_is_named(deepspeed_checkpoints: Path, tmp_path: Path) -> None:
    folder = copy_of(deepspeed_checkpoints, "zero2-fp32", tmp_path)
    path = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(CheckpointError, match="zero_pp_rank_1"):
        ShardedWeights.open(folder)


@pytest.mark.parametrize(("variant", "key"), [("zero2-fp32", "single_partition_of_fp32_groups"), ("zero3-fp32", "fp32_flat_groups")])
def test_values_must_add_up(deepspeed_checkpoints: Path, tmp_path: Path, variant: str, key: str) -> None:
    folder = copy_of(deepspeed_checkpoints, variant, tmp_path)
    path = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = torch.load(path, weights_only=False)
    rows = content["optimizer_state_dict"][key]
    rows[-1] = rows[-1][:-9]
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="holds"):
        ShardedWeights.open(folder)


class Hostile:
    """Runs a command when it is unpickled by a reader that allows it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, (f"touch {self.marker}",))


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"])
def test_a_hostile_file_is_refused_and_runs_nothing(deepspeed_checkpoints: Path, tmp_path: Path, name: str) -> None:
    folder = copy_of(deepspeed_checkpoints, "zero2-fp32", tmp_path)
    marker = tmp_path / "ran"
    content = torch.load(folder / name, weights_only=False)
    torch.save({**content, "extra": Hostile(marker)}, folder / name)
    with pytest.raises(CheckpointError, match="refused") as caught:
        ShardedWeights.open(folder)
    assert name in str(caught.value)
    assert not marker.exists()
