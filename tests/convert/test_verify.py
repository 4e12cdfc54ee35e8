"""`--verify`: what the ranks held, what came out of the shards, and what lies in the files are compared.

That hashes of real engines agree with their shards is shown in `tests/train/test_run.py` and `test_reshard.py`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cadtrain.checkpoint.weight_files import entries_of, write_safetensors
from cadtrain.checkpoint.weight_sums import LiveSpan, write_sums
from cadtrain.checkpoint.zero_shards import ShardedWeights
from cadtrain.convert.service import convert_checkpoint
from cadtrain.convert.torch_file import write_bin
from cadtrain.convert.verify import WrittenHashes
from cadtrain.errors import CheckpointError

from saved import finish, save_sums  # isort: skip


def changed(lora_run: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, live: dict[str, torch.Tensor]) -> Path:
    """The checkpoint as a run would have left it whose live weights were `live`."""
    folder = tmp_path / "step-00000001"
    shutil.copytree(lora_run[0], folder)
    save_sums(folder / "engine", live)
    return finish(folder, 1, precision="fp32")


@pytest.mark.parametrize("options", [{}, {"dtype": "bf16"}, {"merge_lora": True}])
@pytest.mark.parametrize("name", ["out.bin", "out.safetensors"])
def test_live_weights_verify(lora_run: tuple[Path, dict], tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    assert convert_checkpoint(lora_run[0], tmp_path / name, verify=True, **options).verified


@pytest.mark.parametrize("options", [{}, {"max_shard_bytes": 100_000}, {"adapter": True}])
def test_folders_verify(lora_run: tuple[Path, dict], tmp_path: Path, options: dict[str, Any]) -> None:
    assert convert_checkpoint(lora_run[0], tmp_path / "out", verify=True, **options).verified


@pytest.mark.parametrize("target", ["out.bin", "out.safetensors", "out"])
def test_one_value_that_was_not_live_is_found(lora_run: tuple[Path, dict], tmp_path: Path, target: str) -> None:
    live = dict(lora_run[1])
    name = next(name for name in live if name.endswith("lora_B.default.weight"))
    live[name] = live[name].clone()
    live[name].view(torch.int32).view(-1)[5] ^= 1
    source = changed(lora_run, tmp_path, live)
    with pytest.raises(CheckpointError, match="differs from the live weight") as caught:
        convert_checkpoint(source, tmp_path / target, verify=True)
    assert name in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    convert_checkpoint(source, tmp_path / target)


def test_two_weights_that_changed_places_are_found(lora_run: tuple[Path, dict], tmp_path: Path) -> None:
    live = dict(lora_run[1])
    one, other = [name for name in live if name.endswith("q_proj.lora_B.default.weight")][:2]
    live[one], live[other] = live[other], live[one]
    with pytest.raises(CheckpointError, match="differs from the live weight"):
        convert_checkpoint(changed(lora_run, tmp_path, live), tmp_path / "out.bin", verify=True)


def test_weights_that_are_missing_or_left_over_are_named(lora_run: tuple[Path, dict], tmp_path: Path) -> None:
    live = dict(lora_run[1])
    name = next(name for name in live if "down_proj.base_layer" in name)
    live["other.weight"] = live.pop(name)
    with pytest.raises(CheckpointError, match="is in the shards but not in the hashes") as caught:
        convert_checkpoint(changed(lora_run, tmp_path, live), tmp_path / "out.bin", verify=True)
    assert name in str(caught.value)


def test_a_checkpoint_without_hashes_says_so(deepspeed_checkpoints: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no hashes of the live weights"):
        convert_checkpoint(deepspeed_checkpoints / "zero2-bf16", tmp_path / "out.bin", verify=True)


@pytest.mark.parametrize("name", ["a.bin", "a.safetensors"])
@pytest.mark.parametrize("damage", ["bit", "name"])
def test_a_file_that_is_not_what_was_written_is_found(tmp_path: Path, name: str, damage: str) -> None:
    path, hashes = tmp_path / name, WrittenHashes()
    weights = {"first": torch.arange(1000.0), "second": -torch.arange(500.0)}
    write = write_bin if path.suffix == ".bin" else write_safetensors
    write(path, entries_of(weights), written=hashes.add)
    hashes.compare([path])
    data = path.read_bytes()
    values = weights["second"].numpy().tobytes()
    at = data.index(values)
    data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] if damage == "bit" else data.replace(b"second", b"zecond")
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="1 weights came back otherwise than they were written, the first is second"):
        hashes.compare([path])


def test_spans_of_a_live_weight_may_be_of_any_ranks(lora_run: tuple[Path, dict], tmp_path: Path) -> None:
    """A checkpoint of one rank verifies against hashes that three ranks would have left."""
    folder = tmp_path / "step-00000001"
    shutil.copytree(lora_run[0], folder)
    weights = ShardedWeights.open(folder / "engine")
    for rank in range(3):
        spans = []
        for name in (name for name, info in weights.info.items() if info.alias_of is None):
            flat = weights[name].view(-1)
            share = -(-flat.numel() // 3)
            spans.append(LiveSpan(name, flat.numel(), rank * share, flat[rank * share : (rank + 1) * share]))
        write_sums(folder / "engine", rank, spans)
    finish(folder, 1, precision="fp32")
    assert convert_checkpoint(folder, tmp_path / "out.bin", verify=True).verified
