"""From a checkpoint to files and folders: which checkpoint is meant, what is written, what is refused."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from cadtrain.checkpoint.source import find_checkpoint
from cadtrain.checkpoint.weight_files import Entry, write_safetensors
from cadtrain.convert.placing import placed_file
from cadtrain.convert.service import convert_checkpoint
from cadtrain.convert.torch_file import write_bin
from cadtrain.errors import CheckpointError, EnvironmentFault, UsageError

from saved import finish  # isort: skip


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


def test_the_folders_of_a_trainer_are_known(deepspeed_checkpoints: Path, tmp_path: Path) -> None:
    """`transformers.Trainer`'s layout around real shards; that Trainer itself writes it so is shown in `test_trainer.py`."""
    for step in (3, 12):
        folder = tmp_path / "output" / f"checkpoint-{step}"
        shutil.copytree(deepspeed_checkpoints / "zero3-bf16" / "global_step3", folder / f"global_step{step}")
        (folder / "latest").write_text(f"global_step{step}")
        (folder / "rng_state_0.pth").write_bytes(b"not looked at")
    for source, step in (("output", 12), ("output/checkpoint-3", 3), ("output/checkpoint-3/global_step3", None)):
        assert find_checkpoint(tmp_path / source).step == step
    assert find_checkpoint(tmp_path / "output", step=3).shards.name == "global_step3"
    with pytest.raises(UsageError, match="has no checkpoint of step 4; there are 3, 12"):
        find_checkpoint(tmp_path / "output", step=4)


@pytest.mark.parametrize("latest", ["../outside/global_step3", "{root}/outside/global_step3", "global_step3/../../outside", "", "..", "x" * 9999])
def test_latest_leads_nowhere_out_of_its_folder(deepspeed_checkpoints: Path, tmp_path: Path, latest: str) -> None:
    for name in ("inside", "outside"):
        shutil.copytree(deepspeed_checkpoints / "zero2-fp32" / "global_step3", tmp_path / name / "global_step3")
    (tmp_path / "inside" / "latest").write_text(latest.format(root=tmp_path))
    with pytest.raises(UsageError, match="there are global_step3"):
        convert_checkpoint(tmp_path / "inside", tmp_path / "out.bin")


def test_a_checkpoint_that_is_a_link_out_of_its_folder_is_not_followed(run_dir: Path, deepspeed_checkpoints: Path, tmp_path: Path) -> None:
    root = run_dir / "checkpoints"
    (root / "step-00000007").rename(tmp_path / "elsewhere")
    (root / "step-00000007").symlink_to(tmp_path / "elsewhere")
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "global_step3").symlink_to(deepspeed_checkpoints / "zero2-fp32" / "global_step3")
    (plain / "latest").write_text("global_step3")
    for source in (run_dir, plain):
        with pytest.raises(CheckpointError, match=r"is a link to .*, out of its folder"):
            convert_checkpoint(source, tmp_path / "out.bin")


def test_a_shard_that_the_manifest_does_not_name_is_refused(run_dir: Path, tmp_path: Path) -> None:
    """Otherwise a file could be slipped in that nothing vouches for."""
    engine = run_dir / "checkpoints/step-00000007/engine"
    shutil.copy(engine / "zero_pp_rank_0_mp_rank_00_model_states.pt", engine / "extra.pt")
    with pytest.raises(CheckpointError, match=r"engine/extra\.pt: is not in the manifest"):
        convert_checkpoint(run_dir, tmp_path / "out.bin")


@pytest.mark.parametrize("target", ["out.bin", "out.safetensors", "out"])
@pytest.mark.parametrize("limit", [20_000, 200_000])
def test_a_file_that_cannot_grow_leaves_the_old_target(lora_run: tuple[Path, dict], tmp_path: Path, target: str, limit: int) -> None:
    """The kernel stops the write in the middle, as it does on a full disk, with its own error."""
    path = tmp_path / target
    convert_checkpoint(lora_run[0], path)
    before = {file.name: file.read_bytes() for file in (path.iterdir() if path.is_dir() else [path])}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(EnvironmentFault, match=r"could not be written: File too large\. What was there before is untouched"):
            convert_checkpoint(lora_run[0], path, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {file.name: file.read_bytes() for file in (path.iterdir() if path.is_dir() else [path])} == before
    assert [entry.name for entry in tmp_path.iterdir()] == [target]


def test_a_killed_conversion_leaves_the_old_target(lora_run: tuple[Path, dict], tmp_path: Path) -> None:
    path = tmp_path / "out.bin"
    path.write_text("mine")
    code = "import os, signal, sys; from pathlib import Path; from cadtrain.convert.service import convert_checkpoint\n"
    code += "kill = lambda doing, done, total: doing == 'converting' and done > total // 2 and os.kill(os.getpid(), signal.SIGKILL)\n"
    code += "convert_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), force=True, progress=kill)"
    done = subprocess.run([sys.executable, "-c", code, str(lora_run[0]), str(path)], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "mine"


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
    def broken() -> list[torch.Tensor]:
        raise CheckpointError("broken")

    entries = [Entry("a", torch.Size([3]), torch.float32, lambda: [torch.ones(3)]), Entry("b", torch.Size([2]), torch.float32, broken)]
    with pytest.raises(CheckpointError), placed_file(tmp_path / "out.bin") as temporary:
        write_bin(temporary, entries, written=lambda name, piece: None)
    assert list(tmp_path.iterdir()) == []


def test_files_of_odd_sizes_and_types(tmp_path: Path) -> None:
    values = {
        "flag": torch.tensor([True, False, True]), "half": torch.arange(3).half(), "count": torch.tensor(7),
        "none": torch.zeros(0, 4), "brain": torch.arange(5).bfloat16(), "wide": torch.arange(2).double(),
    }  # fmt: skip
    entries = [Entry(name, tensor.shape, tensor.dtype, lambda t=tensor: [t]) for name, tensor in values.items()]
    write_safetensors(tmp_path / "a.safetensors", entries, written=lambda name, piece: None)
    write_bin(tmp_path / "a.bin", entries, written=lambda name, piece: None)
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


def test_progress_says_what_is_done_and_ends_at_its_end(lora_run: tuple[Path, dict], tmp_path: Path) -> None:
    told: dict[str, list[tuple[int, int]]] = {}
    convert_checkpoint(
        lora_run[0], tmp_path / "out.bin", verify=True, progress=lambda doing, *counts: told.setdefault(doing, []).append(counts)
    )
    assert list(told) == ["checking files", "converting", "reading back"]
    for doing, counts in told.items():
        done = [row[0] for row in counts]
        assert done == sorted(done)
        assert counts[-1][0] == counts[-1][1] or doing == "reading back", "a file is more than its weights"


def test_command_line_of_folders(lora_run: tuple[Path, dict], tmp_path: Path) -> None:
    from cadtrain.cli.app import app

    source, target = str(lora_run[0]), tmp_path / "adapter"
    result = CliRunner().invoke(app, ["convert", source, str(target), "--adapter", "--verify"])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(target)
    assert "every weight in it is the one that was live" in result.stderr
    assert "are in projectors.safetensors" in result.stderr
    result = CliRunner().invoke(app, ["convert", source, str(tmp_path / "model"), "--max-shard-size", "100KB", "--json"])
    assert json.loads(result.stdout)["notes"] == []
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file()
    result = CliRunner().invoke(app, ["convert", source, str(tmp_path / "other"), "--max-shard-size", "much"])
    assert isinstance(result.exception, UsageError)
    assert result.exception.where == "--max-shard-size"


_MEASURED = """
import sys
from pathlib import Path
from cadtrain.convert.service import convert_checkpoint

def peak():
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith("VmHWM"))

convert_checkpoint(Path(sys.argv[1]), Path(sys.argv[3]))
before = peak()
convert_checkpoint(Path(sys.argv[2]), Path(sys.argv[3]), force=True)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and pages are given back on Linux only")
@pytest.mark.parametrize("target", ["out.bin", "out.safetensors"])
def test_memory_does_not_grow_with_a_weight(tmp_path: Path, target: str) -> None:
    """One weight of 256 MiB takes less than 32 MiB more than one of 4 bytes, pages of the mapped file included."""
    for name, numel in (("small", 1), ("large", 1 << 26)):
        (tmp_path / name).mkdir()
        content = {"module": {"w": torch.ones(numel)}, "buffer_names": [], "optimizer": None}
        torch.save(content, tmp_path / name / "mp_rank_00_model_states.pt")
    arguments = [str(tmp_path / "small"), str(tmp_path / "large"), str(tmp_path / target)]
    done = subprocess.run([sys.executable, "-c", _MEASURED, *arguments], capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) < 32 << 10, f"{int(done.stdout) >> 10} MiB more"
    assert (tmp_path / target).stat().st_size > 1 << 28


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
    facts = json.loads((target / "preprocessor_config.json").read_text())
    assert facts["codec"] == {"name": "compact", "version": 1}
    assert facts["image"] is None
    assert facts["point"]["channels"][3] == "normal_x"
    convert_checkpoint(source, tmp_path / "split", max_shard_bytes=100_000)
    assert len(list((tmp_path / "split").glob("model-*-of-*.safetensors"))) > 2
    again = CadMllm.from_pretrained(tmp_path / "split").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in opened.items())
    with pytest.raises(UsageError, match="cannot keep adapters apart"):
        convert_checkpoint(source, tmp_path / "other", merge_lora=False)
