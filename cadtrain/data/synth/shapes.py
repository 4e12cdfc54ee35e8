"""Closed loops to sketch with, about the origin unless a centre is given; each runs counter-clockwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from cadtrain.cad.sequence import Arc, Circle, Curve, Line, Loop, Point2

QUARTER_TURN_RAD = math.pi / 2


def mapped(loop: Loop, move: Callable[[Point2], Point2]) -> Loop:
    """The loop with every point moved; `move` must keep lengths."""
    curves: list[Curve] = []
    for curve in loop.curves:
        if isinstance(curve, Circle):
            curves.append(Circle(move(curve.center), curve.radius))
        elif isinstance(curve, Arc):
            curves.append(Arc(move(curve.start), move(curve.mid), move(curve.end)))
        else:
            curves.append(Line(move(curve.start), move(curve.end)))
    return Loop(tuple(curves))


def shifted(loop: Loop, center: Point2) -> Loop:
    """The loop moved by `center`."""
    return mapped(loop, lambda point: (point[0] + center[0], point[1] + center[1]))


def turned(loop: Loop) -> Loop:
    """The loop turned by a quarter turn about the origin."""
    return mapped(loop, lambda point: (-point[1], point[0]))


def polygon(points: Sequence[Point2]) -> Loop:
    """Straight lines through `points`, closed."""
    return Loop(tuple(Line(a, b) for a, b in zip(points, [*points[1:], points[0]], strict=True)))


def path(start: Point2, moves: Sequence[tuple[float, float] | tuple[float, float, float]]) -> Loop:
    """A closed chain from `start`: each move is a line to (x, y), or an arc to it that turns by a third number, radians.

    The last move must come back to `start`.
    """
    curves: list[Curve] = []
    here = start
    for move in moves:
        there = (move[0], move[1])
        curves.append(Arc.from_sweep(here, there, move[2]) if len(move) == 3 else Line(here, there))
        here = there
    return Loop(tuple(curves))


def rectangle(width: float, height: float) -> Loop:
    """A rectangle of `width` along x and `height` along y."""
    w, h = width / 2, height / 2
    return polygon([(-w, -h), (w, -h), (w, h), (-w, h)])


def cornered(width: float, height: float, sizes: Sequence[float], *, is_round: bool) -> Loop:
    """A rectangle whose corners are rounded (or cut off at 45 degrees) by `sizes`, from the lower left one
    counter-clockwise; 0 leaves a corner sharp."""
    w, h = width / 2, height / 2
    corners = [
        (-w, -h, 0, 1),
        (w, -h, -1, 0),
        (w, h, 0, -1),
        (-w, h, 1, 0),
    ]  # position, direction towards the corner before
    moves: list[tuple[float, float] | tuple[float, float, float]] = []
    for (x, y, dx, dy), size in zip(corners, sizes, strict=True):
        if not size:
            moves.append((x, y))
            continue
        # Into the corner along one edge, out of it along the next one, which is the first turned by a quarter.
        moves.append((x + dx * size, y + dy * size))
        leave = (x + dy * size, y - dx * size)
        moves.append((*leave, QUARTER_TURN_RAD) if is_round else leave)
    first = moves[-1]
    return path((first[0], first[1]), moves)


def softened(loop: Loop, tangent: float, *, every: int = 1) -> Loop:
    """A polygon with each `every`-th corner replaced by the arc that touches both sides `tangent` away from it."""
    corners = [curve.start for curve in loop.curves if isinstance(curve, Line)]
    moves: list[tuple[float, float] | tuple[float, float, float]] = []
    for k, corner in enumerate(corners):
        if k % every:
            moves.append(corner)
            continue
        before, after = corners[k - 1], corners[(k + 1) % len(corners)]
        a = math.atan2(corner[1] - before[1], corner[0] - before[0])
        b = math.atan2(after[1] - corner[1], after[0] - corner[0])
        turn = math.remainder(b - a, 2 * math.pi)
        moves.append((corner[0] - tangent * math.cos(a), corner[1] - tangent * math.sin(a)))
        moves.append((corner[0] + tangent * math.cos(b), corner[1] + tangent * math.sin(b), turn))
    return path((moves[-1][0], moves[-1][1]), moves)


def slot(length: float, width: float) -> Loop:
    """A stadium along x: `length` over all, rounded at both ends with half its `width`."""
    r, reach = width / 2, (length - width) / 2
    return path((-reach, -r), [(reach, -r), (reach, r, math.pi), (-reach, r), (-reach, -r, math.pi)])


def circle(diameter: float, center: Point2 = (0.0, 0.0)) -> Loop:
    """A full circle."""
    return Loop((Circle(center, diameter / 2),))


def regular_polygon(num_sides: int, radius: float, first_rad: float = 0.0) -> Loop:
    """A regular polygon with corners at `radius`, the first of them at the angle `first_rad`."""
    return polygon([polar(radius, first_rad + 2 * math.pi * k / num_sides) for k in range(num_sides)])


def polar(radius: float, turn_rad: float) -> Point2:
    """The point at `radius` and angle."""
    return radius * math.cos(turn_rad), radius * math.sin(turn_rad)


def belt(length: float, left: float, right: float) -> Loop:
    """Two circles of diameter `left` and `right` and their common tangents, `length` over all, along x."""
    a, b = left / 2, right / 2
    x0, x1 = -length / 2 + a, length / 2 - b
    # The tangent touches both circles where the radius stands at the angle `lean` to the x axis.
    lean = math.acos(max(-1.0, min(1.0, (a - b) / (x1 - x0))))
    (c, s), turn = (math.cos(lean), math.sin(lean)), 2 * lean
    return path(
        (x0 + a * c, -a * s),
        [
            (x1 + b * c, -b * s),
            (x1 + b * c, b * s, turn),
            (x0 + a * c, a * s),
            (x0 + a * c, -a * s, 2 * math.pi - turn),
        ],
    )


def lens(width: float, height: float) -> Loop:
    """Two equal arcs that meet at the ends of the x axis; `height` is below `width`."""
    w = width / 2
    sweep = 4 * math.atan(height / width)
    return path((-w, 0.0), [(w, 0.0, sweep), (-w, 0.0, sweep)])


def pillow(width: float, height: float, bulge: float) -> Loop:
    """A rectangle whose four sides bow outwards by `bulge`; `width` and `height` are over all."""
    w, h = width / 2 - bulge, height / 2 - bulge
    flat, upright = (4 * math.atan(bulge / side) for side in (w, h))
    return path((-w, -h), [(w, -h, flat), (w, h, upright), (-w, h, flat), (-w, -h, upright)])


def ring_sector(radius: float, width: float, sweep_rad: float, *, is_capped: bool) -> Loop:
    """A piece of a ring about the y axis, between `radius` and `radius - width`; capped ends are half circles."""
    inner = radius - width
    a, b = math.pi / 2 - sweep_rad / 2, math.pi / 2 + sweep_rad / 2
    cap = (math.pi,) if is_capped else ()
    moves = [
        (*polar(radius, b), sweep_rad),
        (*polar(inner, b), *cap),
        (*polar(inner, a), -sweep_rad),
        (*polar(radius, a), *cap),
    ]
    return path(polar(radius, a), moves)


def gear(num_teeth: int, tip: float, root: float) -> Loop:
    """A toothed outline between the radii `tip` and `root`: the tips are arcs, the grounds straight."""
    pitch = 2 * math.pi / num_teeth
    moves: list[tuple[float, float] | tuple[float, float, float]] = []
    for k in range(num_teeth):
        middle = k * pitch
        moves += [
            polar(root, middle - 0.3 * pitch),
            polar(tip, middle - 0.18 * pitch),
            (*polar(tip, middle + 0.18 * pitch), 0.36 * pitch),
            polar(root, middle + 0.3 * pitch),
        ]
    return path((moves[-1][0], moves[-1][1]), moves)
