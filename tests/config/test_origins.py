"""`--print-config`: every effective value with the place that it came from."""

from __future__ import annotations

from pathlib import Path

import pytest

from cadtrain.config.load import load_run_config, preset_names
from cadtrain.config.origins import annotated_yaml

OVERRIDES = (
    "batch.global_batch_size=32", "curriculum.text.duration=5", "optim={weight_decay: 0.1}",
    "curriculum.1.modalities={text: 1, text+point: 2}",
)  # fmt: skip


def origins(text: str) -> dict[str, list[str]]:
    """The comments behind each key, in order."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        body, mark, origin = line.partition(" # ")
        if mark:
            found.setdefault(body.strip(" -").partition(":")[0], []).append(origin.strip())
    return found


@pytest.mark.parametrize("name", preset_names())
def test_it_loads_back_equal(tmp_path: Path, name: str) -> None:
    loaded = load_run_config(name, OVERRIDES if name == "demo" else ())
    path = tmp_path / "effective.yaml"
    path.write_text(annotated_yaml(loaded))
    assert load_run_config(path).config == loaded.config


def test_each_value_says_where_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(annotated_yaml(load_run_config("demo")))
    lines = path.read_text().splitlines()
    found = origins(annotated_yaml(load_run_config(path, OVERRIDES)))
    assert found["global_batch_size"] == ["--set"]
    assert found["duration"][0] == "--set"
    assert found["weight_decay"] == ["--set"]
    assert found["eps"] == ["default"], "a section that is set as a whole says nothing of what it leaves out"
    assert found["text"][1] == found["text+point"][0] == "--set"
    place, _, number = found["hidden_size"][0].rpartition(":")
    assert place == str(path)
    assert "hidden_size" in lines[int(number) - 1]


def test_what_nobody_wrote_is_a_default() -> None:
    found = origins(annotated_yaml(load_run_config("demo")))
    assert found["keep_every"] == found["wandb"] == found["weight_decay"] == ["default"]
    assert all(origin.startswith("preset demo:") for origin in found["learning_rate"])
