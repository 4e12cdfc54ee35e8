"""DeepCAD files: what they mean, and what is said of a broken one."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from cadtrain.cad import (
    Arc,
    Circle,
    Extent,
    Operation,
    codec_names,
    dequantize,
    describe,
    get_codec,
    parse_deepcad,
    quantize,
    read_deepcad_json,
    read_design,
    to_deepcad_json,
)
from cadtrain.errors import DataError, SchemaError
from tests.cad.designs import PLATE_WITH_HOLE, circle, design, polygon, rectangle, slot, step, with_one_wrong_value


def document() -> dict[str, Any]:
    return to_deepcad_json(design(*PLATE_WITH_HOLE.steps, step(slot(0.02, 0.005), 0.02, operation=Operation.CUT)))


def curves_of(doc: dict[str, Any], sketch: str) -> list[dict[str, Any]]:
    return doc["entities"][sketch]["profiles"]["profile"]["loops"][0]["profile_curves"]


def test_what_is_written_is_read_back() -> None:
    sequence = parse_deepcad(document(), "doc")
    assert sequence.steps[0] == PLATE_WITH_HOLE.steps[0]
    assert [s.operation for s in sequence.steps] == [Operation.NEW, Operation.CUT]
    assert sequence.steps[1].profile.area == pytest.approx(0.02 * 0.01 + math.pi * 0.005**2)


def test_the_largest_loop_is_the_outer_one_whatever_the_flags_say() -> None:
    doc = document()
    loops = doc["entities"]["sketch_0"]["profiles"]["profile"]["loops"]
    loops.reverse()
    for loop in loops:
        loop["is_outer"] = True
    profile = parse_deepcad(doc, "doc").steps[0].profile
    assert len(profile.outer.curves) == 4
    assert isinstance(profile.inner[0].curves[0], Circle)


def test_curves_are_turned_round_where_they_run_backwards() -> None:
    doc = document()
    for curve in curves_of(doc, "sketch_0")[1::2]:
        curve["start_point"], curve["end_point"] = curve["end_point"], curve["start_point"]
    assert parse_deepcad(doc, "doc").steps[0].profile.area == pytest.approx(PLATE_WITH_HOLE.steps[0].profile.area)


def test_curves_are_put_in_order_where_they_are_shuffled() -> None:
    doc = document()
    curves = curves_of(doc, "sketch_0")
    curves[:] = [curves[0], curves[2], curves[1], curves[3]]
    assert parse_deepcad(doc, "doc").steps[0].profile.area == pytest.approx(PLATE_WITH_HOLE.steps[0].profile.area)


def test_an_arcs_angles_are_right_where_its_ends_are_swapped() -> None:
    doc = document()
    for curve in curves_of(doc, "sketch_1"):
        if curve["type"] == "Arc3D":
            curve["start_point"], curve["end_point"] = curve["end_point"], curve["start_point"]
    outer = parse_deepcad(doc, "doc").steps[1].profile.outer
    assert abs(outer.signed_area) == pytest.approx(0.02 * 0.01 + math.pi * 0.005**2)
    assert sum(isinstance(curve, Arc) for curve in outer.curves) == 2


@pytest.mark.parametrize(
    ("operation", "expected"),
    [("New", [Operation.NEW, Operation.JOIN]), ("Join", [Operation.JOIN] * 2), ("Cut", [Operation.CUT] * 2)],
)
def test_several_profiles_are_several_steps(operation: str, expected: list[Operation]) -> None:
    doc = document()
    name = f"{operation}{'Body' if operation == 'New' else ''}FeatureOperation"
    doc["entities"]["extrude_0"]["operation"] = name
    doc["entities"]["extrude_0"]["profiles"].append({"sketch": "sketch_1", "profile": "profile"})
    assert [s.operation for s in parse_deepcad(doc, "doc").steps[:2]] == expected


def test_an_intersection_with_several_profiles_is_refused() -> None:
    doc = document()
    doc["entities"]["extrude_0"]["operation"] = "IntersectFeatureOperation"
    doc["entities"]["extrude_0"]["profiles"] *= 2
    with pytest.raises(SchemaError, match="an intersection with 2 profiles"):
        parse_deepcad(doc, "doc")


def test_left_over_sketches_and_empty_extrusions_are_passed_over() -> None:
    doc = document()
    doc["entities"]["orphan"] = {"type": "Sketch", "profiles": {}}
    doc["entities"]["extrude_0"]["profiles"] = []
    doc["sequence"] = [{**item, "index": 3 * item["index"]} for item in doc["sequence"]]
    doc["entities"] = dict(reversed(doc["entities"].items()))
    assert [s.operation for s in parse_deepcad(doc, "doc").steps] == [Operation.CUT]


@pytest.mark.parametrize(
    ("extent", "one", "two", "heights"),
    [
        ("OneSide", 2.0, 7.0, (0.0, 2.0)),
        ("OneSide", -2.0, 0.0, (-2.0, 0.0)),
        ("Symmetric", 2.0, 0.0, (-2.0, 2.0)),
        ("Symmetric", -2.0, 0.0, (-2.0, 2.0)),
        ("TwoSides", 2.0, 1.0, (-1.0, 2.0)),
        ("TwoSides", -2.0, 3.0, (-3.0, 0.0)),
        ("TwoSides", -2.0, 2.0, (-2.0, 0.0)),
    ],
)
def test_extents_have_the_heights_they_say(extent: str, one: float, two: float, heights: tuple[float, float]) -> None:
    doc = document()
    feature = doc["entities"]["extrude_0"]
    feature["extent_type"] = f"{extent}FeatureExtentType"
    feature["extent_one"]["distance"]["value"] = one
    feature["extent_two"]["distance"]["value"] = two
    first = parse_deepcad(doc, "doc").steps[0]
    assert first.heights == heights
    assert first.distance_two == (two if first.extent is Extent.TWO_SIDES else 0.0)


def _set(path: str, value: Any) -> Any:
    def change(doc: dict[str, Any]) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
        target: Any = doc
        for part in parents:
            target = target[part]
        if value is ...:
            del target[last]
        else:
            target[last] = value

    return change


LOOP = "entities/sketch_0/profiles/profile/loops/0/profile_curves"


@pytest.mark.parametrize(
    ("change", "json_path", "reason"),
    [
        (_set("sequence", ...), "$", "'sequence' is missing; there is 'entities', 'properties'"),
        (_set("sequence", {}), "$.sequence", "expected a list, found an object of 0"),
        (_set("sequence", []), "$.sequence", "no extrusion makes anything"),
        (_set("sequence/1/entity", "gone"), "$.entities", "the sequence names entity 'gone', which is not among the entities"),
        (_set("entities/sketch_0/type", ...), "$.entities.sketch_0", "'type' is missing"),
        (_set("entities/extrude_0/extent_type", ...), "$.entities.extrude_0", "'extent_type' is missing"),
        (_set("entities/extrude_0/operation", "Weld"), "$.entities.extrude_0.operation", 'found "Weld"'),
        (_set("entities/extrude_0/extent_one/distance/value", "2"), "$.entities.extrude_0.extent_one.distance.value", 'expected a number, found "2"'),
        (_set("entities/extrude_0/extent_one/distance/value", 0), "$.entities.extrude_0.extent_one", "no thickness"),
        (_set("entities/extrude_0/extent_one/distance/value", math.nan), "$.entities.extrude_0.extent_one.distance.value", "found nan"),
        (_set("entities/extrude_0/extent_one/distance/value", 10**400), "$.entities.extrude_0.extent_one.distance.value", "moderate size"),
        (_set("entities/extrude_0/extent_one/taper_angle/value", 0.1), "$.entities.extrude_0.extent_one.taper_angle.value", "tapered"),
        (_set("entities/extrude_0/start_extent/type", "Offset"), "$.entities.extrude_0.start_extent.type", "Offset"),
        (_set("entities/extrude_0/profiles/0/profile", "p"), "$.entities.sketch_0.profiles", "has no profile 'p'"),
        (_set("entities/sketch_0/transform/x_axis/x", 0.5), "$.entities.sketch_0.transform", "not orthonormal"),
        (_set("entities/sketch_0/transform/z_axis/z", -1), "$.entities.sketch_0.transform", "left-handed"),
        (_set(f"{LOOP}", []), "$.entities.sketch_0.profiles.profile.loops[0].profile_curves", "no curves"),
        (_set(f"{LOOP}/2", ...), "$.entities.sketch_0.profiles.profile.loops[0].profile_curves", "gap of"),
        (_set(f"{LOOP}/0/type", "Spline"), "$.entities.sketch_0.profiles.profile.loops[0].profile_curves[0].type", "Spline"),
        (_set("entities/sketch_0/profiles/profile/loops/1/profile_curves/0/radius", -1), "$.entities.sketch_0.profiles.profile.loops[1].profile_curves[0].radius", "must be above 0"),
    ],
)  # fmt: skip
def test_a_broken_file_is_refused_with_place_value_and_reason(change: Any, json_path: str, reason: str) -> None:
    doc = copy.deepcopy(document())
    change(doc)
    with pytest.raises(SchemaError) as caught:
        parse_deepcad(doc, "part.json")
    assert caught.value.json_path == json_path
    assert reason in str(caught.value)
    assert caught.value.where == "part.json"


def test_no_single_wrong_value_gets_past_the_schema() -> None:
    """Every value of a document in turn is replaced by things it cannot be: only `SchemaError` may come out."""
    for doc in with_one_wrong_value(document()):
        with contextlib.suppress(SchemaError):
            parse_deepcad(doc, "doc")


def test_one_sketch_feeds_several_extrusions() -> None:
    doc = document()
    doc["entities"]["extrude_1"]["profiles"] = [{"sketch": "sketch_0", "profile": "profile"}]
    first, second = parse_deepcad(doc, "doc").steps
    assert first.profile == second.profile
    assert (first.operation, second.operation) == (Operation.NEW, Operation.CUT)


def test_a_file_that_is_cut_off_says_where(tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    text = json.dumps(document(), indent=1)
    path.write_text(text[:200])
    line, column = text[:200].count("\n") + 1, 200 - text[:200].rfind("\n")
    with pytest.raises(SchemaError, match=r"the JSON is cut off at line \d+ column \d+") as caught:
        read_deepcad_json(path)
    found = [int(word.strip(".")) for word in str(caught.value).split() if word.strip(".").isdigit()]
    assert found[0] == line
    assert found[1] <= column


def test_other_unreadable_files_are_data_errors(tmp_path: Path) -> None:
    (tmp_path / "digits.json").write_text("[" + "1" * 5000 + "]")
    with pytest.raises(SchemaError, match="thousands of digits"):
        read_deepcad_json(tmp_path / "digits.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(SchemaError, match="nested too deeply"):
        read_deepcad_json(tmp_path / "deep.json")
    (tmp_path / "empty.json").touch()
    with pytest.raises(SchemaError, match=r"the file is empty \(0 bytes\)"):
        read_deepcad_json(tmp_path / "empty.json")
    with pytest.raises(DataError, match="No such file"):
        read_deepcad_json(tmp_path / "absent.json")
    (tmp_path / "latin.json").write_bytes(b'{"\xff": 1}')
    with pytest.raises(DataError, match="no UTF-8 text"):
        read_deepcad_json(tmp_path / "latin.json")
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(SchemaError, match="expected an object, found a list of 2"):
        read_deepcad_json(tmp_path / "list.json")


@pytest.mark.parametrize(
    ("sequence", "caption"),
    [
        (PLATE_WITH_HOLE, "Generate a CAD model of a rectangular plate with one round hole. Overall it is about 1.7 times as long as wide and about six times as wide as high."),
        (design(step(circle(0, 0, 1), 10)), "Generate a CAD model of a long cylinder. Overall it is about five times as long as wide and about as high as wide."),
        (design(step(circle(0, 0, 2), 2, circle(0, 0, 1))), "Generate a CAD model of a ring. Overall it is about as long as wide and about twice as wide as high."),
        (design(step(polygon((0, 0), (2, 0), (0, 2)), 1), step(rectangle(0, 0, 1, 1), 5, operation=Operation.CUT)), "Generate a CAD model of a triangular body. One square cut is taken away. Overall it is about as long as wide and about twice as wide as high."),
    ],
)  # fmt: skip
def test_captions_say_what_is_there(sequence: Any, caption: str) -> None:
    assert describe(sequence) == caption


# ------------------------------------------------------------------------------------------------------------- real files

REAL = ["omni-cad-test-subset/json", "text2cad-medium/cad_json", "text2cad-random100/deepcad_cad_json"]


@pytest.mark.parametrize(("folder", "count"), zip(REAL, [212, 100, 100], strict=True))
def test_every_real_file_is_read_and_survives_every_round_trip(shared_data: Path, folder: str, count: int) -> None:
    files = sorted((shared_data / folder).rglob("*.json"))
    assert len(files) == count
    codecs = [get_codec(name) for name in codec_names()]
    for path in files:
        sequence = read_design(path)
        quantized = quantize(sequence)
        assert quantize(dequantize(quantized)) == quantized, path.name
        for codec in codecs:
            assert codec.decode(codec.encode(quantized)) == quantized, (path.name, codec.name)
        assert len(parse_deepcad(to_deepcad_json(sequence), path.name).steps) == len(sequence.steps)
        assert describe(sequence).startswith("Generate a CAD model of a")


def test_of_a_models_48_files_four_are_refused_with_place_and_reason(shared_data: Path) -> None:
    """Three break the schema; the fourth has a circle between the lines of a loop."""
    refused = {}
    files = sorted((shared_data / "cad-mllm-model-outputs").glob("*.json"))
    for path in files:
        try:
            quantize(read_design(path))
        except SchemaError as error:
            refused[path.name[:8]] = error.message
    keys = "there is 'extent_two', 'name', 'extent_one', 'operation', 'start_extent', 'type' and 1 more."
    assert len(files) == 48
    assert refused == {
        "00900284": "$: 'sequence' is missing; there is 'entities'.",
        "00900920": (
            f"$.entities.FZqHnXUeVdEwvWb_0: 'extent_type' is missing; {keys} 1 further fault: "
            f"$.entities.FZiRrB7oM1aP2sS_1: 'extent_type' is missing; {keys}"
        ),
        "00902447": (
            "$: 'sequence' is missing; there is 'entities'. 1 further fault: $.entities.FVYvKdLbqBmHrPf_0: 'type' is "
            "missing; there is 'extent_two', 'name', 'extent_one', 'extent_type', 'operation'."
        ),
        "00904065": (
            "$.entities.Ff1Z0X426k89qKb_0.profiles.JGK.loops[0].profile_curves: a full circle stands beside other curves "
            "in one loop."
        ),
    }
