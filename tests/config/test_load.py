"""Configurations as people write them: what loads, and what every fault says."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cadtrain.config.load import load_run_config, preset_names, to_yaml
from cadtrain.config.sections import MODALITY_SETS, RunConfig
from cadtrain.errors import ConfigError, Fault, UsageError
from cadtrain.units import Duration

SMALL = """\
model:
  language:
    config: {model_type: qwen3}
  point:
    width: 96
    num_heads: 4
curriculum:
  - name: text
    duration: 10 steps
    modalities: {text: 1.0}
  - name: cloud
    duration: 1 epoch
    modalities: {text: 0.3, text+point: 0.7}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def faults_of(source: Path | str | None, *overrides: str) -> tuple[Fault, ...]:
    with pytest.raises(ConfigError) as caught:
        load_run_config(source, overrides)
    return caught.value.faults


def only_fault(source: Path | str | None, *overrides: str) -> Fault:
    (fault,) = faults_of(source, *overrides)
    return fault


def test_no_source_is_the_demo() -> None:
    loaded = load_run_config()
    assert loaded.source == "preset demo"
    assert loaded.config.name == "demo"


def test_a_file_is_loaded_and_its_places_are_known(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL)
    loaded = load_run_config(path)
    assert [stage.name for stage in loaded.config.curriculum] == ["text", "cloud"]
    assert loaded.config.curriculum[0].duration == Duration(10)
    assert loaded.where("curriculum.0.duration") == f"{path}:9 curriculum.0.duration"
    assert loaded.where("data.path") == f"{path}:1 data.path"  # not written: the nearest thing that is


def test_a_preset_wins_over_a_file_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text(SMALL)
    assert load_run_config("demo").source == "preset demo"
    assert load_run_config("./demo").config.name == "run"
    assert load_run_config(Path("demo")).config.name == "run"


def test_loading_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, SMALL)
    monkeypatch.chdir(tmp_path)
    load_run_config(path, ["data.path=nowhere/at/all"])
    assert [item.name for item in tmp_path.iterdir()] == ["run.yaml"]


# What is wrong, where, the value found, what to do.


@pytest.mark.parametrize(
    ("line", "where", "words"),
    [
        ("bathc: {}", "14 bathc", ["unknown key", "Did you mean `batch`?"]),
        ("global_batch_size: 3", "14 global_batch_size", ["Did you mean `batch.global_batch_size`?"]),
        (
            "batch: {global_batch_size: many}",
            "14 batch.global_batch_size",
            ["found 'many'", "a whole number, at least 1"],
        ),
        ("batch: {global_batch_size: 0}", "14 batch.global_batch_size", ["found 0", "at least 1"]),
        ("batch: {global_batch_size: 1.5}", "14 batch.global_batch_size", ["found 1.5", "a whole number"]),
        ("batch: {global_batch_size: true}", "14 batch.global_batch_size", ["found true", "a number"]),
        ("batch: 3", "14 batch", ["found 3", "a section with keys"]),
        ("precision: fp8", "14 precision", ["'fp8'", "one of auto, bf16, fp32"]),
        ("zero: {stage: 4}", "14 zero.stage", ["found 4", "one of auto, 0, 1, 2, 3"]),
        ("logging: {wandb: maybe}", "14 logging.wandb", ["'maybe'", "true or false"]),
        ("optim: {betas: [0.9]}", "14 optim.betas", ["a list of 2 values"]),
        ("optim: {betas: [0.9, x]}", "14 optim.betas.1", ["'x'"]),
        ("checkpoint: {every: 5 parsecs}", "14 checkpoint.every", ["'5 parsecs' is no duration", "20 steps"]),
        ("checkpoint: {every: 1e20 steps}", "14 checkpoint.every", ["longer than any run"]),
        ("optim: {eps: .inf}", "14 optim.eps", ["found inf", "a number"]),
        ("seed: 99999999999", "14 seed", ["less than 4294967296"]),
        ("name: a name", "14 name", ["'a name'", "matching"]),
        ("batch: {micro_batch_tokens: 512}", "14 batch.micro_batch_tokens", ["512", "4096", "one pack"]),
        ("batch: {}\nbatch: {}", "15 batch", ["written twice, first on line 14"]),
        ("data: {path: !!python/name:os.system x}", "14 data.path", ["cannot be read"]),
        ("zero: {offload_parameters: true, stage: 2}", "14 zero", ["offload_parameters needs stage 3, found 2"]),
        ("<<: {seed: 3}", "14", ["merge key"]),
    ],
)
def test_each_fault_has_place_value_and_remedy(tmp_path: Path, line: str, where: str, words: list[str]) -> None:
    path = write(tmp_path, SMALL + line + "\n")
    fault = only_fault(path)
    assert fault.where == f"{path}:{where}"
    for word in words:
        assert word in str(fault)


@pytest.mark.parametrize(
    ("old", "new", "where", "words"),
    [
        ("duration: 10 steps", "duration: 10 minutes", "9 curriculum.0.duration", ["every rank ends it together"]),
        ("duration: 10 steps", "duration: 0", "9 curriculum.0.duration", ["more than 0"]),
        ("duration: 10 steps", "durations: 10", "8 curriculum.0.duration", ["missing"]),
        (
            "duration: 10 steps",
            "duration: 10 steps\n    warmup: 11",
            "10 curriculum.0.warmup",
            ["11 steps is longer", "duration is 10 steps", "at most 10 steps"],
        ),
        ("text+point: 0.7", "point+text: 0.7", "13 curriculum.1.modalities.point+text", ["Write `text+point`."]),
        ("text+point: 0.7", "text+cloud: 0.7", "13 curriculum.1.modalities.text+cloud", ["Known are text, point"]),
        ("text+point: 0.7", "text+image: 0.7", "13 curriculum.1.modalities.text+image", ["model.image is null"]),
        ("{text: 1.0}", "{text: 0}", "10 curriculum.0.modalities", ["at least one probability above 0"]),
        ("{text: 1.0}", "{text: -1}", "10 curriculum.0.modalities.text", ["must not be negative"]),
        ("name: cloud", "name: text", "11 curriculum.1.name", ["'text' is already the name of stage 0"]),
        ("num_heads: 4", "num_heads: 5", "4 model.point", ["width 96 is not a multiple of num_heads 5"]),
        ("config: {model_type: qwen3}", "config: {}", "2 model.language", ["needs a `model_type`"]),
        ("config: {model_type: qwen3}", "tokenizer: bytes", "2 model.language", ["exactly one of"]),
    ],
)
def test_faults_inside_and_between_sections(tmp_path: Path, old: str, new: str, where: str, words: list[str]) -> None:
    path = write(tmp_path, SMALL.replace(old, new))
    found = faults_of(path)
    chosen = [fault for fault in found if fault.where == f"{path}:{where}"]
    assert chosen, [str(fault) for fault in found]
    for word in words:
        assert word in str(chosen[0])


def test_all_faults_come_at_once_in_the_order_of_lines(tmp_path: Path) -> None:
    text = SMALL.replace("duration: 10 steps", "duration: soon").replace("text+point: 0.7", "text+image: 0.7")
    path = write(tmp_path, text + "bathc: {}\nbatch: {micro_batch_tokens: 100}\nseed: -1\n")
    places = [fault.where.removeprefix(f"{path}:") for fault in faults_of(path, "optim.eps=0", "nonsense")]
    assert places == [
        "9 curriculum.0.duration",
        "13 curriculum.1.modalities.text+image",
        "14 bathc",
        "15 batch.micro_batch_tokens",
        "16 seed",
        "--set nonsense",
        "--set optim.eps",
    ]


def test_faulty_stages_are_told_by_themselves(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL[: SMALL.index("  - name: cloud")].replace("10 steps", "soon"))
    assert only_fault(path).where == f"{path}:9 curriculum.0.duration"
    path = write(tmp_path, SMALL[: SMALL.index("curriculum:")] + "curriculum: []\n")
    assert str(only_fault(path)).startswith(f"{path}:7 curriculum: found none, expected at least one.")


def test_a_fault_that_hangs_on_a_faulty_value_stays_silent(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL + "batch: {micro_batch_tokens: 512}\ndata: {max_sample_tokens: few}\n")
    assert only_fault(path).where.endswith("data.max_sample_tokens")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["the file is empty"]),
        ("# only a comment\n", ["the file is empty"]),
        ("- a\n- b\n", ["found a list", "model:"]),
        ("just a text", ["found 'just a text'"]),
        ("model: [}", ["not readable as YAML", "1 | model: [}", "^"]),
        ("model:\n\tx: 3", ["Indent with spaces", "2 | →x: 3"]),
        ("a: 1\n---\nb: 2\n", ["not readable as YAML"]),
        ("seed: &x [*x]\n", ["an alias that contains itself"]),
        ("seed: *nowhere\n", ["not readable as YAML"]),
        ("seed: 'open\n", ["not readable as YAML"]),
        ("? [a, b]\n: 3\n", ["a key must be a word"]),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, words: list[str]) -> None:
    found = " ".join(str(fault) for fault in faults_of(write(tmp_path, text)))
    for word in words:
        assert word in found


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("run.yml", "run.yaml"),
        ("demo.yaml", "`demo`"),
        ("full_8b_h200", "`full_8b_h200x4`"),
        ("zzz", "Presets: demo"),
        ("no/such/folder.yaml", "Presets: demo"),
    ],
)
def test_a_missing_file_names_what_is_near(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, hint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, SMALL)
    with pytest.raises(UsageError, match="no such configuration") as caught:
        load_run_config(name)
    assert hint in (caught.value.hint or "")


def test_folders_and_binary_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(SMALL)
    with pytest.raises(UsageError, match="is a folder") as caught:
        load_run_config(tmp_path)
    assert "config.yaml" in (caught.value.hint or "")
    (tmp_path / "x.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="UTF-8"):
        load_run_config(tmp_path / "x.bin")


# --set


def test_overrides_are_read_as_yaml_and_the_last_wins(tmp_path: Path) -> None:
    loaded = load_run_config(
        write(tmp_path, SMALL),
        [
            "seed=1",
            "seed=2",
            "data.path=some/where",
            "curriculum.0.duration=20",
            "curriculum.cloud.duration=2 epochs",
            "curriculum.1.modalities={text: 1, point: 1}",
            "model.language.config.hidden_size=64",
            "model.language.lora.rank=8",
            "optim.betas=[0.9, 0.99]",
        ],
    )
    config = loaded.config
    assert (config.seed, config.data.path) == (2, Path("some/where"))
    assert [stage.duration for stage in config.curriculum] == [Duration(20), Duration(2, "epochs")]
    assert config.curriculum[1].modalities == {"text": 1, "point": 1}
    assert config.model.language.config == {"model_type": "qwen3", "hidden_size": 64}
    assert config.model.language.lora is not None
    assert config.model.language.lora.rank == 8
    assert config.optim.betas == (0.9, 0.99)
    assert loaded.where("data.path") == "--set data.path"


@pytest.mark.parametrize(
    ("assignment", "where", "words"),
    [
        ("seed", "--set seed", ["no `=`", "--set key.path=value"]),
        ("=3", "--set =3", ["no `=`"]),
        ("sed=3", "--set sed", ["unknown key", "Did you mean `seed`?"]),
        ("dat.path=x", "--set dat.path", ["Did you mean `data`?"]),
        ("batch.global_batch=3", "--set batch.global_batch", ["Did you mean `global_batch_size`?"]),
        ("batch.global_batch_size=x", "--set batch.global_batch_size", ["found 'x'", "a whole number"]),
        ("batch={global_batch_size: x}", "--set batch (batch.global_batch_size)", ["found 'x'"]),
        (
            "curriculum.7.duration=3",
            "--set curriculum.7.duration",
            ["names none of the 2 items", "0 to 1", "text, cloud"],
        ),
        ("curriculum.clod.duration=3", "--set curriculum.clod.duration", ["Did you mean `cloud`?"]),
        ("model.point.width.x=3", "--set model.point.width.x", ["inside a single value (96)"]),
        ("data.path=[", "--set data.path:1", ["not readable as YAML"]),
        ("seed=", "--set seed", ["found null"]),
    ],
)
def test_a_wrong_override_is_told_by_its_key(tmp_path: Path, assignment: str, where: str, words: list[str]) -> None:
    fault = only_fault(write(tmp_path, SMALL), assignment)
    assert fault.where.split(" (")[0] == where.split(" (")[0]
    for word in words:
        assert word in str(fault)


# The effective configuration.


@pytest.mark.parametrize("name", preset_names())
def test_presets_load_back_equal(name: str, tmp_path: Path) -> None:
    config = load_run_config(name).config
    assert load_run_config(write(tmp_path, to_yaml(config))).config == config


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rate=st.floats(1e-9, 1e3),
    steps=st.integers(1, 10**7),
    unit=st.sampled_from(["steps", "epochs"]),
    instruction=st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=40),
    chances=st.dictionaries(st.sampled_from(["text", "point", "text+point"]), st.floats(0.01, 5), min_size=1),
)
def test_any_configuration_survives_its_yaml(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    rate: float,
    steps: int,
    unit: str,
    instruction: str,
    chances: dict[str, float],
) -> None:
    stage = {"name": "one", "duration": f"{steps} {unit}", "modalities": chances, "learning_rate": rate}
    config = RunConfig.model_validate(
        {
            "seed": seed,
            "model": {"language": {"config": {"model_type": "qwen3"}}, "point": {}},
            "data": {"instruction": instruction},
            "curriculum": [stage],
        }
    )
    path = write(tmp_path_factory.mktemp("yaml"), to_yaml(config))
    assert load_run_config(path).config == config


def test_every_modality_set_is_spelled_canonically() -> None:
    order = ["text", "point", "image"]
    assert all(key.split("+") == sorted(key.split("+"), key=order.index) for key in MODALITY_SETS)


def test_every_codec_of_a_configuration_exists() -> None:
    from typing import get_args

    from cadtrain.cad import get_codec
    from cadtrain.config.sections import CodecName

    assert [get_codec(name).name for name in get_args(CodecName)] == list(get_args(CodecName))


def test_an_adapter_on_rows_that_learn_by_themselves_is_refused() -> None:
    targets = "model.language.lora={target_modules: [q_proj, lm_head]}"
    assert load_run_config("demo", [targets]).config.data.codec == "compact"
    with pytest.raises(ConfigError, match="found lm_head, whose rows for the added tokens learn without an adapter"):
        load_run_config("demo", [targets, "data.codec=tokens"])
