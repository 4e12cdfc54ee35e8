"""The states on the way to a design, as parts of their own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cadtrain.cad.codec import get_codec
from cadtrain.cad.describe import describe
from cadtrain.cad.formats.deepcad import read_deepcad_json, to_deepcad_json
from cadtrain.cad.quantize import quantize
from cadtrain.cad.sequence import (
    CadSequence,
    Circle,
    Extent,
    Loop,
    Operation,
    Profile,
    SketchExtrude,
    SketchPlane,
)
from cadtrain.data.manifest import SPLITS
from cadtrain.data.prepare.parts import PrepareOptions, build_part, prepare
from cadtrain.data.prepare.states import states_before
from cadtrain.data.shards import PartDataset
from cadtrain.data.splits import document_of
from cadtrain.data.writing.pipeline import Built, Dropped, Workers
from tests.data.test_prepare import _ledger, _task

FLOOR = SketchPlane((0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
TEXT_ONLY = PrepareOptions(num_points=0, num_views=0, prefixes=True)


def _disc(x: float, operation: Operation, height: float, radius: float = 1.0) -> SketchExtrude:
    profile = Profile(Loop((Circle((x, 0.0), radius),)))
    return SketchExtrude(FLOOR, profile, operation, Extent.ONE_SIDE, height)


PLATE = _disc(0.0, Operation.NEW, 1.0, radius=10.0)
POSTS = [_disc(x, Operation.JOIN, 3.0) for x in (-5.0, 0.0, 5.0)]
HOLE = _disc(0.0, Operation.CUT, 3.0, radius=0.5)


def test_states_end_with_an_extrusion() -> None:
    sequence = CadSequence((PLATE, *POSTS, HOLE))
    states = list(states_before(sequence))
    # The three posts are the profiles of one extrusion.
    assert [(number, len(state.steps)) for number, state in states] == [(1, 1), (2, 4)]
    assert all(state.steps == sequence.steps[: len(state.steps)] for _, state in states)


def test_a_new_body_of_several_profiles_is_one_extrusion_and_a_cut_of_the_same_height_another() -> None:
    first = _disc(-5.0, Operation.NEW, 3.0)
    assert [number for number, _ in states_before(CadSequence((first, *POSTS)))] == []
    assert [len(s.steps) for _, s in states_before(CadSequence((first, *POSTS, HOLE)))] == [4]
    assert list(states_before(CadSequence((first,)))) == []


def _write(root: Path, part_id: str, *steps: SketchExtrude) -> None:
    path = root / "json" / f"{part_id}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(to_deepcad_json(CadSequence(steps))))


PART = "0098/00980012"


@pytest.mark.kernel
def test_each_state_has_what_is_its_own(tmp_path: Path) -> None:
    _write(tmp_path, PART, PLATE, POSTS[0], HOLE)
    task = _task(tmp_path, PART, caption="The whole part.", prefixes=True)
    results = build_part(task)
    assert isinstance(results, list)
    rows = [result.row for result in results if isinstance(result, Built)]
    assert [row.id for row in rows] == [f"{PART}@1", f"{PART}@2", PART]
    assert {row.document for row in rows} == {PART} == {document_of(row.id) for row in rows}
    assert [row.num_steps for row in rows] == [1, 2, 3]
    assert [row.caption_source for row in rows] == ["described", "described", "file"]
    states = [state for _, state in states_before(read_deepcad_json(task.design))]
    assert [row.caption for row in rows] == [*map(describe, states), "The whole part."]
    assert [row.sequence for row in rows[:2]] == [get_codec("compact").encode(quantize(state)) for state in states]
    volumes = [row.volume or 0.0 for row in rows]
    assert volumes[0] < volumes[1] > volumes[2]
    assert len({row.images for row in rows}) == 3
    assert [result.is_whole for result in results if isinstance(result, Built)] == [False, False, True]
    alone = build_part(replace(task, options=replace(task.options, prefixes=False)))
    assert isinstance(alone, Built)
    assert (alone.row.sequence, alone.row.images) == (rows[2].sequence, rows[2].images)


def test_the_time_for_states_runs_out_before_that_for_the_part(tmp_path: Path) -> None:
    _write(tmp_path, PART, PLATE, POSTS[0])
    task = replace(_task(tmp_path, PART), options=TEXT_ONLY, states_seconds=0.0)
    state, whole = build_part(task)  # type: ignore[misc]
    assert isinstance(whole, Built)
    assert isinstance(state, Dropped)
    assert (state.kind, state.id) == ("time_limit", f"{PART}@1")


def test_a_folder_with_its_states(tmp_path: Path) -> None:
    root, out = tmp_path / "omni", tmp_path / "out"
    _write(root, "0022/00220825_00001", PLATE)  # a state of the next one that has a file of its own, as in Omni-CAD
    _write(root, "0022/00220825_00002", PLATE, POSTS[0], HOLE)
    _write(root, "0022/00220826_00001", PLATE, POSTS[0])
    (root / "split.json").write_text(json.dumps({"train": ["0022/00220825"], "test": ["0022/00220826"]}))
    options = replace(TEXT_ONLY, split_file=root / "split.json", duplicates="keep")
    summary = prepare(root, out, options, Workers(1, 60.0))
    ids = {split: PartDataset.open(out, split).column("id") for split in SPLITS}
    assert ids == {
        "train": ["0022/00220825_00001", "0022/00220825_00002@2", "0022/00220825_00002"],
        "validation": [],
        "test": ["0022/00220826_00001@1", "0022/00220826_00001"],
    }
    assert summary.manifest.failures == {"duplicate": 1}
    (entry,) = _ledger(out)
    assert entry["id"] == "0022/00220825_00002@1"
    assert "0022/00220825_00001 in train" in entry["reason"]

    fewer = prepare(root, tmp_path / "fewer", replace(options, duplicates="out-of-test"), Workers(1, 60.0))
    # Both states of the test design are in train under another document.
    assert fewer.manifest.counts == {"train": 3, "validation": 0, "test": 0}
