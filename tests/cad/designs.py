"""Designs that several tests build upon, and strategies that draw quantised ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st

from cadtrain.cad import (
    Arc,
    CadSequence,
    Circle,
    Extent,
    Line,
    Loop,
    Operation,
    PlaneAngles,
    Profile,
    QuantizedArc,
    QuantizedCircle,
    QuantizedLine,
    QuantizedLoop,
    QuantizedSequence,
    QuantizedStep,
    SketchExtrude,
    SketchPlane,
)

XY = SketchPlane((0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


def polygon(*points: tuple[float, float]) -> Loop:
    return Loop(tuple(Line(a, b) for a, b in zip(points, points[1:] + points[:1], strict=True)))


def rectangle(x: float, y: float, width: float, height: float) -> Loop:
    return polygon((x, y), (x + width, y), (x + width, y + height), (x, y + height))


def circle(x: float, y: float, radius: float) -> Loop:
    return Loop((Circle((x, y), radius),))


def slot(length: float, radius: float) -> Loop:
    """Two half circles of `radius`, their centres `length` apart along x, joined by lines."""
    return Loop(
        (
            Line((0.0, -radius), (length, -radius)),
            Arc((length, -radius), (length + radius, 0.0), (length, radius)),
            Line((length, radius), (0.0, radius)),
            Arc((0.0, radius), (-radius, 0.0), (0.0, -radius)),
        )
    )


def step(
    outer: Loop,
    height: float,
    *inner: Loop,
    operation: Operation = Operation.NEW,
    plane: SketchPlane = XY,
    extent: Extent = Extent.ONE_SIDE,
    other: float = 0.0,
) -> SketchExtrude:
    return SketchExtrude(plane, Profile(outer, inner), operation, extent, height, other)


def design(*steps: SketchExtrude) -> CadSequence:
    return CadSequence(steps)


PLATE_WITH_HOLE = design(step(rectangle(0.0, 0.0, 0.1, 0.06), 0.01, circle(0.05, 0.03, 0.02)))


def with_one_wrong_value(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The JSON document with each of its values in turn replaced by things that it cannot be."""
    text = json.dumps(document)
    paths: list[list[str | int]] = []

    def walk(value: Any, path: list[str | int]) -> None:
        paths.append(path)
        children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, child in children:
            walk(child, [*path, key])

    walk(document, [])
    for path in paths[1:]:
        for wrong in (None, [], {}, "x", -1, True, [[]]):
            doc = json.loads(text)
            target = doc
            for part in path[:-1]:
                target = target[part]
            target[path[-1]] = wrong
            yield doc


# -------------------------------------------------------------------------------------------------------- drawn at random

_BYTE = st.integers(0, 255)
_FROM_ONE = st.integers(1, 255)


@st.composite
def loops(draw: st.DrawFn) -> QuantizedLoop:
    if draw(st.booleans()):
        return QuantizedLoop((QuantizedCircle(draw(_BYTE), draw(_BYTE), draw(_FROM_ONE)),))
    line = st.builds(QuantizedLine, _BYTE, _BYTE)
    arc = st.builds(QuantizedArc, _BYTE, _BYTE, _FROM_ONE, st.booleans())
    curves = draw(st.lists(line | arc, min_size=2, max_size=6))
    assume(QuantizedLoop.fault(curves) is None)
    return QuantizedLoop(tuple(curves))


@st.composite
def planes(draw: st.DrawFn) -> int | PlaneAngles:
    if draw(st.booleans()):
        return draw(st.integers(0, 23))
    angles = PlaneAngles(draw(st.integers(0, 128)), draw(_BYTE), draw(_BYTE))
    assume(angles.fault() is None)
    return angles


@st.composite
def quantized_steps(draw: st.DrawFn) -> QuantizedStep:
    extent = draw(st.sampled_from(Extent))
    one, two = draw(_BYTE), draw(_BYTE) if extent is Extent.TWO_SIDES else 128
    assume(QuantizedStep.extent_fault(extent, one, two) is None)
    return QuantizedStep(
        plane=draw(planes()),
        position=(draw(_BYTE), draw(_BYTE), draw(_BYTE)),
        size=draw(_FROM_ONE),
        outer=draw(loops()),
        inner=tuple(draw(st.lists(loops(), max_size=2))),
        operation=draw(st.sampled_from(Operation)),
        extent=extent,
        distance_one=one,
        distance_two=two,
    )


unhurried = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
"""For drawing whole designs, which is slow on a busy machine."""

quantized_sequences = st.builds(QuantizedSequence, st.lists(quantized_steps(), min_size=1, max_size=3).map(tuple))
