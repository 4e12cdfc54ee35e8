"""Designs as 8-bit whole numbers, and the way there and back.

`quantize` first moves a design into the normalised frame (`normalize`), then rounds it to the grid (`round_to_grid`);
`dequantize` gives the design that the grid values mean, still in the normalised frame. `quantize(dequantize(q)) == q`
for every q.

Normalised frame: a part lies in [-1, 1]^3. `Frame.CENTRED` (the default) puts the middle of the part at the origin and
makes its longest side 0.9375, 120 grid steps, a number that halves, thirds, quarters, fifths, sixths and eighths of the
part divide; no extrusion of the part can then be longer than the grid. `Frame.DEEPCAD` only scales, so that the largest
absolute coordinate is 0.75: the published vectors' frame, in which an extrusion across the origin may be longer than 1
and is cut off at 1.

Grid values, all 0..255, with v a normalised length:

    position                128 + 128 v      of the sketch's start point, the left-most corner of its outer loop
    size                    128 v, at least 1; v is the largest distance in x or y from the start to the profile's box
    sketch x, y             128 + 95 c / v   with c relative to the start point
    circle radius           95 r / v, at least 1
    arc sweep               256 angle / 2 pi, at least 1
    distance_one, _two      128 + 128 v, at least one step from 128 where the extent is used
    plane                   one of 24 axis frames, or three angles in steps of 2 pi / 256

Source: DeepCAD's `numericalize` (Wu et al., ICCV 2021, `cadlib/`), from which this departs in four ways: orientation
goes through atan2, so that no plane comes back mirrored; what shrinks to nothing is left out, so that no solid fails on
it; a thin extrusion never becomes flat; and values halfway between two steps always go up, so that float noise decides
nothing. `formats.deepcad17` gives DeepCAD's own numbers.
"""

from __future__ import annotations

import math
from dataclasses import replace
from enum import StrEnum
from itertools import pairwise

from cadtrain.cad.grid import (
    AXIS_ANGLES,
    CENTER,
    LEVELS,
    SKETCH_STEPS,
    PlaneAngles,
    QuantizedArc,
    QuantizedCircle,
    QuantizedCurve,
    QuantizedLine,
    QuantizedLoop,
    QuantizedSequence,
    QuantizedStep,
    axes_from_angles,
    plane_axes,
)
from cadtrain.cad.sequence import (
    Arc,
    BoundingBox,
    CadSequence,
    Circle,
    Curve,
    Extent,
    Line,
    Loop,
    Operation,
    Point2,
    Profile,
    SketchExtrude,
    SketchPlane,
    Vector3,
)
from cadtrain.errors import GeometryError

QUANTIZER_VERSION = 2
"""Raised whenever a design comes out as other numbers; half-made datasets and the demo's cache are kept apart by it."""
CENTRED_LONGEST_SIDE = 120 / 128
DEEPCAD_LARGEST_COORDINATE = 0.75
_TIE_TOLERANCE = 1e-4
"""In grid steps: above the noise of coordinates that were stored in single precision."""


class Frame(StrEnum):
    """How a design is moved into [-1, 1]^3; the module's text says what each does."""

    CENTRED = "centred"
    DEEPCAD = "deepcad"


def quantize(
    sequence: CadSequence, *, frame: Frame = Frame.CENTRED, box: BoundingBox | None = None
) -> QuantizedSequence:
    """The design on the 8-bit grid.

    A sequence that `dequantize` made is rounded where it lies; any other is normalised first, `box` being the solid's
    true bounding box where the caller knows it. Raises `GeometryError` (kinds `empty`, `below_resolution`) for a design
    without steps, without extent, or whose first profile is thinner than half a grid step.
    """
    return round_to_grid(sequence if sequence.is_normalized else normalize(sequence, frame=frame, box=box))


def dequantize(quantized: QuantizedSequence) -> CadSequence:
    """The design that the grid values stand for, in the normalised frame; exact, total and without side effects."""
    return CadSequence(tuple(_dequantize_step(step) for step in quantized.steps))


# -------------------------------------------------------------------------------------------- normalise


def normalize(sequence: CadSequence, *, frame: Frame = Frame.CENTRED, box: BoundingBox | None = None) -> CadSequence:
    """The same design in the normalised frame, unrounded, with every loop in canonical order.

    Loops start at their left-most (then lowest) corner and run counter-clockwise, inner loops are sorted by the low
    corner of their boxes, the sketch plane's origin is the outer loop's start. `box` replaces the box that scales the
    design: by default the box of all added material, or in the DeepCAD frame the box that the file states. Raises as
    `quantize` does.
    """
    if not sequence.steps:
        raise GeometryError("empty", "the sequence has no steps")
    if box is None:
        stated = sequence.bounding_box if frame is Frame.DEEPCAD else None
        box = stated or sequence.material_box()
    if frame is Frame.CENTRED:
        extent, target = max(box.size), CENTRED_LONGEST_SIDE
        offset = box.center
    else:
        extent, target = max(abs(value) for value in (*box.low, *box.high)), DEEPCAD_LARGEST_COORDINATE
        offset = (0.0, 0.0, 0.0)
    if not (extent > 0 and math.isfinite(extent)):
        raise GeometryError("empty", f"the design's extent is {extent:g}, so there is nothing to scale")
    scale = target / extent
    return CadSequence(tuple(_normalize_step(step, scale, offset) for step in sequence.steps))


def _normalize_step(step: SketchExtrude, scale: float, offset: Vector3) -> SketchExtrude:
    outer = _canonical_loop(step.profile.outer)
    start = outer.start
    inner = sorted((_canonical_loop(loop) for loop in step.profile.inner), key=_low_corner)
    profile = Profile(outer, tuple(inner))
    (x0, y0), (x1, y1) = profile.bounding_box()
    size = max(abs(x0 - start[0]), abs(x1 - start[0]), abs(y0 - start[1]), abs(y1 - start[1])) * scale
    x, y, z = step.plane.to_world(start)
    origin = ((x - offset[0]) * scale, (y - offset[1]) * scale, (z - offset[2]) * scale)
    return replace(
        step,
        plane=replace(step.plane, origin=origin),
        profile=Profile(_moved(outer, start, scale), tuple(_moved(loop, start, scale) for loop in inner)),
        distance_one=step.distance_one * scale,
        distance_two=step.distance_two * scale,
        sketch_size=size,
    )


def _canonical_loop(loop: Loop) -> Loop:
    if isinstance(loop.curves[0], Circle):
        return loop
    if loop.signed_area < 0:
        loop = loop.reversed()
    (x0, y0), (x1, y1) = loop.bounding_box()
    unit = max(x1 - x0, y1 - y0) or 1.0
    # Rounded, so that two corners on one vertical edge compare by height and not by the last bit of x.
    starts = [(round((c.start[0] - x0) / unit, 6), round((c.start[1] - y0) / unit, 6)) for c in _open_curves(loop)]
    first = starts.index(min(starts))
    return Loop(loop.curves[first:] + loop.curves[:first])


def _open_curves(loop: Loop) -> list[Line | Arc]:
    return [curve for curve in loop.curves if not isinstance(curve, Circle)]


def _low_corner(loop: Loop) -> Point2:
    (x, y), _ = loop.bounding_box()
    return x, y


def _moved(loop: Loop, origin: Point2, scale: float) -> Loop:
    def move(point: Point2) -> Point2:
        return (point[0] - origin[0]) * scale, (point[1] - origin[1]) * scale

    curves: list[Curve] = []
    for curve in loop.curves:
        if isinstance(curve, Circle):
            curves.append(Circle(move(curve.center), curve.radius * scale))
        elif isinstance(curve, Arc):
            curves.append(Arc(move(curve.start), move(curve.mid), move(curve.end)))
        else:
            curves.append(Line(move(curve.start), move(curve.end)))
    return Loop(tuple(curves))


# -------------------------------------------------------------------------------------------- round


def round_to_grid(sequence: CadSequence) -> QuantizedSequence:
    """The nearest grid values of a normalised sequence.

    What shrinks to nothing is left out: a curve to a point, an inner loop to a line, a step to a profile without area.
    Raises `GeometryError` (`below_resolution`) where the first step or an intersection shrinks so, because the rest
    would then mean something else, and `ValueError` for a sequence that is not normalised.
    """
    steps = []
    for number, step in enumerate(sequence.steps, start=1):
        quantized = _quantize_step(step, number)
        if quantized is not None:
            steps.append(quantized)
        elif number == 1 or step.operation is Operation.INTERSECT:
            reason = f"the profile of step {number} ({step.operation}) is thinner than half a grid step"
            raise GeometryError("below_resolution", reason)
    return QuantizedSequence(tuple(steps))


def _quantize_step(step: SketchExtrude, number: int) -> QuantizedStep | None:
    if step.sketch_size is None:
        raise ValueError(f"step {number} is not normalised; call normalize() first")
    if not step.sketch_size > 0:
        return None
    size = _clip(_nearest(step.sketch_size * CENTER), low=1)
    outer = _quantize_loop(step.profile.outer, step.sketch_size)
    if outer is None:
        return None
    inner = (_quantize_loop(loop, step.sketch_size) for loop in step.profile.inner)
    x, y, z = step.plane.origin
    distance_one, distance_two = _quantize_distances(step, number)
    return QuantizedStep(
        plane=quantize_plane(step.plane),
        position=(_from_center(CENTER * x), _from_center(CENTER * y), _from_center(CENTER * z)),
        size=size,
        outer=outer,
        inner=tuple(loop for loop in inner if loop is not None),
        operation=step.operation,
        extent=step.extent,
        distance_one=distance_one,
        distance_two=distance_two,
    )


def _nearest(value: float) -> int:
    """The nearest whole number; what lies halfway, but for float noise, goes up.

    Halves are common: the radius of a circle that is alone in its sketch is always 47.5 steps. Rounded as it comes, noise
    in the last bit would choose between two texts for one design. Always going the same way also keeps planes together: a
    part 15 steps thick from -7.5 ends where a sketch at 7.5 lies.
    """
    return math.floor(value + 0.5 + _TIE_TOLERANCE)


def _clip(value: int, low: int = 0, high: int = LEVELS - 1) -> int:
    return min(high, max(low, value))


def _from_center(steps: float) -> int:
    return _clip(CENTER + _nearest(steps))


def _quantize_distances(step: SketchExtrude, number: int) -> tuple[int, int]:
    low, high = step.heights
    if not high > low:
        raise GeometryError("empty", f"the extrusion of step {number} has no thickness")
    one, two = _from_center(CENTER * step.distance_one), _from_center(CENTER * step.distance_two)
    if step.extent is Extent.SYMMETRIC:
        return max(CENTER + 1, _from_center(CENTER * high)), CENTER
    if step.extent is Extent.ONE_SIDE:
        two = CENTER
    if one == two == CENTER:  # Thinner than half a step: keep the thinnest extrusion on the same side.
        if abs(step.distance_one) >= abs(step.distance_two):
            one += 1 if step.distance_one > 0 else -1
        else:
            two += 1 if step.distance_two > 0 else -1
    return one, two


def _quantize_loop(loop: Loop, size: float) -> QuantizedLoop | None:
    def grid(point: Point2) -> tuple[int, int]:
        return _from_center(SKETCH_STEPS * point[0] / size), _from_center(SKETCH_STEPS * point[1] / size)

    first = loop.curves[0]
    if isinstance(first, Circle):
        x, y = grid(first.center)
        return QuantizedLoop((QuantizedCircle(x, y, _clip(_nearest(SKETCH_STEPS * first.radius / size), low=1)),))
    curves: list[QuantizedCurve] = []
    open_curves = _open_curves(loop)
    # The chain's points are rounded once each, so that the loop stays closed whatever is left out.
    points = [grid(open_curves[-1].end), *(grid(curve.end) for curve in open_curves)]
    for curve, (start, end) in zip(open_curves, pairwise(points), strict=True):
        if start == end:
            continue
        if isinstance(curve, Arc):
            sweep = curve.sweep_rad
            turn = _clip(_nearest(LEVELS * abs(sweep) / (2 * math.pi)), low=1)
            curves.append(QuantizedArc(*end, turn, is_ccw=sweep > 0))
        else:
            curves.append(QuantizedLine(*end))
    return QuantizedLoop(tuple(curves)) if QuantizedLoop.fault(curves) is None else None


def quantize_plane(plane: SketchPlane) -> int | PlaneAngles:
    """The nearest orientation on the grid, in its one spelling: an axis frame, else three angles."""
    nx, ny, nz = plane.z_axis
    steps_per_rad = LEVELS / (2 * math.pi)
    theta = _nearest(math.acos(max(-1.0, min(1.0, nz))) * steps_per_rad)
    # At the poles the normal's azimuth means nothing: gamma alone says how the sketch is turned.
    phi = 0 if theta in (0, LEVELS // 2) else _nearest(math.atan2(ny, nx) * steps_per_rad) % LEVELS
    ref_x, ref_y, _ = axes_from_angles(PlaneAngles(theta, phi, 0))
    along_x = sum(a * b for a, b in zip(plane.x_axis, ref_x, strict=True))
    along_y = sum(a * b for a, b in zip(plane.x_axis, ref_y, strict=True))
    gamma = _nearest(math.atan2(along_y, along_x) * steps_per_rad) % LEVELS
    angles = PlaneAngles(theta, phi, gamma)
    return AXIS_ANGLES.index(angles) if angles.is_axis_frame else angles


# -------------------------------------------------------------------------------------------- dequantise


def _dequantize_step(step: QuantizedStep) -> SketchExtrude:
    size = step.size / CENTER
    unit = size / SKETCH_STEPS
    x_axis, y_axis, z_axis = plane_axes(step.plane)
    x, y, z = ((value - CENTER) / CENTER for value in step.position)
    return SketchExtrude(
        plane=SketchPlane((x, y, z), x_axis, y_axis, z_axis),
        profile=Profile(_dequantize_loop(step.outer, unit), tuple(_dequantize_loop(loop, unit) for loop in step.inner)),
        operation=step.operation,
        extent=step.extent,
        distance_one=(step.distance_one - CENTER) / CENTER,
        distance_two=(step.distance_two - CENTER) / CENTER,
        sketch_size=size,
    )


def _dequantize_loop(loop: QuantizedLoop, unit: float) -> Loop:
    return Loop(
        tuple(
            Circle(_scaled(curve.center, unit), curve.radius * unit)
            if isinstance(curve, Circle)
            else Arc(_scaled(curve.start, unit), _scaled(curve.mid, unit), _scaled(curve.end, unit))
            if isinstance(curve, Arc)
            else Line(_scaled(curve.start, unit), _scaled(curve.end, unit))
            for curve in loop.on_grid().curves
        )
    )


def _scaled(point: Point2, unit: float) -> Point2:
    return (point[0] - CENTER) * unit, (point[1] - CENTER) * unit
