"""A run's counters on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cadtrain.errors import CheckpointError
from cadtrain.train.state import TrainState


def test_it_reads_back_equal(tmp_path: Path) -> None:
    state = TrainState(step=12, samples=96, tokens=5000, target_tokens=900, skipped_steps=1, elapsed_seconds=3.25)
    (tmp_path / "state.json").write_text(json.dumps(state.to_json()))
    assert TrainState.read(tmp_path) == state


def test_fields_of_a_later_version_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({**TrainState(step=3).to_json(), "new": 1}))
    assert TrainState.read(tmp_path) == TrainState(step=3)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "null", '{"step": 3}'])
def test_what_is_no_state_names_the_file(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match="is not a training state") as caught:
        TrainState.read(tmp_path)
    assert caught.value.where == str(tmp_path / "state.json")


def test_a_state_from_before_there_were_codecs_is_of_the_compact_one(tmp_path: Path) -> None:
    raw = TrainState(step=3).to_json()
    del raw["codec"]
    (tmp_path / "state.json").write_text(json.dumps(raw))
    assert TrainState.read(tmp_path).codec == "compact 1"
