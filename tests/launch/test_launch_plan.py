"""What a launch decides: devices, ZeRO stage, the launcher's command, the run folder."""

from __future__ import annotations

import base64
import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cadtrain.config.load import to_yaml
from cadtrain.errors import ConfigError, EnvironmentFault, UsageError
from cadtrain.gpu_memory import allocator_share
from cadtrain.launch import devices, planning
from cadtrain.launch.devices import Gpu, choose_devices, find_gpus, parse_gpus, select_visible
from cadtrain.launch.environment import clean_arch_list, environment_changes
from cadtrain.launch.failure import RankExit, first_failure
from cadtrain.launch.folder import hold, prepare_run_dir
from cadtrain.launch.planning import LaunchRequest, plan_launch
from cadtrain.ui.launch import plan_table

GIB = 2**30
INSTALLED = tuple(Gpu(str(i), f"GPU-{i}{i}aa-bb", "Test GPU", 80 * GIB, 79 * GIB) for i in range(4))


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_gpus_from_nvml", lambda: INSTALLED)


@pytest.fixture
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_gpus_from_nvml", lambda: ())


@pytest.mark.parametrize(
    ("mask", "ids"),
    [
        ("0,1", ["0", "1"]),
        ("3, 1", ["3", "1"]),
        ("GPU-22aa-bb,GPU-00aa-bb", ["2", "0"]),
        ("GPU-3", ["3"]),
        ("0,9,1", ["0"]),
        ("0,0", ["0"]),
        ("MIG-5f1e,MIG-77aa", ["MIG-5f1e", "MIG-77aa"]),
    ],
)
def test_visible_devices_mask(mask: str, ids: list[str]) -> None:
    assert [gpu.id for gpu in select_visible(INSTALLED, mask)] == ids


@pytest.mark.usefixtures("four_gpus")
def test_an_empty_mask_hides_every_gpu() -> None:
    assert len(find_gpus({})) == 4
    assert find_gpus({"CUDA_VISIBLE_DEVICES": ""}) == ()
    assert find_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == ()
    assert find_gpus({"DS_ACCELERATOR": "cpu"}) == ()


def test_number_of_ranks() -> None:
    assert choose_devices(INSTALLED, None).num_ranks == 4
    assert choose_devices(INSTALLED, 2).ids == ["0", "1"]
    assert choose_devices((), None).num_ranks == 2
    assert choose_devices((), 4).ids == ["-1"] * 4
    with pytest.raises(EnvironmentFault, match="9 GPUs were asked for, 4 are visible"):
        choose_devices(INSTALLED, 9)
    with pytest.raises(EnvironmentFault, match="cannot run on MIG-5f1e"):
        choose_devices(select_visible(INSTALLED, "MIG-5f1e"), None)


def test_gpus_by_number_index_and_uuid() -> None:
    assert [parse_gpus(text) for text in (None, "auto", "3")] == [None, None, 3]
    assert parse_gpus("0,2,3") == ("0", "2", "3")
    assert parse_gpus("2,") == ("2",)
    assert choose_devices(INSTALLED, parse_gpus("3,GPU-11")).ids == ["3", "1"]
    for text, words in (("0", "0 ranks"), ("0,x", "'x' is no GPU"), ("1,1", "named twice"), ("-1", "no GPU")):
        with pytest.raises(UsageError, match=words):
            parse_gpus(text)
    for text, words in (("0,7", "GPU 7 is not visible; visible: 0 "), ("3,GPU-33", "GPU-33 is named twice"), ("GPU-", "several")):
        with pytest.raises(EnvironmentFault, match=words):
            choose_devices(INSTALLED, parse_gpus(text))
    with pytest.raises(EnvironmentFault, match="visible: none"):
        choose_devices((), ("0",))


@pytest.mark.usefixtures("four_gpus")
def test_nccls_flight_recorder_writes_into_the_runs_logs(tmp_path: Path) -> None:
    environment = plan_launch(LaunchRequest(run_dir=tmp_path / "run"), environ={}).environment
    assert environment["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert environment["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] == str(tmp_path / "run" / "logs" / "nccl_trace_rank_")
    assert "TORCH_NCCL_TRACE_BUFFER_SIZE" not in plan_launch(LaunchRequest(), environ={"TORCH_NCCL_TRACE_BUFFER_SIZE": "0"}).environment


@pytest.mark.usefixtures("no_gpus")
def test_command_on_a_machine_without_gpu(tmp_path: Path) -> None:
    plan = plan_launch(LaunchRequest(gpus=4, zero="3", run_dir=tmp_path / "run"), environ={})
    argv = list(plan.argv)
    assert argv[1:4] == ["-u", "-m", "deepspeed.launcher.launch"]
    world = json.loads(base64.urlsafe_b64decode(argv[4].removeprefix("--world_info=")))
    assert world == {"localhost": ["-1"] * 4}
    assert "--no_local_rank" in argv
    assert argv[argv.index("--module") + 1 :] == ["cadtrain", "train", "--run-dir", str(tmp_path / "run")]
    assert plan.config.zero.stage == 3
    assert plan.environment["DS_ACCELERATOR"] == "cpu"
    assert plan.environment["LOCAL_SIZE"] == "4"
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_gpus")
def test_what_the_ranks_would_refuse_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    # 512 parts are at most 32 steps an epoch, and the stage has 60.
    faulty = ("curriculum.text_point.warmup=5 epochs", "batch.global_batch_size=3")
    request = LaunchRequest(gpus=4, overrides=faulty, run_dir=tmp_path / "run")
    with pytest.raises(ConfigError) as caught:
        plan_launch(request, environ={})
    few, long = caught.value.faults
    assert str(few) == "batch.global_batch_size: 3 samples a step leave some of 4 ranks without one. Use at least 4, or fewer ranks."
    assert long.where == "curriculum.1.warmup"
    assert "5 epochs is longer than stage 'text_point', whose duration is 60 steps" in long.message
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("four_gpus")
def test_user_settings_stay_and_visible_devices_are_passed_on() -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "GPU-33aa-bb,1", "NCCL_DEBUG": "INFO", "TORCH_CUDA_ARCH_LIST": "8.0;9.0a"}
    plan = plan_launch(LaunchRequest(), environ=environ)
    # DeepSpeed's ranks read the variable as whole numbers.
    assert plan.devices.ids == ["3", "1"]
    assert plan.environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert "NCCL_DEBUG" not in plan.environment
    assert plan.environment["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0"
    assert plan.environment["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert "LOCAL_SIZE" not in plan.environment


def test_arch_list_suffixes() -> None:
    assert clean_arch_list("9.0a") == "9.0"
    assert clean_arch_list("8.0 9.0 9.0a 10.0a+PTX") == "8.0;9.0;10.0+PTX"
    assert "TORCH_CUDA_ARCH_LIST" not in environment_changes(choose_devices(INSTALLED, 1), {"TORCH_CUDA_ARCH_LIST": "9.0"})


@pytest.mark.usefixtures("no_gpus")
def test_offload_sets_both_switches_in_stage_3_only() -> None:
    assert plan_launch(LaunchRequest(zero="3", offload=True), environ={}).config.zero.offload_parameters
    second = plan_launch(LaunchRequest(zero="2", offload=True), environ={}).config.zero
    assert (second.offload_optimizer, second.offload_parameters) == (True, False)


@pytest.mark.usefixtures("no_gpus")
def test_run_folder_rules(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(UsageError, match="no run to resume"):
        plan_launch(LaunchRequest(run_dir=run, resume=True), environ={})
    with pytest.raises(UsageError, match="needs the run folder"):
        plan_launch(LaunchRequest(resume=True), environ={})

    first = plan_launch(LaunchRequest(run_dir=run, overrides=("seed=7",)), environ={})
    prepare_run_dir(run, to_yaml(first.config), {})
    with pytest.raises(UsageError, match="already holds a run"):
        plan_launch(LaunchRequest(run_dir=run), environ={})
    resumed = plan_launch(LaunchRequest(run_dir=run, resume=True, overrides=("checkpoint.every=5",)), environ={})
    assert resumed.config.seed == 7
    assert resumed.argv[-1] == "--resume"
    prepare_run_dir(run, to_yaml(resumed.config), {})
    assert "seed: 7" in (run / "config.1.yaml").read_text()
    assert "every: 5 steps" in (run / "config.yaml").read_text()


def test_a_folder_is_held_by_one_launcher(tmp_path: Path) -> None:
    with hold(tmp_path), pytest.raises(UsageError, match="another"), hold(tmp_path):
        pass
    with hold(tmp_path):
        pass


def test_first_failure_orders_kills_and_messages(tmp_path: Path) -> None:
    def write(rank: int, time: float, kind: str = "RuntimeError") -> None:
        record = {"rank": rank, "time": time, "type": kind, "message": f"from {rank}", "exit_code": 4}
        (tmp_path / f"rank_{rank:02d}.error.json").write_text(json.dumps(record))

    assert first_failure(tmp_path, [RankExit(0, 0, 1.0)], 0) is None
    write(0, 100.0)
    write(2, 99.0)
    failure = first_failure(tmp_path, [RankExit(0, 4, 100.0)], 4)
    assert failure is not None
    assert failure.message == "from 2"
    killed = first_failure(tmp_path, [RankExit(1, -signal.SIGKILL, 99.1)], 247)
    assert killed is not None
    assert (killed.rank, killed.exit_code) == (1, 137)
    late = first_failure(tmp_path, [RankExit(0, 4, 100.0), RankExit(1, -signal.SIGTERM, 130.0)], 4)
    assert late is not None
    assert late.rank == 2


def test_a_folded_signal_of_the_launcher_is_unfolded(tmp_path: Path) -> None:
    failure = first_failure(tmp_path, [], 256 - signal.SIGSEGV)
    assert failure is not None
    assert (failure.type, failure.exit_code) == ("SIGSEGV", 128 + signal.SIGSEGV)


@pytest.mark.usefixtures("no_gpus")
def test_dry_run_prints_the_command_and_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cadtrain.cli.app import app

    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["launch", "--gpus", "4", "--zero", "3", "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert (plan["num_ranks"], plan["zero_stage"], plan["device"]) == (4, 3, "cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_gpus")
def test_deepspeeds_launcher_runs_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cadtrain.launch.start import start

    worker = tmp_path / "launch_test_worker.py"
    worker.write_text(
        "import os, sys\n"
        "assert os.environ['WORLD_SIZE'] == '2' and os.environ['MASTER_PORT'] and os.environ['LOCAL_RANK']\n"
        "assert os.path.isfile(os.path.join(sys.argv[sys.argv.index('--run-dir') + 1], 'config.yaml'))\n"
        "sys.exit(7 if os.environ['RANK'] == '1' else 0)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    plan = plan_launch(LaunchRequest(gpus=2, run_dir=tmp_path / "run"), worker=("launch_test_worker",))
    assert start(plan).exit_code == 7
    record = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert record["num_ranks"] == 2
    assert "torch" in record["versions"]


def test_free_port_is_free() -> None:
    assert 1024 <= planning.free_port() <= 65535


@pytest.mark.usefixtures("no_gpus")
def test_a_run_goes_on_only_with_the_codec_that_its_model_learnt(tmp_path: Path) -> None:
    """Refused before the run's configuration is replaced; a checkpoint that says nothing is left to the ranks."""

    run, state = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00000003" / "state.json"
    first = plan_launch(LaunchRequest(run_dir=run, overrides=("data.codec=tokens",)), environ={})
    prepare_run_dir(run, to_yaml(first.config), {})
    change = LaunchRequest(run_dir=run, resume=True, overrides=("data.codec=compact",))
    assert plan_launch(change, environ={}).config.data.codec == "compact"  # nothing learnt yet
    state.parent.mkdir(parents=True)
    for text in ("{", "[]", '{"codec": 3}', '{"codec": ""}', "{}"):
        state.write_text(text)
        assert plan_launch(change, environ={}).config.data.codec == "compact"
    state.write_text('{"codec": "tokens 1"}')
    with pytest.raises(UsageError, match=r"is compact, but the model of .*run learnt to write tokens") as caught:
        plan_launch(change, environ={})
    assert caught.value.where == "data.codec"
    assert plan_launch(LaunchRequest(run_dir=run, resume=True), environ={}).config.data.codec == "tokens"


@pytest.mark.usefixtures("four_gpus")
def test_predicted_peak_stands_beside_the_gpus_memory(tmp_path: Path) -> None:
    plan = plan_launch(LaunchRequest(gpus=2, zero="auto", run_dir=tmp_path / "run"), environ={})
    assert plan.zero.stage == 0
    assert plan.as_json()["predicted_peak_bytes"] == plan.zero.peak_bytes
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(plan_table(plan))
    row = next(line for line in console.export_text().splitlines() if line.startswith("memory"))
    assert row.split("memory")[1].strip().endswith("GiB of 80.0 GiB a GPU predicted at the peak")


@pytest.mark.usefixtures("four_gpus")
def test_a_cap_stands_for_a_smaller_gpu(tmp_path: Path) -> None:
    """Everything that looks at the GPUs sees it, and the ranks are told."""
    config, environ = str(run_of_8b(tmp_path / "c")), {"CADTRAIN_GPU_MEMORY": "40GiB"}
    whole, capped = (plan_launch(LaunchRequest(config=config, gpus=2), environ=found) for found in ({}, environ))
    assert {gpu.memory_total for gpu in whole.devices.gpus} == {80 * GIB}
    assert {(gpu.memory_total, gpu.memory_free) for gpu in capped.devices.gpus} == {(40 * GIB, 40 * GIB)}
    assert "CADTRAIN_GPU_MEMORY" not in whole.environment
    assert capped.environment["CADTRAIN_GPU_MEMORY"] == str(40 * GIB)
    assert capped.zero.peak_bytes is not None
    assert whole.zero.peak_bytes is not None
    assert capped.zero.peak_bytes <= 40 * GIB < whole.zero.peak_bytes
    assert {gpu.memory_total for gpu in find_gpus({"CADTRAIN_GPU_MEMORY": "200GB"})} == {80 * GIB}


@pytest.mark.usefixtures("four_gpus")
def test_where_nothing_fits_the_optimizer_goes_to_host_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "available_memory", lambda: 500 * GIB)
    config, environ = str(run_of_8b(tmp_path / "c")), {"CADTRAIN_GPU_MEMORY": "40GiB"}
    whole = LaunchRequest(config=config, overrides=("model.language.lora=null",))
    plan = plan_launch(whole, environ=environ)
    assert plan.zero.fits
    assert plan.config.zero.offload_optimizer
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(plan_table(plan))
    assert "optimizer in host memory" in (text := console.export_text())
    assert "steps through host memory are slow" in text
    monkeypatch.setattr(planning, "available_memory", lambda: 50 * GIB)
    assert not plan_launch(whole, environ=environ).config.zero.offload_optimizer


def test_the_allocators_share_leaves_room_for_the_context() -> None:
    assert allocator_share(80 * GIB, {}) is None
    assert allocator_share(80 * GIB, {"CADTRAIN_GPU_MEMORY": "48GiB"}) == pytest.approx((48 - 2.2) / 80)
    assert allocator_share(80 * GIB, {"CADTRAIN_GPU_MEMORY": "96GiB"}) == 1


@pytest.mark.parametrize(("text", "message"), [("48", "less than the 2.2 GiB"), ("2GB", "less than the 2.2 GiB"), ("many", "'many' is no size")])
def test_a_cap_that_is_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        find_gpus({"CADTRAIN_GPU_MEMORY": text, "CUDA_VISIBLE_DEVICES": ""})
    assert caught.value.where == "CADTRAIN_GPU_MEMORY"


def run_of_8b(folder: Path) -> Path:
    """A configuration of an 8B model with adapters whose stages need different memory."""
    folder.mkdir()
    path = folder / "run.yaml"
    path.write_text(
        """
name: dial
model:
  language:
    config: {model_type: qwen3, hidden_size: 4096, intermediate_size: 12288, num_hidden_layers: 36,
      num_attention_heads: 32, num_key_value_heads: 8, head_dim: 128, vocab_size: 151936}
    lora: {rank: 32}
  point: {trainable: true}
curriculum:
  - {name: text, duration: 20 steps, modalities: {text: 1.0}}
  - {name: points, duration: 20 steps, modalities: {text+point: 1.0}}
batch: {micro_batch_tokens: 8192}
"""
    )
    return path


def shown(plan: planning.LaunchPlan, row: str) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(plan_table(plan))
    return next(line for line in console.export_text().splitlines() if line.startswith(row)).split(row, 1)[1].strip()


@pytest.mark.usefixtures("four_gpus")
def test_recomputation_is_decided_before_ranks_start_and_a_resumed_run_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = tmp_path / "run", str(run_of_8b(tmp_path / "config"))
    small = tuple(Gpu(gpu.id, gpu.uuid, gpu.name, 44 * GIB, 43 * GIB) for gpu in INSTALLED)
    monkeypatch.setattr(devices, "_gpus_from_nvml", lambda: small)
    first = plan_launch(LaunchRequest(config=config, gpus=2, run_dir=run), environ={})
    layers = first.config.model.recompute
    assert isinstance(layers, tuple)
    assert 0 < layers[0] < layers[1] < 36
    assert shown(first, "recompute") == f"text {layers[0]}, points {layers[1]} of 36 layers"
    assert first.as_json()["recompute"] == layers
    prepare_run_dir(run, to_yaml(first.config), {})
    monkeypatch.setattr(devices, "_gpus_from_nvml", lambda: INSTALLED)
    resumed = plan_launch(LaunchRequest(run_dir=run, resume=True, gpus=2), environ={})
    assert resumed.config.model == first.config.model
    again = plan_launch(LaunchRequest(run_dir=run, resume=True, gpus=2, overrides=("model.recompute=auto",)), environ={})
    assert again.config.model.recompute != layers


@pytest.mark.usefixtures("no_gpus")
@pytest.mark.parametrize(
    ("setting", "decided", "text"),
    [("auto", "none", "none"), ("full", "full", "every layer"), ("3", 3, "the first 3 layers"), ("[1, 3]", (1, 3), "text 1, points 3 layers")],
)
def test_recomputation_on_the_cpu(setting: str, decided: object, text: str, tmp_path: Path) -> None:
    config = str(run_of_8b(tmp_path / "config"))
    overrides = (f"model.recompute={setting}",)
    plan = plan_launch(LaunchRequest(config=config, gpus=2, run_dir=tmp_path / "run", overrides=overrides), environ={})
    assert plan.config.model.recompute == decided
    assert shown(plan, "recompute") == text


@pytest.mark.usefixtures("no_gpus")
def test_cpu_ranks_load_no_torch_to_be_planned(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from cadtrain.launch.planning import LaunchRequest, plan_launch;"
        f"plan = plan_launch(LaunchRequest(gpus=2, run_dir=Path({str(tmp_path / 'run')!r})), environ={{'DS_ACCELERATOR': 'cpu'}});"
        "assert plan.zero.peak_bytes is None and plan.zero.stage == 2; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
