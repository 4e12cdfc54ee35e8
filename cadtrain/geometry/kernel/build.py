"""From a design's steps to a body."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from OCP.BRep import BRep_Builder
from OCP.BRepAlgoAPI import BRepAlgoAPI_Common, BRepAlgoAPI_Cut, BRepAlgoAPI_Fuse
from OCP.BRepBuilderAPI import (
    BRepBuilderAPI_MakeEdge,
    BRepBuilderAPI_MakeFace,
    BRepBuilderAPI_MakeVertex,
    BRepBuilderAPI_MakeWire,
)
from OCP.BRepPrimAPI import BRepPrimAPI_MakePrism
from OCP.GC import GC_MakeArcOfCircle
from OCP.gp import gp_Ax2, gp_Ax3, gp_Circ, gp_Dir, gp_Pln, gp_Pnt, gp_Vec
from OCP.ShapeUpgrade import ShapeUpgrade_UnifySameDomain
from OCP.TopoDS import TopoDS_Compound

from cadtrain.cad.sequence import Arc, CadSequence, Circle, Loop, Operation, Point2, Profile, SketchExtrude, SketchPlane
from cadtrain.errors import GeometryError
from cadtrain.geometry.assembly import Piece, assemble
from cadtrain.geometry.kernel.body import KERNEL_ERRORS, Solid, has_solid, passes_check, reason

try:  # OpenCascade 8 keeps its lists in one place, 7 has a module for this one
    from OCP.collections import List_TopoDS_Shape as _ShapeList
except ImportError:
    from OCP.TopTools import TopTools_ListOfShape as _ShapeList

_ADDING = (Operation.NEW, Operation.JOIN)


def build_solid(sequence: CadSequence) -> Solid:
    """The body that a design makes.

    `NEW` and `JOIN` add to the body that exists, a first step begins one whatever its operation. Steps of one kind in a
    row are done in one boolean operation, which is several times faster; should the result not be valid, they are done
    singly. Raises `GeometryError` of kind `profile` (no face from a step's loops), `boolean` (an operation failed),
    `empty` (nothing is left), `kernel` (anything else the kernel refuses).
    """
    if not sequence.steps:
        raise GeometryError("empty", "the sequence has no steps")
    unit = max(sequence.material_box().size)
    if not unit > 0:
        raise GeometryError("empty", "the design has no extent")
    try:
        tools = [_piece(step, unit, number) for number, step in enumerate(sequence.steps, start=1)]
        kinds = [_kind(step) for step in sequence.steps]
        shape, is_valid = _combined_somehow(tools, kinds)
        return Solid(shape, unit, is_valid)
    except KERNEL_ERRORS as error:
        raise GeometryError("kernel", reason(error)) from error


def _combined_somehow(tools: list[Piece], kinds: list[str]) -> tuple[Any, bool]:
    """The first valid result of two ways to combine the steps, else the first result at all; and whether it is
    valid."""
    results: list[Any] = []
    failures: list[GeometryError] = []
    for singly in (False, True):
        try:
            shape, is_valid = _combined(tools, kinds, singly=singly)
        except GeometryError as error:
            failures.append(error)
        except KERNEL_ERRORS as error:
            failures.append(GeometryError("boolean", reason(error)))
        else:
            if is_valid:
                return shape, True
            results.append(shape)
        if len(tools) == 1:
            break
    if not results:
        raise failures[0]
    return results[0], False


def _kind(step: SketchExtrude) -> str:
    return "add" if step.operation in _ADDING else str(step.operation)


def _piece(step: SketchExtrude, unit: float, number: int) -> Piece:
    box = step.bounding_box()
    return Piece(_extrusion(step, unit, number), np.array(box.low) / unit, np.array(box.high) / unit)


def _combined(tools: list[Piece], kinds: list[str], *, singly: bool) -> tuple[Any, bool]:
    body = assemble(tools, kinds, _boolean, singly=singly)
    if not body:
        raise GeometryError("empty", "nothing is left after the last step")
    return _simplified(body[0].shape if len(body) == 1 else _compound(piece.shape for piece in body))


def _compound(shapes: Iterable[Any]) -> Any:
    builder, compound = BRep_Builder(), TopoDS_Compound()
    builder.MakeCompound(compound)
    for shape in shapes:
        builder.Add(compound, shape)
    return compound


def _boolean(kind: str, body: Any, tools: list[Any], place: str) -> Any:
    """The result of a boolean operation, None where it is empty."""
    operation = {"add": BRepAlgoAPI_Fuse, "cut": BRepAlgoAPI_Cut, "intersect": BRepAlgoAPI_Common}[kind]()
    operation.SetArguments(_shape_list([body]))
    operation.SetTools(_shape_list(tools))
    operation.SetUseOBB(True)
    operation.Build()
    if not operation.IsDone():
        raise GeometryError("boolean", f"the kernel could not {kind} {place}")
    shape = operation.Shape()
    return shape if has_solid(shape) else None


def _shape_list(shapes: Iterable[Any]) -> Any:
    shape_list = _ShapeList()
    for shape in shapes:
        shape_list.Append(shape)
    return shape_list


def _simplified(shape: Any) -> tuple[Any, bool]:
    """The body with faces of one surface merged, or as it is where merging would break it; and whether it is valid."""
    try:
        merger = ShapeUpgrade_UnifySameDomain(shape, True, True, False)
        merger.Build()
        merged = merger.Shape()
        if has_solid(merged) and passes_check(merged):
            return merged, True
    except KERNEL_ERRORS:
        pass
    return shape, passes_check(shape)


def _extrusion(step: SketchExtrude, unit: float, number: int) -> Any:
    low, high = step.heights
    if not high > low:
        raise GeometryError("empty", f"the extrusion of step {number} has no thickness")
    length = (high - low) / unit
    direction = gp_Vec(*(axis * length for axis in step.plane.z_axis))

    def face(profile: Profile) -> Any:
        return _face(profile, step.plane, low, unit, number)

    def prism(base: Any) -> Any:
        return BRepPrimAPI_MakePrism(base, direction).Shape()

    try:
        base = face(step.profile)
        # The prism over a sound face is sound, and the face is checked several times faster.
        if not step.profile.inner or passes_check(base):
            return prism(base)
        # Inner loops that touch or cross the outer one make no face, but what they mean can still be cut out.
        holes = [prism(face(Profile(loop))) for loop in step.profile.inner]
        shape = _boolean("cut", prism(face(Profile(step.profile.outer))), holes, f"step {number}")
    except KERNEL_ERRORS as error:
        raise GeometryError("profile", f"step {number}: {reason(error)}") from error
    if shape is None:
        raise GeometryError("profile", f"step {number}: the inner loops leave nothing of the outer one")
    return shape


def _face(profile: Profile, plane: SketchPlane, height: float, unit: float, number: int) -> Any:
    def place(point: Point2) -> Any:
        x, y, z = plane.to_world(point, height)
        return gp_Pnt(x / unit, y / unit, z / unit)

    origin = place((0.0, 0.0))
    surface = gp_Pln(gp_Ax3(origin, gp_Dir(*plane.z_axis), gp_Dir(*plane.x_axis)))
    outer = profile.outer
    # The kernel wants the outer wire counter-clockwise about the normal and the inner ones clockwise.
    maker = BRepBuilderAPI_MakeFace(
        surface, _wire(outer if outer.signed_area > 0 else outer.reversed(), plane, place, unit), True
    )
    for loop in profile.inner:
        wire = _wire(loop if loop.signed_area > 0 else loop.reversed(), plane, place, unit)
        wire.Reverse()
        maker.Add(wire)
    if not maker.IsDone():
        raise GeometryError("profile", f"step {number}: the loops bound no face")
    return maker.Face()


def _wire(loop: Loop, plane: SketchPlane, place: Callable[[Point2], Any], unit: float) -> Any:
    maker = BRepBuilderAPI_MakeWire()
    first = loop.curves[0]
    if isinstance(first, Circle):
        center = place(first.center)
        axes = gp_Ax2(center, gp_Dir(*plane.z_axis), gp_Dir(*plane.x_axis))
        maker.Add(BRepBuilderAPI_MakeEdge(gp_Circ(axes, first.radius / unit)).Edge())
        return maker.Wire()
    curves = [curve for curve in loop.curves if not isinstance(curve, Circle)]
    points = [place(curve.start) for curve in curves]
    corners = [BRepBuilderAPI_MakeVertex(point).Vertex() for point in points]
    for index, curve in enumerate(curves):
        following = (index + 1) % len(curves)
        if isinstance(curve, Arc):
            middle = place(curve.mid)
            arc = GC_MakeArcOfCircle(points[index], middle, points[following])
            if not arc.IsDone():  # three points on a line: an arc as flat as the kernel's tolerance
                maker.Add(BRepBuilderAPI_MakeEdge(corners[index], corners[following]).Edge())
                continue
            geometry = arc.Value()
            ends = geometry.FirstParameter(), geometry.LastParameter()
            maker.Add(BRepBuilderAPI_MakeEdge(geometry, corners[index], corners[following], *ends).Edge())
        else:
            maker.Add(BRepBuilderAPI_MakeEdge(corners[index], corners[following]).Edge())
    return maker.Wire()
