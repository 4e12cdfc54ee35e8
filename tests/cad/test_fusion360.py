"""Fusion 360 Gallery documents, written here by hand after the published schema: what they mean, and what is refused."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cadtrain.cad import Circle, Extent, Operation, read_design, to_deepcad_json
from cadtrain.cad.formats import DesignFormat, design_format
from cadtrain.cad.formats.fusion360 import parse_fusion360
from cadtrain.errors import SchemaError
from tests.cad.designs import PLATE_WITH_HOLE, with_one_wrong_value

Json = dict[str, Any]


def point(x: float, y: float, z: float = 0.0) -> Json:
    return {"type": "Point3D", "x": x, "y": y, "z": z}


def direction(x: float, y: float, z: float) -> Json:
    return {"type": "Vector3D", "x": x, "y": y, "z": z, "length": 1.0}


def line(x0: float, y0: float, x1: float, y1: float) -> Json:
    return {"type": "Line3D", "start_point": point(x0, y0), "end_point": point(x1, y1), "curve": "drawn-line"}


def parameter(value: float, role: str) -> Json:
    return {"type": "ModelParameter", "value": value, "name": "d1", "role": role}


def sketch(*loops: list[Json], z: float = 0.0) -> Json:
    return {
        "name": "Skizze1",
        "type": "Sketch",
        "points": {"p-1": point(1, 2)},
        "curves": {"drawn-line": {"type": "SketchLine", "construction_geom": False, "start_point": "p-1"}},
        "constraints": {"c-1": {"line": "drawn-line", "type": "HorizontalConstraint"}},
        "dimensions": {},
        "profiles": {
            "area": {
                "loops": [{"is_outer": i == 0, "profile_curves": curves} for i, curves in enumerate(loops)],
                "properties": {"area": 1.0, "centroid": point(0, 0), "perimeter": 1.0},
            },
        },
        "transform": {
            "origin": point(0, 0, z),
            "x_axis": direction(1, 0, 0),
            "y_axis": direction(0, 1, 0),
            "z_axis": direction(0, 0, 1),
        },
        "reference_plane": {"type": "ConstructionPlane", "name": "XY", "plane": {"type": "Plane"}},
    }


def extrude(use: str, distance: float, operation: str = "NewBody", extent: str = "OneSide") -> Json:
    return {
        "name": "Extrusion1",
        "type": "ExtrudeFeature",
        "profiles": [{"profile": "area", "sketch": use}],
        "operation": f"{operation}FeatureOperation",
        "start_extent": {"type": "ProfilePlaneStartDefinition"},
        "extent_type": f"{extent}FeatureExtentType",
        "extent_one": {
            "distance": parameter(distance, "AlongDistance"),
            "taper_angle": parameter(0.0, "TaperAngle"),
            "type": "DistanceExtentDefinition",
        },
        "faces": {"f-1": {"index": 0, "surface_type": "PlaneSurfaceType", "point_on_face": point(0, 0)}},
        "bodies": {"b-1": {"index": 0, "name": "Body1", "faces": ["f-1"]}},
        "extrude_bodies": ["b-1"],
        "extrude_faces": ["f-1"],
        "extrude_side_faces": [],
        "extrude_end_faces": ["f-1"],
        "extrude_start_faces": [],
    }


RECTANGLE = [line(0, 0, 4, 0), line(4, 3, 4, 0), line(4, 3, 0, 3), line(0, 3, 0, 0)]
CIRCLE = [
    {
        "type": "Circle3D",
        "center_point": point(2, 1),
        "radius": 0.5,
        "normal": direction(0, 0, 1),
        "curve": "drawn-circle",
    }
]


def document() -> Json:
    """A plate of 4 x 3 x 1 cm with a hole, and a pin through it."""
    return {
        "metadata": {"parent_project": "Plate_1", "component_name": "Plate", "component_index": 0, "identifier": "4_4"},
        "timeline": [
            {"index": 0, "entity": "s-1"},
            {"index": 1, "entity": "e-1"},
            {"index": 3, "entity": "s-2"},
            {"index": 7, "entity": "e-2"},
        ],
        "entities": {
            "e-1": extrude("s-1", 1.0),
            "s-1": sketch(CIRCLE, RECTANGLE),
            "s-2": sketch(CIRCLE, z=1.0),
            "e-2": extrude("s-2", -2.0, "Join"),
        },
        "properties": {
            "name": "Plate",
            "bounding_box": {"type": "BoundingBox3D", "max_point": point(4, 3, 1), "min_point": point(0, 0, -1)},
            "volume": 12.0,
        },
        "sequence": [
            {"index": 0, "type": "Sketch", "entity": "s-1", "curve": "drawn-line", "timeline": 0},
            {
                "index": 1,
                "type": "ExtrudeFeature",
                "entity": "e-1",
                "timeline": 1,
                "png": "x_0001.png",
                "smt": "x_0001.smt",
            },
        ],
    }


def parsed(change: Callable[[Json], Any] = lambda doc: None) -> Any:
    doc = copy.deepcopy(document())
    change(doc)
    return parse_fusion360(doc, "plate.json")


def test_a_document_is_read_in_metres() -> None:
    sequence = parsed()
    plate, pin = sequence.steps
    assert [plate.operation, pin.operation] == [Operation.NEW, Operation.JOIN]
    assert plate.profile.area == pytest.approx((12 - math.pi / 4) * 1e-4)
    assert isinstance(plate.profile.inner[0].curves[0], Circle)
    assert plate.heights == pytest.approx((0.0, 0.01))
    assert pin.heights == pytest.approx((-0.02, 0.0))
    assert pin.plane.origin == pytest.approx((0.0, 0.0, 0.01))
    assert sequence.bounding_box.high == pytest.approx((0.04, 0.03, 0.01))
    assert sequence.material_box().low == pytest.approx((0.0, 0.0, -0.01))


def test_the_timeline_is_the_order_whatever_the_sequence_lists() -> None:
    sequence = parsed(lambda doc: (doc["timeline"].reverse(), doc.pop("sequence")))
    assert [step.operation for step in sequence.steps] == [Operation.JOIN, Operation.NEW]


@pytest.mark.parametrize(
    ("extent", "one", "two", "heights"),
    [
        ("OneSide", {"distance": 2.0}, None, (0.0, 0.02)),
        ("Symmetric", {"distance": 2.0}, None, (-0.02, 0.02)),
        ("Symmetric", {"distance": 2.0, "is_full_length": False}, None, (-0.02, 0.02)),
        ("Symmetric", {"distance": 2.0, "is_full_length": True}, None, (-0.01, 0.01)),
        ("TwoSides", {"distance": 2.0}, 0.5, (-0.005, 0.02)),
        ("TwoSides", {"distance": -2.0}, 0.5, (-0.02, 0.0)),
    ],
)
def test_extents_have_the_heights_they_say(extent: str, one: Json, two: float | None, heights: Any) -> None:
    feature = extrude("s-1", one["distance"], extent=extent)
    feature["extent_one"] |= {key: value for key, value in one.items() if key != "distance"}
    if two is not None:
        feature["extent_two"] = {"distance": parameter(two, "AgainstDistance"), "type": "DistanceExtentDefinition"}
    step = parsed(lambda doc: doc["entities"].update({"e-1": feature})).steps[0]
    assert step.heights == pytest.approx(heights)
    assert step.extent.value == {"OneSide": "one_side", "Symmetric": "symmetric", "TwoSides": "two_sides"}[extent]


def test_an_offset_start_moves_the_plane_along_its_normal() -> None:
    start = {"type": "OffsetStartDefinition", "offset": parameter(0.5, "ProfileOffset")}
    step = parsed(lambda doc: doc["entities"]["e-1"].update(start_extent=start)).steps[0]
    assert step.plane.origin == pytest.approx((0.0, 0.0, 0.005))
    assert step.bounding_box().low[2] == pytest.approx(0.005)
    assert step.extent is Extent.ONE_SIDE


@pytest.mark.parametrize(("normal", "y"), [(1.0, 1.0), (-1.0, -1.0)])
@pytest.mark.parametrize("turn", [math.pi, 1.0])
def test_an_arc_runs_about_its_normal(normal: float, y: float, turn: float) -> None:
    """From (1, 0) by `turn` around the origin, above the x axis or below it, closed by the chord."""
    end = math.cos(turn), y * math.sin(turn)
    arc = {
        "type": "Arc3D",
        "start_point": point(1, 0),
        "end_point": point(*end),
        "center_point": point(0, 0),
        "radius": 1.0,
        "normal": direction(0, 0, normal),
        "start_angle": 0.0,
        "end_angle": turn,
        "reference_vector": direction(1, 0, 0),
        "curve": "drawn-arc",
    }
    loop = parsed(lambda doc: doc["entities"].update({"s-1": sketch([arc, line(*end, 1, 0)])})).steps[0].profile.outer
    (_, low), (_, high) = loop.bounding_box()
    reach = 0.01 * math.sin(min(turn, math.pi / 2))
    assert (low, high) == pytest.approx((0.0, reach) if y > 0 else (-reach, 0.0))
    assert abs(loop.signed_area) == pytest.approx((turn - math.sin(turn)) / 2 * 1e-4)


def test_several_profiles_are_several_steps() -> None:
    use = {"profile": "area", "sketch": "s-2"}
    steps = parsed(lambda doc: doc["entities"]["e-1"]["profiles"].append(use)).steps
    assert [step.operation for step in steps] == [Operation.NEW, Operation.JOIN, Operation.JOIN]


def curves_of(doc: Json) -> list[Json]:
    return doc["entities"]["s-1"]["profiles"]["area"]["loops"][1]["profile_curves"]


def extent_of(doc: Json) -> Json:
    return doc["entities"]["e-1"]["extent_one"]


CURVE = "$.entities['s-1'].profiles.area.loops[1].profile_curves[0].type"


@pytest.mark.parametrize(
    ("change", "path", "reason"),
    [
        (lambda d: d.pop("timeline"), "$", "'timeline' is missing"),
        (lambda d: d["timeline"].clear(), "$.timeline", "no extrusion makes anything"),
        (lambda d: d["timeline"][0].update(entity="gone"), "$.entities", "the timeline names entity 'gone'"),
        (lambda d: curves_of(d)[0].update(type="Ellipse3D"), CURVE, "an ellipse is not supported, only lines, arcs and circles"),
        (lambda d: curves_of(d)[0].update(type="EllipticalArc3D"), CURVE, "an elliptical arc is not supported"),
        (lambda d: curves_of(d)[0].update(type="NurbsCurve3D"), CURVE, "a spline is not supported"),
        (lambda d: extent_of(d)["taper_angle"].update(value=0.1), "$.entities['e-1'].extent_one.taper_angle.value", "a tapered extrusion (0.1 rad)"),
        (lambda d: extent_of(d).update(type="ToEntityExtentDefinition"), "$.entities['e-1'].extent_one.type", "ends by a ToEntityExtentDefinition"),
        (lambda d: extent_of(d).pop("distance"), "$.entities['e-1'].extent_one", "'distance' is missing"),
        (lambda d: d["entities"]["e-1"].update(extent_type="TwoSidesFeatureExtentType"), "$.entities['e-1']", "'extent_two' is missing"),
        (lambda d: d["entities"]["e-1"].update(extent_type="SymmetricFeatureExtentType") or extent_of(d).update(is_full_length=1), "$.entities['e-1'].extent_one.is_full_length", "expected true or false, found 1"),
        (lambda d: d["entities"]["e-1"]["start_extent"].update(type="FromEntityStartDefinition"), "$.entities['e-1'].start_extent.type", "FromEntityStartDefinition"),
        (lambda d: d["entities"]["e-1"].update(operation="NewComponentFeatureOperation"), "$.entities['e-1'].operation", "NewComponentFeatureOperation"),
        (lambda d: d["entities"]["s-1"].update(type="RevolveFeature"), "$.entities['s-1'].type", "RevolveFeature"),
    ],
)  # fmt: skip
def test_what_cannot_be_said_is_refused_with_place_and_reason(
    change: Callable[[Json], Any], path: str, reason: str
) -> None:
    with pytest.raises(SchemaError) as caught:
        parsed(change)
    assert caught.value.json_path == path
    assert reason in str(caught.value)


def test_all_faults_of_a_document_come_at_once() -> None:
    def change(doc: Json) -> None:
        curves_of(doc)[0]["type"] = "NurbsCurve3D"
        doc["entities"]["e-2"]["extent_one"]["taper_angle"]["value"] = 0.2

    with pytest.raises(SchemaError) as caught:
        parsed(change)
    assert caught.value.json_path == CURVE
    assert str(caught.value) == (
        f"plate.json: {CURVE}: a spline is not supported, only lines, arcs and circles are. 1 further fault: "
        "$.entities['e-2'].extent_one.taper_angle.value: a tapered extrusion (0.2 rad) is not supported."
    )


def test_no_single_wrong_value_gets_past_the_schema() -> None:
    for doc in with_one_wrong_value(document()):
        with contextlib.suppress(SchemaError):
            parse_fusion360(doc, "doc")


def test_the_format_is_told_from_the_content(tmp_path: Path) -> None:
    fusion, deepcad = tmp_path / "a.json", tmp_path / "b.json"
    fusion.write_text(json.dumps(document()))
    deepcad.write_text(json.dumps(to_deepcad_json(PLATE_WITH_HOLE)))
    assert design_format(document()) is DesignFormat.FUSION360
    assert design_format(to_deepcad_json(PLATE_WITH_HOLE)) is DesignFormat.DEEPCAD
    assert design_format([]) is DesignFormat.DEEPCAD
    assert read_design(fusion).bounding_box.size == pytest.approx((0.04, 0.03, 0.02))  # type: ignore[union-attr]
    assert read_design(deepcad).steps == PLATE_WITH_HOLE.steps
