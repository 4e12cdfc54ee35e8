"""The presets: what people read is what the package carries, and each introduces itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from cadtrain.config.batch_plan import plan_batches
from cadtrain.config.load import load_run_config, preset_names, read_preset
from cadtrain.errors import UsageError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_the_demo_comes_first() -> None:
    assert preset_names()[0] == "demo"


def test_configs_holds_copies_of_the_presets() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(preset_names())
    for name in preset_names():
        assert (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8") == read_preset(name), (
            f"copy presets/{name}.yaml to configs/"
        )


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_says_what_it_is_and_how_it_starts(name: str) -> None:
    text = read_preset(name)
    head = text[: text.index("\n\n")]
    assert head.startswith(f"# {name}: ")
    for heading in ("# What it is", "# Hardware", "# Command"):
        assert heading in head
    assert load_run_config(name).config.name == name


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_can_be_planned(name: str) -> None:
    config = load_run_config(name).config
    plan = plan_batches(
        config, world_size=4, num_samples=config.data.synth.count if config.data.path is None else 400_000
    )
    assert [stage.name for stage in plan.stages] == ["text", "text_point", "text_point_image"]


def test_an_unknown_preset_names_the_known() -> None:
    with pytest.raises(UsageError, match="no preset") as caught:
        read_preset("dmo")
    assert "demo" in (caught.value.hint or "")
