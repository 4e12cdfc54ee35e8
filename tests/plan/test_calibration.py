"""What a measured step leaves for later plans."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cadtrain.cli.app import app, main
from cadtrain.cli.calibrate import result_of
from cadtrain.cli.worst_step import WorstStep
from cadtrain.config.load import load_run_config
from cadtrain.config.recompute import Recompute
from cadtrain.config.sections import RunConfig
from cadtrain.errors import EnvironmentFault
from cadtrain.plan.calibration import FILE_NAME, Corrections, Measured, calibrate, corrections_for, sharing_of
from cadtrain.plan.memory import Choice, RankMemory
from cadtrain.plan.predict import predict
from cadtrain.plan.rates import gpu_named
from cadtrain.plan.stage import choose_stage
from cadtrain.plan.worst_pack import worst_pack
from cadtrain.train.worst_step import MeasuredMemory

GIB = 2**30
PREDICTED = RankMemory(
    weights=16 * GIB, gradients=GIB, optimizer=3 * GIB, activations=40 * GIB, buckets=GIB, gathered=0, reserve=4 * GIB, context=GIB
)  # fmt: skip
MEASURED = Measured(held=21 * GIB, allocated=62 * GIB, reserved=64 * GIB, context=2 * GIB)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CADTRAIN_CACHE", str(tmp_path))
    return tmp_path


def demo(stage: int) -> RunConfig:
    return load_run_config("demo", [f"zero.stage={stage}", "precision=bf16"]).config


def step_on_h200(config: RunConfig, choice: Choice, *, factor: float) -> WorstStep:
    """A step of the demo that took `factor` times what was predicted, 1 % of it in reserve, and 3 GiB outside."""
    pack = worst_pack(config, 2, 141 * 10**9)
    memory = pack.option.memory
    held = round(factor * (memory.weights + memory.gradients + memory.optimizer))
    peak = round(factor * memory.allocated)
    rank = MeasuredMemory(
        has_allocator=True, setup=0, setup_reserved=0, held=held, passes=peak, update=held, reserved=round(1.01 * peak),
        outside=3 * GIB - 1000, device_total=0, seconds={},
    )  # fmt: skip
    smaller = replace(rank, passes=peak // 2, reserved=peak // 2, outside=GIB)
    return WorstStep(config, "NVIDIA H200", 2, choice, pack, (smaller, rank), driver_bytes=1000, seconds=9.0)


def test_the_measured_choice_is_met_and_others_take_what_holds_for_them() -> None:
    choice = Choice(2, recompute=Recompute((36,), 36))
    found = calibrate("key", choice, PREDICTED, MEASURED, num_ranks=2, tokens=8192)
    known = Corrections({found.sharing: found})
    met = known.memory(choice, PREDICTED)
    assert met.allocated == pytest.approx(MEASURED.allocated, abs=8)
    assert met.allocated + met.reserve == pytest.approx(MEASURED.reserved, abs=8)
    assert met.context == MEASURED.context
    # Without recomputation states and passes are corrected likewise; another stage keeps its own.
    assert known.memory(Choice(2), PREDICTED) == met
    other = known.memory(Choice(3), PREDICTED)
    assert (other.allocated, other.context) == (PREDICTED.allocated, MEASURED.context)
    assert other.reserve == pytest.approx(PREDICTED.allocated * 2 / 62)
    assert Corrections({}).memory(choice, PREDICTED) == PREDICTED


def test_plans_and_launches_on_like_hardware_are_corrected(cache: Path) -> None:
    config, gpu = demo(2), gpu_named("H200")
    plain = predict(config, 2, gpu.memory_bytes, gpu)
    result = result_of(step_on_h200(config, Choice(2), factor=1.25))
    assert result.path == cache / FILE_NAME
    assert result.corrected.allocated + result.corrected.reserve == pytest.approx(result.measured.reserved, rel=1e-6)
    for device, factor in (("NVIDIA H200", 1.25), ("H200", 1.25), ("H100", 1.0), ("", 1.0)):
        plan = predict(config, 2, gpu.memory_bytes, gpu, device=device)
        for before, after in zip(plain.options, plan.options, strict=True):
            scale = factor if sharing_of(before.choice) == "ZeRO-2" else 1.0
            assert after.memory.allocated == pytest.approx(scale * before.memory.allocated, rel=1e-3)
            assert after.memory.context == (3 * GIB if factor > 1 else before.memory.context)
        assert bool(plan.corrections.newest) == (factor > 1)
    peaks = [choose_stage(config, 2, gpu.memory_bytes, device=name).peak_bytes for name in ("NVIDIA H200", "NVIDIA H100")]
    assert None not in peaks
    assert peaks[0] != peaks[1]
    # One rank has no NCCL, and another model other shapes.
    assert not predict(config, 1, gpu.memory_bytes, gpu, device="H200").corrections.records


def test_a_choice_that_was_measured_again_replaces_its_record_alone(cache: Path) -> None:
    for stage, factor in ((2, 1.25), (3, 1.5), (2, 1.1)):
        result = result_of(step_on_h200(demo(stage), Choice(stage), factor=factor))  # type: ignore[arg-type]
    records = corrections_for(result.calibration.key).records
    assert {name: round(record.states, 2) for name, record in records.items()} == {"ZeRO-2": 1.1, "ZeRO-3": 1.5}


def test_what_does_not_fit_any_more_is_said() -> None:
    config, gpu = demo(2), gpu_named("H200")
    option = next(o for o in predict(config, 2, gpu.memory_bytes, gpu).options if sharing_of(o.choice) == "ZeRO-2")
    result_of(step_on_h200(config, option.choice, factor=2.0))
    tight = option.memory.total + 1
    assert choose_stage(config, 2, tight).fits
    assert not choose_stage(config, 2, tight, device="H200").fits


def test_figures_that_are_far_apart_are_no_correction() -> None:
    far = replace(MEASURED, allocated=150 * GIB, reserved=151 * GIB)
    with pytest.raises(EnvironmentFault, match="passes of the measured step took 3"):
        calibrate("key", Choice(2), PREDICTED, far, num_ranks=2, tokens=8192)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"key": []}', '{"key": {"ZeRO-2": {"of": "another version"}}}'])
def test_a_damaged_file_is_as_none(cache: Path, text: str) -> None:
    (cache / FILE_NAME).write_text(text)
    assert not corrections_for("key").records


def test_no_other_gpu_can_be_named() -> None:
    result = CliRunner().invoke(app, ["plan", "--calibrate", "--gpu", "H100"])
    assert "--calibrate measures this machine's GPUs" in f"{result.output}{result.exception}"


@pytest.mark.slow
def test_a_step_is_measured_with_real_ranks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("cadtrain.launch.devices._gpus_from_nvml", lambda: ())
    with pytest.raises(SystemExit) as caught:
        main(["plan", "demo", "--gpus", "2", "--zero", "3", "--calibrate", "--json"])
    assert caught.value.code == 0
    found = json.loads(capsys.readouterr().out)["measured_step"]
    assert found["kept_in"] is None
    assert found["num_ranks"] == 2
    sizes = found["bytes"]["allocated"]
    assert sizes["predicted"] == pytest.approx(sizes["measured"], rel=0.08)
    assert sizes["corrected"] == pytest.approx(sizes["measured"], rel=1e-6)
