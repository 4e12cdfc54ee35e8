"""DeepCAD and Omni-CAD JSON, read and written.

What the files hold and the schema does not say (measured over 612 of them): curves of a loop come in order but most
need turning round; an arc runs counter-clockwise from its reference vector over its angles, whatever its two end points
are called; `is_outer` says nothing, so the loop with the largest area is the outer one; sketches outside `sequence` are
left-overs.

An extrusion of several profiles becomes one step per profile (`features.feature_operation`). An extrusion without
profiles makes nothing and is passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cadtrain.cad.formats.features import (
    EXTENTS,
    OPERATIONS,
    feature_operation,
    read_box,
    read_distance,
    read_plane,
    read_profile,
    read_steps,
    used_profile,
)
from cadtrain.cad.formats.node import Faults, Node, load_json
from cadtrain.cad.sequence import Arc, CadSequence, Circle, Curve, Extent, Point2, SketchExtrude, SketchPlane, Vector3


def read_deepcad_json(path: str | Path) -> CadSequence:
    """The design in a DeepCAD / Omni-CAD file, in metres.

    Raises `SchemaError` (place in the document, value found, reason; all faults of the file) for a document that breaks
    the schema, `DataError` for a file that is not there, is no UTF-8 or no complete JSON (line and column).
    """
    return parse_deepcad(load_json(path), str(path))


def parse_deepcad(document: Any, where: str) -> CadSequence:
    """The design in a parsed document; `where` names it in errors. Raises `SchemaError`."""
    root = Node(document, "$", where)
    return CadSequence(read_steps(root, "sequence", _read_extrude), read_box(root))


def _read_extrude(feature: Node, entities: Node, faults: Faults) -> Iterator[SketchExtrude]:
    uses = list(feature.child("profiles").items())
    operation, further = feature_operation(feature, len(uses))
    extent = feature.child("extent_type").choice(EXTENTS)
    feature.child("start_extent").child("type").choice({"ProfilePlaneStartDefinition": None})
    distance_one = read_distance(feature.child("extent_one"))
    distance_two = read_distance(feature.child("extent_two")) if extent is Extent.TWO_SIDES else 0.0
    if uses and distance_one == distance_two == 0:
        raise feature.child("extent_one").error("the extrusion has no thickness")
    for number, use in enumerate(uses):
        with faults.caught():
            sketch, profile = used_profile(use, entities)
            yield SketchExtrude(
                plane=read_plane(sketch.child("transform")),
                profile=read_profile(profile),
                operation=further if number else operation,
                extent=extent,
                distance_one=distance_one,
                distance_two=distance_two,
            )


# -------------------------------------------------------------------------------------------- write


def to_deepcad_json(sequence: CadSequence) -> dict[str, Any]:
    """The design as a DeepCAD document: one sketch with one profile, and one extrusion, for every step."""
    operations = {value: key for key, value in OPERATIONS.items()}
    extents = {value: key for key, value in EXTENTS.items()}
    entities: dict[str, Any] = {}
    order: list[dict[str, Any]] = []
    for number, step in enumerate(sequence.steps):
        sketch, extrude, profile = f"sketch_{number}", f"extrude_{number}", "profile"
        plane = step.plane
        entities[sketch] = {
            "name": f"Sketch {number + 1}",
            "type": "Sketch",
            "reference_plane": {},
            "transform": {
                "origin": _xyz(plane.origin),
                "x_axis": _xyz(plane.x_axis),
                "y_axis": _xyz(plane.y_axis),
                "z_axis": _xyz(plane.z_axis),
            },
            "profiles": {
                profile: {
                    "loops": [
                        {"is_outer": i == 0, "profile_curves": [_curve_json(c, plane) for c in loop.curves]}
                        for i, loop in enumerate(step.profile.loops)
                    ],
                    "properties": {},
                }
            },
        }
        entities[extrude] = {
            "name": f"Extrude {number + 1}",
            "type": "ExtrudeFeature",
            "profiles": [{"sketch": sketch, "profile": profile}],
            "operation": operations[step.operation],
            "start_extent": {"type": "ProfilePlaneStartDefinition"},
            "extent_type": extents[step.extent],
            "extent_one": _extent_json(step.distance_one, "AlongDistance", "TaperAngle"),
            "extent_two": _extent_json(step.distance_two, "AgainstDistance", "Side2TaperAngle"),
        }
        order.append({"index": 2 * number, "type": "Sketch", "entity": sketch})
        order.append({"index": 2 * number + 1, "type": "ExtrudeFeature", "entity": extrude})
    box = sequence.bounding_box or sequence.material_box()
    bounding_box = {"type": "BoundingBox3D", "min_point": _xyz(box.low), "max_point": _xyz(box.high)}
    return {"entities": entities, "properties": {"bounding_box": bounding_box}, "sequence": order}


def _xyz(vector: Vector3) -> dict[str, float]:
    return {"x": vector[0], "y": vector[1], "z": vector[2]}


def _flat(point: Point2) -> dict[str, float]:
    return _xyz((point[0], point[1], 0.0))


def _extent_json(value: float, role: str, taper_role: str) -> dict[str, Any]:
    def parameter(name: str, amount: float) -> dict[str, Any]:
        return {"type": "ModelParameter", "name": "none", "role": name, "value": amount}

    return {
        "type": "DistanceExtentDefinition",
        "distance": parameter(role, value),
        "taper_angle": parameter(taper_role, 0.0),
    }


def _curve_json(curve: Curve, plane: SketchPlane) -> dict[str, Any]:
    normal = _xyz(plane.z_axis)
    if isinstance(curve, Circle):
        return {"type": "Circle3D", "center_point": _flat(curve.center), "radius": curve.radius, "normal": normal}
    if not isinstance(curve, Arc):
        return {"type": "Line3D", "start_point": _flat(curve.start), "end_point": _flat(curve.end)}
    # The format knows counter-clockwise arcs only: a clockwise one is written backwards and turned when it is read.
    forward = curve if curve.sweep_rad > 0 else curve.reversed()
    (cx, cy), radius = forward.center, forward.radius
    return {
        "type": "Arc3D",
        "start_point": _flat(forward.start),
        "end_point": _flat(forward.end),
        "center_point": _flat((cx, cy)),
        "radius": radius,
        "normal": normal,
        "start_angle": 0.0,
        "end_angle": forward.sweep_rad,
        "reference_vector": _flat(((forward.start[0] - cx) / radius, (forward.start[1] - cy) / radius)),
    }
