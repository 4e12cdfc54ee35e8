"""The reconstruction JSON of the Fusion 360 Gallery, read.

Source of the schema: AutodeskAILab/Fusion360GalleryDataset, `docs/reconstruction.md`, and the importer beside it for what
the page leaves open. DeepCAD's schema was made after this one; the differences that matter:

    units        centimetres, here turned into metres; angles in radians
    order        `timeline`; `sequence` lists every curve of a sketch on its own and is not needed
    arcs         run about their `normal`, which is (0, 0, -1) for clockwise ones
    symmetric    the distance is that to each side, or with `is_full_length` the whole one
    start        an `OffsetStartDefinition` begins the extrusion that far along the sketch plane's normal
    one side     has no `extent_two`

What the user drew (`points`, `curves`, `constraints`, `dimensions`), `reference_plane`, and the faces and bodies that
came out are passed over: profiles and transforms say it all. Bodies are united, as everywhere here. Ellipses, splines,
tapers and extents that end at other geometry are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from cadtrain.cad.formats.features import (
    EXTENTS,
    feature_operation,
    read_box,
    read_distance,
    read_plane,
    read_profile,
    read_steps,
    used_profile,
)
from cadtrain.cad.formats.node import Faults, Node, load_json
from cadtrain.cad.sequence import (
    Arc,
    BoundingBox,
    CadSequence,
    Circle,
    Curve,
    Extent,
    Line,
    Loop,
    Point2,
    Profile,
    SketchExtrude,
    SketchPlane,
    Vector3,
)

_METRES = 0.01


def read_fusion360_json(path: str | Path) -> CadSequence:
    """The design in a Fusion 360 Gallery reconstruction file, in metres; raises as `read_deepcad_json` does."""
    return parse_fusion360(load_json(path), str(path))


def parse_fusion360(document: Any, where: str) -> CadSequence:
    """The design in a parsed document, in metres; `where` names it in errors. Raises `SchemaError`."""
    root = Node(document, "$", where)
    steps = read_steps(root, "timeline", _read_extrude)
    box = read_box(root)
    return CadSequence(tuple(map(_in_metres, steps)), box and BoundingBox(_scaled3(box.low), _scaled3(box.high)))


def _read_extrude(feature: Node, entities: Node, faults: Faults) -> Iterator[SketchExtrude]:
    uses = list(feature.child("profiles").items())
    operation, further = feature_operation(feature, len(uses))
    extent = feature.child("extent_type").choice(EXTENTS)
    offset = _read_start(feature.child("start_extent"))
    distance_one, distance_two = _read_distances(feature, extent)
    if uses and distance_one == distance_two == 0:
        raise feature.child("extent_one").error("the extrusion has no thickness")
    for number, use in enumerate(uses):
        with faults.caught():
            sketch, profile = used_profile(use, entities)
            plane = read_plane(sketch.child("transform"))
            yield SketchExtrude(
                plane=replace(plane, origin=plane.to_world((0.0, 0.0), offset)),
                profile=read_profile(profile, arcs_follow_normal=True),
                operation=further if number else operation,
                extent=extent,
                distance_one=distance_one,
                distance_two=distance_two,
            )


def _read_start(start: Node) -> float:
    has_offset = start.child("type").choice({"ProfilePlaneStartDefinition": False, "OffsetStartDefinition": True})
    return start.child("offset").child("value").number() if has_offset else 0.0


def _read_distances(feature: Node, extent: Extent) -> tuple[float, float]:
    one = _distance_extent(feature.child("extent_one"))
    distance = read_distance(one)
    if extent is Extent.TWO_SIDES:
        return distance, read_distance(_distance_extent(feature.child("extent_two")))
    if extent is Extent.SYMMETRIC and one.has("is_full_length") and one.child("is_full_length").truth():
        return distance / 2, 0.0
    return distance, 0.0


def _distance_extent(extent: Node) -> Node:
    if extent.has("type"):
        kind = extent.child("type")
        if kind.text() not in ("DistanceExtentDefinition", "SymmetricExtentDefinition"):
            raise kind.error(f"an extrusion that ends by a {kind.value} is not supported, only by a distance")
    return extent


# -------------------------------------------------------------------------------------------------------- cm to metres


def _in_metres(step: SketchExtrude) -> SketchExtrude:
    return replace(
        step,
        plane=SketchPlane(_scaled3(step.plane.origin), step.plane.x_axis, step.plane.y_axis, step.plane.z_axis),
        profile=Profile(_scaled_loop(step.profile.outer), tuple(map(_scaled_loop, step.profile.inner))),
        distance_one=step.distance_one * _METRES,
        distance_two=step.distance_two * _METRES,
    )


def _scaled_loop(loop: Loop) -> Loop:
    return Loop(tuple(map(_scaled_curve, loop.curves)))


def _scaled_curve(curve: Curve) -> Curve:
    if isinstance(curve, Circle):
        return Circle(_scaled2(curve.center), curve.radius * _METRES)
    if isinstance(curve, Arc):
        return Arc(_scaled2(curve.start), _scaled2(curve.mid), _scaled2(curve.end))
    return Line(_scaled2(curve.start), _scaled2(curve.end))


def _scaled2(point: Point2) -> Point2:
    return point[0] * _METRES, point[1] * _METRES


def _scaled3(point: Vector3) -> Vector3:
    return point[0] * _METRES, point[1] * _METRES, point[2] * _METRES
