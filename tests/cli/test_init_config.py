"""`cadtrain init-config` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cadtrain.cli.app import main
from cadtrain.config.deepspeed_schema import DeepSpeedConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "deepspeed"


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


def call(*arguments: str, code: int = 0) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["init-config", *arguments])
    assert caught.value.code == code


def written(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "stage", "optimizer", "parameters"),
    [
        ([], 3, False, False),
        (["--offload"], 3, True, True),
        (["--zero", "3", "--offload"], 3, True, True),
        (["--zero", "2", "--offload"], 2, True, False),
        (["--zero", "1"], 1, False, False),
        (["--zero", "0"], 0, False, False),
    ],
)
def test_stdout_is_the_file(
    arguments: list[str], stage: int, optimizer: bool, parameters: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    call(*arguments)
    values = written(capsys)
    zero = values["zero_optimization"]
    assert (zero["stage"], "offload_optimizer" in zero, "offload_param" in zero) == (stage, optimizer, parameters)
    assert '"auto"' not in json.dumps(values)
    assert "train_batch_size" not in values
    DeepSpeedConfig.model_validate(values)


def test_gpus_write_the_batch_size(capsys: pytest.CaptureFixture[str]) -> None:
    call("--gpus", "4")
    assert written(capsys)["train_batch_size"] == 4


def test_files_are_written_whole_and_never_overwritten_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ds.json"
    call("--out", str(path))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert str(path) in captured.err
    first = path.read_text()
    call("--zero", "1", "--out", str(path), code=2)
    assert "--force" in capsys.readouterr().err
    assert path.read_text() == first
    call("--zero", "1", "--out", str(path), "--force", "--json")
    assert written(capsys) == {"written": str(path)}
    assert json.loads(path.read_text())["zero_optimization"]["stage"] == 1
    assert [item.name for item in tmp_path.iterdir()] == ["ds.json"]


@pytest.mark.parametrize("out", ["no/such/folder/ds.json", "."])
def test_places_that_cannot_be_written(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    call("--out", out, code=2)
    assert "Traceback" not in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--zero", "4"], "--zero"),
        (["--zero", "-1"], "--zero"),
        (["--zero", "x"], "--zero"),
        (["--gpus", "0"], "--gpus"),
        (["--gpus", "-2"], "--gpus"),
        (["--hidden-size", "0"], "--hidden-size"),
        (["--zero", "0", "--offload"], "needs ZeRO stage 1, 2 or 3"),
        (["--precision", "fp16"], "fp16"),
        (["extra"], "extra"),
    ],
)
def test_wrong_arguments_are_told_cleanly(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    call(*arguments, code=2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert "Traceback" not in captured.err


def test_explain_gives_a_reason_for_every_value(capsys: pytest.CaptureFixture[str]) -> None:
    call("--explain", "--json")
    rows = json.loads(capsys.readouterr().out)
    assert all(row["why"] for row in rows)
    call("--explain")
    table = capsys.readouterr().out
    assert "stage3_prefetch_bucket_size" in table
    assert max(len(line) for line in table.splitlines()) <= 100


def test_check_lists_findings_and_fails_on_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "theirs.json"
    path.write_text('{\n"gradient_cliping": 1.0,\n"zero_optimization": {"overlap_comm": false}\n}')
    call("--check", str(path), code=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"error   {path}:2 gradient_cliping: unknown key")
    assert lines[1].startswith(f"warning {path}:3 zero_optimization.overlap_comm")
    assert lines[2] == "1 error, 1 warning."
    call("--check", str(path), "--json", code=2)
    report = written(capsys)
    assert (report["errors"], report["warnings"], len(report["findings"])) == (1, 1, 2)
    path.write_text('{"zero_optimization": {"stage": 2}}')
    call("--check", str(path))
    assert "nothing to mend" in capsys.readouterr().out


def test_check_of_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("--check", str(tmp_path / "none.json"), code=2)
    assert "no such DeepSpeed file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ds_zero2_config.json", ["--zero", "2"]),
        ("ds_zero3_config.json", ["--zero", "3"]),
        ("ds_zero3_offload.json", ["--zero", "3", "--offload"]),
    ],
)
def test_the_files_in_configs_are_its_output(
    name: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    call(*arguments)
    command = f"cadtrain init-config {' '.join(arguments)} --out configs/deepspeed/{name} --force"
    assert capsys.readouterr().out == (CONFIGS / name).read_text(encoding="utf-8"), command


QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
}  # fmt: skip


def test_auto_takes_the_lowest_stage_that_fits_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "config.json"
    model.write_text(json.dumps(QWEN3_8B))
    stages = []
    for memory in ("48GB", "80GB", "141GB"):
        call("--zero", "auto", "--model", str(model), "--gpus", "4", "--gpu-memory", memory)
        said = capsys.readouterr()
        stages.append(json.loads(said.out)["zero_optimization"]["stage"])
        assert f"ZeRO-{stages[-1]}: " in said.err
    assert stages == [3, 2, 1]
    call("--model", str(model))
    bucket = written(capsys)["zero_optimization"]["stage3_prefetch_bucket_size"]
    call("--hidden-size", "4096")
    assert bucket != written(capsys)["zero_optimization"]["stage3_prefetch_bucket_size"], "the layer's true size counts"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--zero", "auto"), "auto needs --model and --gpus and --gpu-memory"),
        (("--offload-to", "disk:/x"), "cpu, or nvme:PATH"),
        (("--zero", "2", "--offload-to", "nvme:/x"), "offload to NVMe needs ZeRO stage 3, found stage 2"),
        (("--model", "no/such.json"), "cannot be read"),
    ],
)
def test_what_does_not_go_together(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], text: str) -> None:
    call(*arguments, code=2)
    assert text in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_offload_to_nvme(capsys: pytest.CaptureFixture[str]) -> None:
    call("--offload-to", "nvme:/local")
    zero = written(capsys)["zero_optimization"]
    assert zero["offload_param"]["device"] == zero["offload_optimizer"]["device"] == "nvme"
    assert zero["offload_param"]["nvme_path"] == "/local"


def test_the_schema_knows_every_key_and_refuses_others(capsys: pytest.CaptureFixture[str]) -> None:
    call("--schema")
    schema = written(capsys)
    assert set(schema["properties"]) == set(DeepSpeedConfig.model_fields)
    assert schema["additionalProperties"] is False
    assert schema["properties"]["gradient_clipping"]["description"].startswith("Global gradient norm")
    zero = schema["properties"]["zero_optimization"]
    assert "ZeroBlock" in json.dumps(zero)
    assert "stage3_prefetch_bucket_size" in schema["$defs"]["ZeroBlock"]["properties"]
