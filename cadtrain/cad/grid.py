"""The 8-bit form of a design: whole numbers on a grid, immutable, comparable, hashable.

What the numbers mean is said in `quantize`. The constructors refuse what could not be a design at all, so that whatever
exists can be written by a codec and read back: values outside 0..255, loops that are not closed chains or enclose
nothing, extrusions without thickness, a plane that has two spellings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from cadtrain.cad.sequence import Arc, Circle, Curve, Extent, Line, Loop, Operation, Point2, Vector3

LEVELS = 256
CENTER = 128
"""The grid value of zero."""
SKETCH_STEPS = 95
"""Grid steps from a sketch's start point to the far side of its box: 0.75 of the half grid, less one (DeepCAD)."""

Axes = tuple[Vector3, Vector3, Vector3]


def _check_range(what: str, *values: int, low: int = 0, high: int = LEVELS - 1) -> None:
    for value in values:
        if not low <= value <= high:
            raise ValueError(f"{what} is {value}, outside {low}..{high}")


def _axis_frames() -> tuple[Axes, ...]:
    """Six normals (+z -y +x -z +y -x) by four quarter turns of the x axis, which starts at +x (at +y for the normals
    +x, -x)."""
    normals: tuple[Vector3, ...] = (
        (0.0, 0.0, 1.0), (0.0, -1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, -1.0), (0.0, 1.0, 0.0), (-1.0, 0.0, 0.0),
    )  # fmt: skip
    frames = []
    for normal in normals:
        x_axis: Vector3 = (0.0, 1.0, 0.0) if normal[0] else (1.0, 0.0, 0.0)
        for _ in range(4):
            y_axis = cross(normal, x_axis)
            frames.append((x_axis, y_axis, normal))
            x_axis = y_axis
    return tuple(frames)


def cross(a: Vector3, b: Vector3) -> Vector3:
    """The vector product; its zeros are positive zeros."""
    x, y, z = a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]
    return x + 0.0, y + 0.0, z + 0.0


AXIS_FRAMES: tuple[Axes, ...] = _axis_frames()
"""The 24 proper rotations of the coordinate axes as (x_axis, y_axis, z_axis)."""


@dataclass(frozen=True, slots=True)
class PlaneAngles:
    """A sketch plane's rotation in steps of 2 pi / 256.

    `theta` (0..128) is the normal's angle from +z, `phi` its azimuth, `gamma` the turn of the x axis about the normal
    from the direction in which theta grows. At the poles (theta 0 or 128) phi is 0.
    """

    theta: int
    phi: int
    gamma: int

    @property
    def is_axis_frame(self) -> bool:
        """Whether the rotation takes axes to axes, so that it is spelt as one of `AXIS_FRAMES`."""
        return self.theta % 64 == 0 and self.phi % 64 == 0 and self.gamma % 64 == 0

    def fault(self) -> str | None:
        """Why the angles are not the one spelling of a plane, or None."""
        if self.theta > CENTER:
            return f"theta is {self.theta}, it ends at {CENTER}"
        if self.theta in (0, CENTER) and self.phi:
            return f"phi is {self.phi}, it must be 0 where theta is {self.theta}"
        return "these angles are an axis frame and must be written as one" if self.is_axis_frame else None

    def __post_init__(self) -> None:
        _check_range("angle", self.theta, self.phi, self.gamma)


def axes_from_angles(angles: PlaneAngles) -> Axes:
    """The plane's x, y and z axis."""
    return axes_from_radians(*(value * 2 * math.pi / LEVELS for value in (angles.theta, angles.phi, angles.gamma)))


def axes_from_radians(theta: float, phi: float, gamma: float) -> Axes:
    """The x, y and z axis of a plane; any angles will do. Source: DeepCAD's polar parameterisation."""
    normal = (math.sin(theta) * math.cos(phi), math.sin(theta) * math.sin(phi), math.cos(theta))
    ref_x = (math.cos(theta) * math.cos(phi), math.cos(theta) * math.sin(phi), -math.sin(theta))
    ref_y = cross(normal, ref_x)
    c, s = math.cos(gamma), math.sin(gamma)
    x_axis = (c * ref_x[0] + s * ref_y[0], c * ref_x[1] + s * ref_y[1], c * ref_x[2] + s * ref_y[2])
    return x_axis, cross(normal, x_axis), normal


def _axis_angles() -> tuple[PlaneAngles, ...]:
    places = {}
    for theta in (0, 64, CENTER):
        for phi in (0, 64, 128, 192) if theta == 64 else (0,):
            for gamma in (0, 64, 128, 192):
                angles = PlaneAngles(theta, phi, gamma)
                x, y, z = (tuple(float(round(value)) for value in axis) for axis in axes_from_angles(angles))
                places[AXIS_FRAMES.index((x, y, z))] = angles
    return tuple(places[place] for place in range(len(AXIS_FRAMES)))


AXIS_ANGLES: tuple[PlaneAngles, ...] = _axis_angles()
"""The angles of `AXIS_FRAMES`, place by place."""


def plane_axes(plane: int | PlaneAngles) -> Axes:
    """The axes of a quantised plane, whichever way it is spelt."""
    return AXIS_FRAMES[plane] if isinstance(plane, int) else axes_from_angles(plane)


@dataclass(frozen=True, slots=True)
class QuantizedLine:
    """A line to (x, y) from where the curve before it ended."""

    x: int
    y: int


@dataclass(frozen=True, slots=True)
class QuantizedArc:
    """An arc to (x, y) that turns by `sweep` (1..255) steps of 2 pi / 256, counter-clockwise or not."""

    x: int
    y: int
    sweep: int
    is_ccw: bool


@dataclass(frozen=True, slots=True)
class QuantizedCircle:
    """A circle around (x, y); `radius` is 1..255."""

    x: int
    y: int
    radius: int


QuantizedCurve = QuantizedLine | QuantizedArc | QuantizedCircle


@dataclass(frozen=True, slots=True)
class QuantizedLoop:
    """A closed chain: each curve gives its end, the first one begins where the last one ends; or one circle."""

    curves: tuple[QuantizedCurve, ...]

    def on_grid(self) -> Loop:
        """The loop with the grid values as its coordinates."""
        return _on_grid(self.curves)

    @staticmethod
    def fault(curves: Sequence[QuantizedCurve]) -> str | None:
        """Why the curves make no loop, or None."""
        if not curves:
            return "a loop has no curves"
        if any(isinstance(curve, QuantizedCircle) for curve in curves):
            return None if len(curves) == 1 else "a circle stands beside other curves in one loop"
        if len(curves) == 1:
            return "a loop of one curve is not closed"
        points = [(curve.x, curve.y) for curve in (curves[-1], *curves)]
        if any(start == end for start, end in pairwise(points)):
            return "a curve ends where it starts"
        if abs(_on_grid(curves).signed_area) < 1e-6:
            return "a loop encloses no area"
        return None

    def __post_init__(self) -> None:
        for curve in self.curves:
            _check_range("coordinate", curve.x, curve.y)
            if isinstance(curve, QuantizedArc):
                _check_range("arc sweep", curve.sweep, low=1)
            elif isinstance(curve, QuantizedCircle):
                _check_range("circle radius", curve.radius, low=1)
        if reason := self.fault(self.curves):
            raise ValueError(reason)


def _on_grid(curves: Sequence[QuantizedCurve]) -> Loop:
    last = curves[-1]
    if isinstance(last, QuantizedCircle):
        return Loop((Circle((last.x, last.y), last.radius),))
    chain: list[Curve] = []
    start: Point2 = (last.x, last.y)
    for curve in curves:
        end = (curve.x, curve.y)
        if isinstance(curve, QuantizedArc):
            sweep = curve.sweep * 2 * math.pi / LEVELS
            chain.append(Arc.from_sweep(start, end, sweep if curve.is_ccw else -sweep))
        else:
            chain.append(Line(start, end))
        start = end
    return Loop(tuple(chain))


@dataclass(frozen=True, slots=True)
class QuantizedStep:
    """One profile on one plane, extruded: the fields of `sequence.SketchExtrude` on the grid.

    `plane` is an index into `AXIS_FRAMES` or, for any other rotation, `PlaneAngles`. `distance_two` is 128 (zero)
    unless the extent is two-sided.
    """

    plane: int | PlaneAngles
    position: tuple[int, int, int]
    size: int
    outer: QuantizedLoop
    inner: tuple[QuantizedLoop, ...]
    operation: Operation
    extent: Extent
    distance_one: int
    distance_two: int = CENTER

    @property
    def loops(self) -> tuple[QuantizedLoop, ...]:
        """The outer loop, then the inner ones."""
        return (self.outer, *self.inner)

    @staticmethod
    def extent_fault(extent: Extent, distance_one: int, distance_two: int) -> str | None:
        """Why the distances make no extrusion, or None."""
        if extent is not Extent.TWO_SIDES and distance_two != CENTER:
            return f"the second distance is {distance_two}, only a two-sided extrusion has one"
        if distance_one == distance_two == CENTER:
            return "the extrusion has no thickness"
        if extent is Extent.SYMMETRIC and distance_one < CENTER:
            return f"the distance is {distance_one}, to both sides of the plane it must be above {CENTER}"
        return None

    def __post_init__(self) -> None:
        if isinstance(self.plane, int):
            _check_range("axis frame", self.plane, high=len(AXIS_FRAMES) - 1)
        elif reason := self.plane.fault():
            raise ValueError(reason)
        _check_range("position", *self.position)
        _check_range("size", self.size, low=1)
        _check_range("distance", self.distance_one, self.distance_two)
        if reason := self.extent_fault(self.extent, self.distance_one, self.distance_two):
            raise ValueError(reason)


@dataclass(frozen=True, slots=True)
class QuantizedSequence:
    """A design on the grid; at least one step."""

    steps: tuple[QuantizedStep, ...]

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError("a sequence has no steps")

    @property
    def num_curves(self) -> int:
        """Curves in all loops of all steps."""
        return sum(len(loop.curves) for step in self.steps for loop in step.loops)
