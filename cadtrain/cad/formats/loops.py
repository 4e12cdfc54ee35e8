"""The loops of a profile, DeepCAD's and Fusion 360's: curves as they are listed, turned and joined into closed chains."""

from __future__ import annotations

import math
from itertools import pairwise

from cadtrain.cad.formats.node import Node
from cadtrain.cad.sequence import Arc, Circle, Curve, Line, Loop, Point2

_GAP_TOLERANCE = 1e-3
"""Largest gap between neighbours, of the loop's size. Real files stay below 1e-4."""
_ARC_TOLERANCE = 1e-2
"""Largest distance between an arc's stated and computed ends, of its radius. Real files stay below 1e-3."""
_FULL_TURN = 2 * math.pi * (1 - 1e-6)

_BEYOND_US = {"Ellipse3D": "an ellipse", "EllipticalArc3D": "an elliptical arc", "NurbsCurve3D": "a spline"}

OpenCurve = Line | Arc


def read_loop(node: Node, *, arcs_follow_normal: bool = False) -> Loop:
    """The loop as a chain, head to tail, closed exactly; raises `SchemaError` where the curves make none.

    DeepCAD's arcs all run counter-clockwise and their normal is in world coordinates; Fusion 360's run about their normal,
    which is in the sketch's (`arcs_follow_normal`).
    """
    curves = [_read_curve(item, arcs_follow_normal) for item in node.child("profile_curves").items()]
    place = node.child("profile_curves")
    if not curves:
        raise place.error("a loop has no curves")
    open_curves = [curve for curve in curves if not isinstance(curve, Circle)]
    if len(open_curves) < len(curves):
        if len(curves) > 1:
            raise place.error("a full circle stands beside other curves in one loop")
        return Loop(tuple(curves))
    if len(curves) == 1:
        raise place.error("a loop of one open curve is not closed")
    loop = Loop(_joined(_chained(open_curves, place)))
    if loop.signed_area == 0:
        raise place.error("a loop encloses no area")
    return loop


def _read_curve(node: Node, arcs_follow_normal: bool) -> Curve:
    kind_node = node.child("type")
    if kind_node.text() in _BEYOND_US:
        raise kind_node.error(f"{_BEYOND_US[kind_node.value]} is not supported, only lines, arcs and circles are")
    kind = kind_node.choice({"Line3D": "line", "Arc3D": "arc", "Circle3D": "circle"})
    if kind == "circle":
        return Circle(_point(node.child("center_point")), _radius(node))
    start, end = _point(node.child("start_point")), _point(node.child("end_point"))
    if kind == "arc":
        return _read_arc(node, start, end, _senses(node) if arcs_follow_normal else (1,))
    if start == end:
        raise node.error(f"a line from {start} to the same point has no length")
    return Line(start, end)


def _senses(arc: Node) -> tuple[int, ...]:
    return (-1, 1) if arc.child("normal").child("z").number() < 0 else (1, -1)


def _read_arc(node: Node, start: Point2, end: Point2, senses: tuple[int, ...]) -> Curve:
    """The arc; `senses` are the directions to try, 1 for counter-clockwise, until its ends fit."""
    center, radius = _point(node.child("center_point")), _radius(node)
    first, last = node.child("start_angle").number(), node.child("end_angle").number()
    reference = _point(node.child("reference_vector"))
    length = math.hypot(*reference)
    if not 0.99 < length < 1.01:
        raise node.child("reference_vector").error(f"the reference vector is {length:g} long, not 1")
    if not 0 < last - first <= 2 * math.pi * (1 + 1e-9):
        raise node.child("end_angle").error(
            f"the arc runs from angle {first:g} to {last:g}, which is no turn of up to 2 pi"
        )
    if last - first > _FULL_TURN:
        return Circle(center, radius)

    def at(angle: float, sense: int) -> Point2:
        c, s = math.cos(sense * angle), math.sin(sense * angle)
        x, y = reference
        return center[0] + radius * (x * c - y * s) / length, center[1] + radius * (y * c + x * s) / length

    gaps = []
    for sense in senses:
        begin, finish = at(first, sense), at(last, sense)
        # In nearly half of DeepCAD's arcs the two named points are swapped against the angles; the angles are right.
        straight = max(math.dist(begin, start), math.dist(finish, end))
        swapped = max(math.dist(begin, end), math.dist(finish, start))
        gaps.append(min(straight, swapped))
        if gaps[-1] <= _ARC_TOLERANCE * radius:
            break
    else:
        raise node.error(f"the arc's end points are {min(gaps):g} away from where its angles put them")
    if swapped < straight:
        start, end = end, start
    if start == end:
        raise node.error(f"an arc from {start} to the same point is neither a curve nor a full circle")
    return Arc(start, at((first + last) / 2, sense), end)


def _chained(curves: list[OpenCurve], place: Node) -> list[OpenCurve]:
    """The curves, turned so that each begins where the one before it ends; out-of-order ones are looked for."""
    points = [point for curve in curves for point in (curve.start, curve.end)]
    spread = max(max(p[axis] for p in points) - min(p[axis] for p in points) for axis in (0, 1))
    tolerance = _GAP_TOLERANCE * spread
    head, second = curves[0], curves[1]
    if _gap(head.end, second) > tolerance and _gap(head.start, second) <= tolerance:
        head = head.reversed()
    chain, rest = [head], list(curves[1:])
    while rest:
        tail = chain[-1].end
        # The listed order comes first: the next curve is taken unless another one fits and it does not.
        place_in_rest = (
            0 if _gap(tail, rest[0]) <= tolerance else min(range(len(rest)), key=lambda i: _gap(tail, rest[i]))
        )
        following = rest.pop(place_in_rest)
        if (gap := _gap(tail, following)) > tolerance:
            raise place.error(f"the loop is not closed: after {len(chain)} curves there is a gap of {gap:g}")
        fits = math.dist(tail, following.start) <= math.dist(tail, following.end)
        chain.append(following if fits else following.reversed())
    if (gap := math.dist(chain[-1].end, chain[0].start)) > tolerance:
        raise place.error(f"the loop is not closed: its ends are {gap:g} apart")
    return chain


def _gap(point: Point2, curve: OpenCurve) -> float:
    return min(math.dist(point, curve.start), math.dist(point, curve.end))


def _joined(chain: list[OpenCurve]) -> tuple[OpenCurve, ...]:
    """The same chain with every start moved onto the end before it, so that no rounding opens it."""
    joined: list[OpenCurve] = []
    for before, curve in pairwise([chain[-1], *chain]):
        if curve.end == before.end:
            continue  # shorter than the gap that was closed
        if isinstance(curve, Arc):
            joined.append(Arc(before.end, curve.mid, curve.end))
        else:
            joined.append(Line(before.end, curve.end))
    return tuple(joined)


def _point(node: Node) -> Point2:
    # Curves are given in the plane's own frame; the third coordinate is rounding noise.
    return node.child("x").number(), node.child("y").number()


def _radius(node: Node) -> float:
    radius = node.child("radius").number()
    if radius <= 0:
        raise node.child("radius").error(f"the radius is {radius:g}, it must be above 0")
    return radius
