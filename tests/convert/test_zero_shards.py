"""Whole weights from real DeepSpeed shards equal the live ones, whatever the ZeRO stage and precision."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
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


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("count", [1, 3, 1000])
def test_pieces_are_the_whole_weight(deepspeed_checkpoints: Path, variant: str, count: int) -> None:
    """Pieces that begin and end inside a rank's part, at its edges, in its padding, and that are larger than the weight."""
    weights = ShardedWeights.open(deepspeed_checkpoints / variant / "global_step3")
    for name in weights:
        pieces = [piece.clone() for piece in weights.pieces(name, count)]
        assert max(piece.numel() for piece in pieces) <= count
        assert torch.equal(torch.cat(pieces), weights[name].flatten()), name


def test_values_read_twice_are_the_same(tmp_path: Path) -> None:
    """After the first time their pages are given back, and come in again from the file."""
    weight = torch.randn(3_000_000)
    folder = tmp_path / "engine"
    folder.mkdir()
    torch.save({"module": {"w": weight}, "buffer_names": [], "optimizer": None}, folder / "mp_rank_00_model_states.pt")
    weights = ShardedWeights.open(folder)
    for _ in range(2):
        assert torch.equal(weights["w"], weight)
        assert torch.equal(torch.cat([piece.clone() for piece in weights.pieces("w", 70_000)]), weight)


def test_a_weight_that_lies_scattered_in_its_file_is_put_in_order(tmp_path: Path) -> None:
    weight = torch.arange(24.0).view(4, 6)
    folder = tmp_path / "engine"
    folder.mkdir()
    torch.save({"module": {"w": weight.T}, "buffer_names": [], "optimizer": None}, folder / "mp_rank_00_model_states.pt")
    weights = ShardedWeights.open(folder)
    assert torch.equal(weights["w"], weight.T)
    assert torch.equal(torch.cat([piece.clone() for piece in weights.pieces("w", 5)]), weight.T.flatten())


def edited(folder: Path, name: str, edit: Callable[[dict], object]) -> Path:
    """`folder` with one shard changed."""
    content = torch.load(folder / name, weights_only=False)
    edit(content)
    torch.save(content, folder / name)
    return folder


def shape_lie(shape: object) -> Callable[[dict], object]:
    def edit(content: dict) -> None:
        next(group for group in content["param_shapes"] if "scale" in group)["scale"] = shape

    return edit


@pytest.mark.parametrize("variant", ["zero2-fp32", "zero3-fp32"])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (shape_lie(torch.Size([1 << 62])), "param_shapes give scale the shape"),
        (shape_lie((-5, -5)), "param_shapes give scale the shape"),
        (shape_lie((-1,)), "param_shapes give scale the shape"),
        (shape_lie(("a",)), "param_shapes give scale the shape"),
        (shape_lie(3), "param_shapes give scale the shape"),
        (shape_lie((1 << 40,)), "holds"),
        (lambda content: content["param_shapes"][-1].update(shift=(2,)), "param_shapes name shift twice"),
        (lambda content: content.update(param_shapes="none"), r"names no trained weights \(param_shapes\)"),
        (lambda content: content.update(param_shapes=[7]), "its param_shapes are no names and shapes"),
        (lambda content: content.update(dp_world_size=1 << 40), "claims to be of 1099511627776 ranks"),
        (lambda content: content.update(dp_world_size=-1), "claims to be of -1 ranks"),
        (lambda content: content.update(dp_world_size=60_000), r"of rank 2, 3, 4, 5, 6 and 59993 more are missing"),
        (lambda content: content["module"].update(odd="text"), "holds more than names and tensors"),
    ],
)
def test_shards_that_lie_about_sizes_are_refused(
    deepspeed_checkpoints: Path, tmp_path: Path, variant: str, edit: Callable[[dict], object], message: str
) -> None:
    """Before memory is asked for: nothing that a file claims is believed further than the file is long."""
    name = "mp_rank_00_model_states.pt" if variant == "zero2-fp32" else "zero_pp_rank_0_mp_rank_00_model_states.pt"
    folder = edited(copy_of(deepspeed_checkpoints, variant, tmp_path), name, edit)
    with pytest.raises(CheckpointError, match=message):
        ShardedWeights.open(folder)


@pytest.mark.parametrize("gaps", [[[-8] * 9, [0] * 9], "none", [[0]]])
def test_gaps_that_lie_are_refused(deepspeed_checkpoints: Path, tmp_path: Path, gaps: object) -> None:
    folder = copy_of(deepspeed_checkpoints, "zero2-fp32", tmp_path)
    edited(
        folder,
        "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        lambda content: content["optimizer_state_dict"].update(param_alignment_paddings=gaps),
    )
    with pytest.raises(CheckpointError, match="its gaps between"):
        ShardedWeights.open(folder)


def test_a_shard_that_is_a_link_out_of_its_folder_is_not_followed(deepspeed_checkpoints: Path, tmp_path: Path) -> None:
    folder, name = copy_of(deepspeed_checkpoints, "zero2-fp32", tmp_path), "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    (folder / name).rename(tmp_path / "elsewhere.pt")
    (folder / name).symlink_to(tmp_path / "elsewhere.pt")
    with pytest.raises(CheckpointError, match="is a link out of its folder") as caught:
        ShardedWeights.open(folder)
    assert "cp -rL" in str(caught.value)
