"""A design as its author drew it: sketches on planes, each extruded and combined with the body so far.

All lengths are floats in the source's unit (metres for DeepCAD and Omni-CAD files), all values immutable. One step
holds one profile; a feature that extrudes several profiles is several steps (`formats.deepcad` says how). A step's two
distances are signed along the plane's normal:

    one_side    from the plane to  +distance_one;            distance_two is 0
    symmetric   from -distance_one to +distance_one;         distance_two is 0
    two_sides   from the plane to +distance_one and from the plane to -distance_two, together
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

Point2 = tuple[float, float]
Vector3 = tuple[float, float, float]
Box2 = tuple[Point2, Point2]


@dataclass(frozen=True, slots=True)
class Line:
    """A straight curve from `start` to `end`."""

    start: Point2
    end: Point2

    def reversed(self) -> Line:
        """The same curve, run the other way."""
        return Line(self.end, self.start)


@dataclass(frozen=True, slots=True)
class Arc:
    """A circular curve from `start` through `mid`, its middle by angle, to `end`; the three points fix its sense of
    rotation."""

    start: Point2
    mid: Point2
    end: Point2

    def reversed(self) -> Arc:
        """The same curve, run the other way."""
        return Arc(self.end, self.mid, self.start)

    @classmethod
    def from_sweep(cls, start: Point2, end: Point2, sweep_rad: float) -> Arc:
        """The arc that turns by `sweep_rad` (0 < |sweep| < 2 pi, positive counter-clockwise) on its way from `start` to
        `end`."""
        # The middle is half a chord times tan(sweep / 4) off the chord, on the right of a counter-clockwise arc.
        bulge = math.tan(sweep_rad / 4)
        dx, dy = end[0] - start[0], end[1] - start[1]
        return cls(start, ((start[0] + end[0] + bulge * dy) / 2, (start[1] + end[1] - bulge * dx) / 2), end)

    @property
    def sweep_rad(self) -> float:
        """The turned angle in (-2 pi, 2 pi), positive counter-clockwise."""
        ax, ay = self.mid[0] - self.start[0], self.mid[1] - self.start[1]
        bx, by = self.end[0] - self.mid[0], self.end[1] - self.mid[1]
        # Start, middle and end: the tangent turns by half the sweep between the two equal chords.
        return 2 * math.atan2(ax * by - ay * bx, ax * bx + ay * by)

    @property
    def radius(self) -> float:
        """The circle's radius."""
        sine = abs(math.sin(self.sweep_rad / 4))
        half_chord = math.dist(self.start, self.mid) / 2
        return half_chord / sine if sine > 0 else math.inf

    @property
    def center(self) -> Point2:
        """The circle's centre."""
        dx, dy = self.mid[0] - (self.start[0] + self.end[0]) / 2, self.mid[1] - (self.start[1] + self.end[1]) / 2
        height = math.hypot(dx, dy)
        if height == 0:
            return self.mid
        radius = self.radius
        return self.mid[0] - dx / height * radius, self.mid[1] - dy / height * radius


@dataclass(frozen=True, slots=True)
class Circle:
    """A full circle; always alone in its loop."""

    center: Point2
    radius: float


Curve = Line | Arc | Circle


@dataclass(frozen=True, slots=True)
class Loop:
    """A closed chain of curves, head to tail, or one circle."""

    curves: tuple[Curve, ...]

    @property
    def start(self) -> Point2:
        """Where the loop begins; a circle begins at its left-most point."""
        first = self.curves[0]
        return (first.center[0] - first.radius, first.center[1]) if isinstance(first, Circle) else first.start

    @property
    def signed_area(self) -> float:
        """The enclosed area, positive when the loop runs counter-clockwise (a circle does)."""
        area = 0.0
        ox, oy = self.start
        for curve in self.curves:
            if isinstance(curve, Circle):
                area += math.pi * curve.radius**2
                continue
            (x0, y0), (x1, y1) = curve.start, curve.end
            area += ((x0 - ox) * (y1 - oy) - (x1 - ox) * (y0 - oy)) / 2
            if isinstance(curve, Arc):
                sweep = curve.sweep_rad
                area += curve.radius**2 * (sweep - math.sin(sweep)) / 2 if sweep else 0.0
        return area

    def bounding_box(self) -> Box2:
        """`(low, high)` corners in the sketch plane, arcs measured exactly."""
        boxes = [_curve_box(curve) for curve in self.curves]
        low = min(box[0][0] for box in boxes), min(box[0][1] for box in boxes)
        return low, (max(box[1][0] for box in boxes), max(box[1][1] for box in boxes))

    def reversed(self) -> Loop:
        """The same loop, run the other way from the same start; a circle stays as it is."""
        return Loop(tuple(c if isinstance(c, Circle) else c.reversed() for c in reversed(self.curves)))


def _curve_box(curve: Curve) -> Box2:
    if isinstance(curve, Circle):
        (x, y), r = curve.center, curve.radius
        return (x - r, y - r), (x + r, y + r)
    xs, ys = [curve.start[0], curve.end[0]], [curve.start[1], curve.end[1]]
    if isinstance(curve, Arc) and (sweep := curve.sweep_rad):
        (cx, cy), radius = curve.center, curve.radius
        begin = math.atan2(curve.start[1] - cy, curve.start[0] - cx)
        low, high = sorted((begin, begin + sweep))
        for quarter in range(math.ceil(low / (math.pi / 2)), math.floor(high / (math.pi / 2)) + 1):
            xs.append(cx + radius * (1, 0, -1, 0)[quarter % 4])
            ys.append(cy + radius * (0, 1, 0, -1)[quarter % 4])
    return (min(xs), min(ys)), (max(xs), max(ys))


@dataclass(frozen=True, slots=True)
class Profile:
    """A region of the sketch plane: inside `outer`, outside every loop of `inner`."""

    outer: Loop
    inner: tuple[Loop, ...] = ()

    @property
    def loops(self) -> tuple[Loop, ...]:
        """The outer loop, then the inner ones."""
        return (self.outer, *self.inner)

    @property
    def area(self) -> float:
        """The region's area, where the inner loops lie inside the outer one and apart from each other."""
        return abs(self.outer.signed_area) - sum(abs(loop.signed_area) for loop in self.inner)

    def bounding_box(self) -> Box2:
        """`(low, high)` corners of all loops in the sketch plane."""
        boxes = [loop.bounding_box() for loop in self.loops]
        low = min(box[0][0] for box in boxes), min(box[0][1] for box in boxes)
        return low, (max(box[1][0] for box in boxes), max(box[1][1] for box in boxes))


@dataclass(frozen=True, slots=True)
class SketchPlane:
    """A right-handed orthonormal frame in space; `z_axis` is the direction of a positive extrusion."""

    origin: Vector3
    x_axis: Vector3
    y_axis: Vector3
    z_axis: Vector3

    def to_world(self, point: Point2, height: float = 0.0) -> Vector3:
        """The point of the plane (lifted by `height` along the normal) in space."""
        (ox, oy, oz), (ax, ay, az), (bx, by, bz), (nx, ny, nz) = self.origin, self.x_axis, self.y_axis, self.z_axis
        x, y = point
        return (
            ox + x * ax + y * bx + height * nx,
            oy + x * ay + y * by + height * ny,
            oz + x * az + y * bz + height * nz,
        )


class Operation(StrEnum):
    """How an extrusion meets the body so far. `NEW` adds like `JOIN`; with no body yet every operation begins one."""

    NEW = "new"
    JOIN = "join"
    CUT = "cut"
    INTERSECT = "intersect"


class Extent(StrEnum):
    """Which way an extrusion goes from its plane."""

    ONE_SIDE = "one_side"
    SYMMETRIC = "symmetric"
    TWO_SIDES = "two_sides"


@dataclass(frozen=True, slots=True)
class BoundingBox:
    """An axis-aligned box in space."""

    low: Vector3
    high: Vector3

    @property
    def size(self) -> Vector3:
        """Edge lengths along x, y, z."""
        return self.high[0] - self.low[0], self.high[1] - self.low[1], self.high[2] - self.low[2]

    @property
    def center(self) -> Vector3:
        """The middle of the box."""
        (a, b, c), (d, e, f) = self.low, self.high
        return (a + d) / 2, (b + e) / 2, (c + f) / 2


@dataclass(frozen=True, slots=True)
class SketchExtrude:
    """One profile on one plane, extruded and combined with the body.

    `sketch_size` is set on a normalised step only (`quantize.normalize`): the length that 95 steps of the sketch grid
    stand for.
    """

    plane: SketchPlane
    profile: Profile
    operation: Operation
    extent: Extent
    distance_one: float
    distance_two: float = 0.0
    sketch_size: float | None = None

    @property
    def heights(self) -> tuple[float, float]:
        """The extrusion's lower and upper end along the plane's normal."""
        if self.extent is Extent.SYMMETRIC:
            return -abs(self.distance_one), abs(self.distance_one)
        # Both ends can lie on one side of the plane; the extrusion still begins at the plane, as DeepCAD builds it.
        return min(0.0, self.distance_one, -self.distance_two), max(0.0, self.distance_one, -self.distance_two)

    def bounding_box(self) -> BoundingBox:
        """The box around the extrusion; exact for a plane along the axes, else around its sketch's own box."""
        (x0, y0), (x1, y1) = self.profile.bounding_box()
        corners = [self.plane.to_world((x, y), h) for x in (x0, x1) for y in (y0, y1) for h in self.heights]
        return _box_around(corners)


@dataclass(frozen=True, slots=True)
class CadSequence:
    """A design: its steps in the order of their making.

    `bounding_box` is the finished solid's box as the source file states it, if it does; it is no part of the design.
    """

    steps: tuple[SketchExtrude, ...]
    bounding_box: BoundingBox | None = None

    @property
    def is_normalized(self) -> bool:
        """Whether every step already lies in the normalised frame of `quantize`."""
        return bool(self.steps) and all(step.sketch_size is not None for step in self.steps)

    def prefixes(self) -> Iterator[CadSequence]:
        """The design after its first step, its first two, and so on; the last is the whole design."""
        for count in range(1, len(self.steps)):
            yield CadSequence(self.steps[:count])
        if self.steps:
            yield self

    def material_box(self) -> BoundingBox:
        """The box around all extrusions that add material: never smaller than the solid's own, equal to it in most
        designs.

        Raises `ValueError` for a sequence without steps.
        """
        adding = [s for i, s in enumerate(self.steps) if i == 0 or s.operation in (Operation.NEW, Operation.JOIN)]
        if not adding:
            raise ValueError("a sequence without steps has no extent")
        boxes = [step.bounding_box() for step in adding]
        return _box_around([corner for box in boxes for corner in (box.low, box.high)])


def _box_around(points: list[Vector3]) -> BoundingBox:
    xs, ys, zs = zip(*points, strict=True)
    return BoundingBox((min(xs), min(ys), min(zs)), (max(xs), max(ys), max(zs)))
