"""DeepCAD's vectors: a design as rows of 17 whole numbers, with the values that DeepCAD's own code gives.

    column   0        1  2  3      4    5  6      7    8      9  10 11 12    13  14  15         16
             command  x  y  sweep  ccw  r  theta  phi  gamma  x  y  z  size  e1  e2  operation  extent

    command  0 line, 1 arc, 2 circle, 3 end of the sequence, 4 start of a loop, 5 extrusion; unused columns hold -1
    angles   128 + 128 a / pi, cut off at 255; all else as in `quantize`, in the frame `Frame.DEEPCAD`

Published measures and models use these numbers, so they are kept as they are, with their losses: the normal's azimuth
goes through an arctan without its quadrant, so that planes whose normal points to -x come out mirrored; half a turn
(256) is cut off at 255, 1.4 degrees short; distances beyond 1 are cut off; what rounds to nothing stays as a row. The
quantised sequence has none of that, and designs are never read back from vectors where their files are at hand.

Rounding is done on the same floating point operations in the same order as in DeepCAD, since many values lie exactly
halfway between two steps. Source: `cadlib/` of Wu et al., DeepCAD (ICCV 2021), whose vectors of 100 files this module's
tests hold it to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cadtrain.cad.formats.deepcad17_rows import (
    ARC,
    CIRCLE,
    END,
    EXTENTS,
    EXTRUDE,
    LINE,
    LOOP,
    OPERATIONS,
    Row,
    Rows,
    from_vectors,
    row,
    rows_of,
)
from cadtrain.cad.grid import CENTER, LEVELS, SKETCH_STEPS, Axes, cross, plane_axes
from cadtrain.cad.quantize import DEEPCAD_LARGEST_COORDINATE, round_to_grid
from cadtrain.cad.sequence import (
    Arc,
    CadSequence,
    Circle,
    Curve,
    Loop,
    Point2,
    SketchExtrude,
    SketchPlane,
    Vector3,
)
from cadtrain.errors import GeometryError

__all__ = ["LimitExceeded", "Row", "Rows", "from_vectors", "limits", "to_vectors"]

MAX_STEPS = 10
MAX_LOOPS = 6
MAX_LOOP_ROWS = 15
MAX_ROWS = 60
MAX_DISTANCE = 2.0


def to_vectors(sequence: CadSequence) -> Rows:
    """The design's rows, ended by one end row; never padded, never cut.

    A design as read from its file is scaled as DeepCAD does it, so that the largest absolute coordinate of the box that
    the file states is 0.75. One that `dequantize` made is left where it lies. Whatever exceeds DeepCAD's limits is
    here nevertheless: `limits` reports it. Raises `GeometryError` (`empty`) for a design without steps or extent.
    """
    if not sequence.steps:
        raise GeometryError("empty", "the sequence has no steps")
    if sequence.is_normalized:
        return rows_of(round_to_grid(sequence), lambda plane: _angles(*plane_axes(plane)))
    scale = _scale(sequence)
    rows = [numbers for place, step in enumerate(sequence.steps, 1) for numbers in _step_rows(step, scale, place)]
    return (*rows, row(END))


# ------------------------------------------------------------------------------------------------------------- limits


@dataclass(frozen=True, slots=True)
class LimitExceeded:
    """One thing in which a design goes beyond DeepCAD; `step` counts from 1, None where the whole design is meant."""

    kind: str
    """`steps`, `loops`, `curves`, `commands` or `distance`."""
    found: float
    limit: float
    step: int | None = None

    def __str__(self) -> str:
        what = {
            "steps": f"{self.found:g} extrusions",
            "loops": f"{self.found:g} loops",
            "curves": f"a loop of {self.found:g} curves",
            "commands": f"{self.found:g} commands",
            "distance": f"an extrusion by {self.found:g} of the normalised frame",
        }[self.kind]
        place = f"step {self.step}: " if self.step else ""
        return f"{place}{what}, DeepCAD takes no more than {self.limit:g}"


def limits(sequence: CadSequence) -> tuple[LimitExceeded, ...]:
    """In what a design exceeds the limits of DeepCAD, whose code drops such designs without a word; empty for most.

    The limits: 10 extrusions, 6 loops a profile, 14 curves a loop (15 rows with the loop's start), 60 commands with the
    end row, extrusions no longer than 2 in the normalised frame. Raises as `to_vectors` does.
    """
    rows = to_vectors(sequence)
    scale = 1.0 if sequence.is_normalized else _scale(sequence)
    found = []
    if len(sequence.steps) > MAX_STEPS:
        found.append(LimitExceeded("steps", len(sequence.steps), MAX_STEPS))
    if len(rows) > MAX_ROWS:
        found.append(LimitExceeded("commands", len(rows), MAX_ROWS))
    for number, step in enumerate(sequence.steps, 1):
        loops = step.profile.loops
        longest = max(len(loop.curves) for loop in loops)
        farthest = max(abs(step.distance_one * scale), abs(step.distance_two * scale))
        if len(loops) > MAX_LOOPS:
            found.append(LimitExceeded("loops", len(loops), MAX_LOOPS, number))
        if longest + 1 > MAX_LOOP_ROWS:
            found.append(LimitExceeded("curves", longest, MAX_LOOP_ROWS - 1, number))
        if farthest > MAX_DISTANCE:
            found.append(LimitExceeded("distance", farthest, MAX_DISTANCE, number))
    return tuple(found)


# ------------------------------------------------------------------------------------------------- in DeepCAD's own order


def _scale(sequence: CadSequence) -> float:
    box = sequence.bounding_box or sequence.material_box()
    extent = max(abs(value) for value in (*box.low, *box.high))
    if not (extent > 0 and math.isfinite(extent)):
        raise GeometryError("empty", f"the design's extent is {extent:g}, so there is nothing to scale")
    return DEEPCAD_LARGEST_COORDINATE / extent


def _step_rows(step: SketchExtrude, scale: float, number: int) -> Iterator[Row]:
    loops = sorted((_reordered(loop) for loop in step.profile.loops), key=lambda loop: _rounded(_low_corner(loop)))
    start, size = loops[0].start, _size(loops)
    if not size > 0:
        raise GeometryError("empty", f"the profile of step {number} has no extent")
    unit = SKETCH_STEPS / size

    def grid(point: Point2) -> tuple[int, int]:
        return (
            _clip((point[0] - start[0]) * unit + CENTER),
            _clip((point[1] - start[1]) * unit + CENTER),
        )

    for loop in loops:
        yield row(LOOP)
        for curve in loop.curves:
            yield _curve_row(curve, grid, unit)
    angles, x_axis, y_axis = _polar_frame(step.plane)
    origin = step.plane.origin
    position = [start[0] * x_axis[i] + start[1] * y_axis[i] + origin[i] for i in range(3)]
    yield row(
        EXTRUDE,
        *(_signed(angle / math.pi) for angle in angles),
        *(_signed(value * scale) for value in position),
        _clip(size * scale / 2 * LEVELS),
        _signed(step.distance_one * scale),
        _signed(step.distance_two * scale),
        OPERATIONS.index(step.operation),
        EXTENTS.index(step.extent),
    )


def _curve_row(curve: Curve, grid: Callable[[Point2], tuple[int, int]], unit: float) -> Row:
    if isinstance(curve, Circle):
        return row(CIRCLE, *grid(curve.center), _clip(curve.radius * unit, low=1))
    if not isinstance(curve, Arc):
        return row(LINE, *grid(curve.end))
    (sx, sy), (mx, my), (ex, ey) = grid(curve.start), grid(curve.mid), grid(curve.end)
    # Counter-clockwise is told from the rounded points, so that a flat arc always counts as such.
    is_ccw = (mx - sx) * (ey - sy) - (my - sy) * (ex - sx) >= 0
    return row(ARC, ex, ey, _clip(abs(curve.sweep_rad) / (2 * math.pi) * LEVELS, low=1), int(is_ccw))


def _reordered(loop: Loop) -> Loop:
    """The loop from its left-most, then lowest corner, turned by the sense of rotation at that corner."""
    if isinstance(loop.curves[0], Circle):
        return loop
    curves = [curve for curve in loop.curves if not isinstance(curve, Circle)]
    starts = [_rounded(curve.start) for curve in curves]
    first = starts.index(min(starts))
    curves = curves[first:] + curves[:first]
    before, after = curves[-1], curves[0]
    back = before.mid if isinstance(before, Arc) else before.start
    ahead = after.mid if isinstance(after, Arc) else after.end
    ax, ay = before.end[0] - back[0], before.end[1] - back[1]
    bx, by = ahead[0] - after.start[0], ahead[1] - after.start[1]
    return Loop(tuple(curves)) if ax * by - ay * bx > 0 else Loop(tuple(curves)).reversed()


def _size(loops: Sequence[Loop]) -> float:
    boxes = [loop.bounding_box() for loop in loops]
    x, y = loops[0].start
    reach = [value - x for low, high in boxes for value in (low[0], high[0])]
    reach += [value - y for low, high in boxes for value in (low[1], high[1])]
    return max(map(abs, reach))


def _low_corner(loop: Loop) -> Point2:
    return loop.bounding_box()[0]


def _rounded(point: Point2) -> Point2:
    return round(point[0], 6), round(point[1], 6)


def _clip(value: float, low: int = 0) -> int:
    return min(LEVELS - 1, max(low, round(value)))


def _signed(value: float) -> int:
    return _clip((value + 1.0) / 2 * LEVELS)


# ------------------------------------------------------------------------------------------------------------ orientation


def _angles(x_axis: Vector3, y_axis: Vector3, z_axis: Vector3) -> tuple[int, int, int]:
    theta, phi, gamma = _polar_frame(SketchPlane((0.0, 0.0, 0.0), x_axis, y_axis, z_axis))[0]
    return _signed(theta / math.pi), _signed(phi / math.pi), _signed(gamma / math.pi)


def _polar_frame(plane: SketchPlane) -> tuple[tuple[float, float, float], Vector3, Vector3]:
    """theta, phi and gamma, then the x and y axis that DeepCAD makes of them (mirrored with the plane)."""
    theta, phi = _polar(plane.z_axis)
    _, ref_x, ref_y = _reference(theta, phi)
    gamma = math.acos(max(-1.0, min(1.0, round(_dot(plane.x_axis, ref_x), 6))))
    if _dot(cross(ref_x, plane.x_axis), plane.z_axis) < 0:
        gamma = -gamma
    c, s = math.cos(gamma), math.sin(gamma)
    x_axis = (ref_x[0] * c + ref_y[0] * s, ref_x[1] * c + ref_y[1] * s, ref_x[2] * c + ref_y[2] * s)
    return (theta, phi, gamma), x_axis, _reference(*_polar(plane.y_axis))[0]


def _polar(vector: Vector3) -> tuple[float, float]:
    x, y, z = (round(value, 6) for value in vector)
    cosine = z / math.sqrt(x * x + y * y + z * z)
    return math.acos(max(-1.0, min(1.0, cosine))), math.atan(y / (x + 1e-15))


def _reference(theta: float, phi: float) -> Axes:
    normal = (math.sin(theta) * math.cos(phi), math.sin(theta) * math.sin(phi), math.cos(theta))
    ref_x = (math.cos(theta) * math.cos(phi), math.cos(theta) * math.sin(phi), -math.sin(theta))
    return normal, ref_x, cross(normal, ref_x)


def _dot(a: Vector3, b: Vector3) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
