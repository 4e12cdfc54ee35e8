"""From a checkpoint to files and folders: which checkpoint is meant, what is written, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from cadtrain.checkpoint.manifest import Manifest, record_files
from cadtrain.checkpoint.source import find_checkpoint
from cadtrain.config.load import load_run_config, to_yaml
from cadtrain.config.sections import RunConfig
from cadtrain.convert.service import convert_checkpoint
from cadtrain.convert.write_file import Entry, write_bin, write_safetensors
from cadtrain.errors import CheckpointError, UsageError


def finish(folder: Path, step: int, config: RunConfig | None = None, precision: str = "bf16") -> Path:
    """Make a checkpoint of ours of a folder that holds `engine/`."""
    if config is not None:
        (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "state.json").write_text("{}")
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    Manifest(step, 2, 2, precision, {}, record_files(folder, names)).write(folder)
    return folder


@pytest.fixture
def run_dir(deepspeed_checkpoints: Path, tmp_path: Path) -> Path:
    """A run with two checkpoints: step 3 by ZeRO-2 and step 7 by ZeRO-3, the newer named by `latest`."""
    root = tmp_path / "run" / "checkpoints"
    for step, variant in ((3, "zero2-bf16"), (7, "zero3-bf16")):
        folder = root / f"step-{step:08d}"
        shutil.copytree(deepspeed_checkpoints / variant / "global_step3", folder / "engine")
        finish(folder, step)
    (root / "latest").write_text("step-00000007\n")
    return root.parent


def test_every_way_to_name_a_checkpoint(run_dir: Path, deepspeed_checkpoints: Path) -> None:
    newest = run_dir / "checkpoints" / "step-00000007"
    for source in (run_dir, run_dir / "checkpoints", newest, newest / "engine"):
        found = find_checkpoint(source)
        assert (found.shards, found.step) == (newest / "engine", 7), source
    assert find_checkpoint(run_dir, step=3).step == 3
    plain = find_checkpoint(deepspeed_checkpoints / "zero1-bf16")
    assert (plain.shards.name, plain.step, plain.manifest) == ("global_step3", 3, None)
    (run_dir / "checkpoints" / "latest").write_text("../../etc")
    assert find_checkpoint(run_dir).step == 7


def test_what_is_no_checkpoint_is_said(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        find_checkpoint(tmp_path / "none")
    with pytest.raises(UsageError, match="there are 3, 7"):
        find_checkpoint(run_dir, step=5)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UsageError, match="holds no checkpoint"):
        find_checkpoint(empty)
    unfinished = run_dir / "checkpoints" / "step-00000007"
    (unfinished / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="never finished"):
        find_checkpoint(unfinished)


@pytest.mark.parametrize("name", ["out.bin", "out.safetensors"])
def test_a_file_holds_the_exact_weights(run_dir: Path, deepspeed_checkpoints: Path, tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    result = convert_checkpoint(run_dir, target)
    state = torch.load(target, weights_only=True) if target.suffix == ".bin" else load_file(target)
    live = torch.load(deepspeed_checkpoints / "zero3-bf16" / "live.pt", weights_only=True)
    for key, value in state.items():
        assert torch.equal(value.to(live[key].dtype), live[key]), key
    assert state["hidden.weight"].dtype == torch.float32
    assert state["index"].dtype == torch.int64
    assert (result.step, result.zero_stage, result.num_ranks) == (7, 3, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["run", name])
    if target.suffix == ".bin":
        assert state["head.weight"].data_ptr() == state["embedding.weight"].data_ptr()
    else:
        assert "head.weight" not in state
        with safe_open(target, "pt") as file:
            assert file.metadata()["head.weight"] == "embedding.weight"


def test_parameters_are_cast_and_buffers_are_not(run_dir: Path, tmp_path: Path) -> None:
    convert_checkpoint(run_dir, tmp_path / "out.bin", dtype="bf16")
    state = torch.load(tmp_path / "out.bin", weights_only=True)
    assert {state["hidden.weight"].dtype, state["backbone.weight"].dtype} == {torch.bfloat16}
    assert state["table"].dtype == torch.float32


def test_an_existing_target_stays_without_force(run_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    target.write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        convert_checkpoint(run_dir, target)
    assert target.read_text() == "mine"
    convert_checkpoint(run_dir, target, force=True)
    assert len(torch.load(target, weights_only=True)) == 13


def test_a_changed_shard_does_not_verify_and_leaves_no_file(run_dir: Path, tmp_path: Path) -> None:
    shard = run_dir / "checkpoints/step-00000007/engine/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"does not verify: engine/bf16_zero_pp_rank_1.*differs"):
        convert_checkpoint(run_dir, tmp_path / "out.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> torch.Tensor:
        raise CheckpointError("broken")

    entries = [Entry("a", torch.Size([3]), torch.float32, lambda: torch.ones(3)), Entry("b", torch.Size([2]), torch.float32, broken)]
    with pytest.raises(CheckpointError):
        write_bin(tmp_path / "out.bin", entries, progress=lambda count: None)
    assert list(tmp_path.iterdir()) == []


def test_files_of_odd_sizes_and_types(tmp_path: Path) -> None:
    values = {
        "flag": torch.tensor([True, False, True]), "half": torch.arange(3).half(), "count": torch.tensor(7),
        "none": torch.zeros(0, 4), "brain": torch.arange(5).bfloat16(), "wide": torch.arange(2).double(),
    }  # fmt: skip
    entries = [Entry(name, tensor.shape, tensor.dtype, lambda t=tensor: t) for name, tensor in values.items()]
    write_safetensors(tmp_path / "a.safetensors", entries, progress=lambda count: None)
    write_bin(tmp_path / "a.bin", entries, progress=lambda count: None)
    for state in (load_file(tmp_path / "a.safetensors"), torch.load(tmp_path / "a.bin", weights_only=True)):
        assert set(state) == set(values)
        for name, tensor in values.items():
            assert state[name].dtype == tensor.dtype
            assert torch.equal(state[name], tensor)


def test_command_line(run_dir: Path, tmp_path: Path) -> None:
    from cadtrain.cli.app import app

    result = CliRunner().invoke(app, ["convert", str(run_dir), str(tmp_path / "out.bin"), "--step", "3", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["step"] == 3
    assert (tmp_path / "out.bin").is_file()


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint of a tiny real model with adapters, as ZeRO-0 writes it, and the live weights."""
    from cadtrain.cad.codec import get_codec
    from cadtrain.model.build import build_model
    from cadtrain.model.tokenizer import build_tokenizer

    overrides = ["model.language.lora={rank: 4, alpha: 8}", "model.image=null", "model.point=null", "curriculum=[]"]
    stage = "curriculum=[{name: text, duration: 1, modalities: {text: 1.0}}]"
    config = load_run_config("demo", [*overrides[:3], stage]).config
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
    finish(folder, 1, config, precision="fp32")
    return folder, {name: tensor.clone() for name, tensor in state.items()}


def test_adapters_stay_apart_in_a_file_and_are_merged_when_asked(lora_run: tuple[Path, dict], tmp_path: Path) -> None:
    source, live = lora_run
    convert_checkpoint(source, tmp_path / "apart.bin")
    apart = torch.load(tmp_path / "apart.bin", weights_only=True)
    assert set(apart) == set(live)
    result = convert_checkpoint(source, tmp_path / "merged.safetensors", merge_lora=True)
    merged = load_file(tmp_path / "merged.safetensors")
    assert result.merged_lora
    assert not [name for name in merged if "lora" in name or "base_layer" in name]
    name = next(name for name in live if name.endswith("q_proj.base_layer.weight"))
    stem = name.removesuffix(".base_layer.weight")
    up, down = live[f"{stem}.lora_B.default.weight"], live[f"{stem}.lora_A.default.weight"]
    torch.testing.assert_close(merged[f"{stem}.weight"], live[name] + 2.0 * up @ down)


def test_a_folder_opens_with_from_pretrained(lora_run: tuple[Path, dict], tmp_path: Path) -> None:
    from cadtrain.model.cad_mllm import CadMllm

    source, _ = lora_run
    target = tmp_path / "model"
    convert_checkpoint(source, target)
    convert_checkpoint(source, tmp_path / "merged.bin", merge_lora=True)
    merged = torch.load(tmp_path / "merged.bin", weights_only=True)
    opened = CadMllm.from_pretrained(target).state_dict()
    assert set(opened) == set(merged)
    for name, tensor in opened.items():
        assert torch.equal(tensor, merged[name]), name
    with pytest.raises(UsageError, match="exists already"):
        convert_checkpoint(source, target)
    convert_checkpoint(source, target, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged.bin", "model"]
    with pytest.raises(UsageError, match="cannot keep adapters apart"):
        convert_checkpoint(source, tmp_path / "other", merge_lora=False)
