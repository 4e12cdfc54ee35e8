"""Designs as CadQuery programs, for people who want to read, change and run one.

Written only: CadQuery brings a kernel of its own, and nothing here imports it. One statement a step, on the sketch's own
plane; a program run as it is leaves the solid in `result`.
"""

from __future__ import annotations

from collections.abc import Iterator

from cadtrain.cad.sequence import Arc, CadSequence, Circle, Extent, Loop, Operation, Point2, SketchExtrude, Vector3

_METRES_TO_MM = 1000.0
_METHODS = {
    Operation.NEW: "union",
    Operation.JOIN: "union",
    Operation.CUT: "cut",
    Operation.INTERSECT: "intersect",
}


def to_cadquery(sequence: CadSequence) -> str:
    """The design as a Python program that makes `result`, a `cadquery.Workplane`.

    Lengths are millimetres for a design in metres, as files are read, and stay as they are for one in the normalised
    frame of `dequantize`; the program's first line says which. Raises `ValueError` for a sequence without steps.
    """
    if not sequence.steps:
        raise ValueError("a sequence without steps is no program")
    scale = 1.0 if sequence.is_normalized else _METRES_TO_MM
    unit = "in the normalised frame, where the part lies in [-1, 1]" if sequence.is_normalized else "in mm"
    lines = [f"# Lengths are {unit}.", "import cadquery as cq"]
    for number, step in enumerate(sequence.steps, start=1):
        lines += ["", *_step_lines(step, number, scale)]
    return "\n".join(lines) + "\n"


def _step_lines(step: SketchExtrude, number: int, scale: float) -> Iterator[str]:
    # The first operation begins the body whatever it is called, as everywhere in `cad`.
    operation = Operation.NEW if number == 1 else step.operation
    low, high = step.heights
    is_two_sided = step.extent is Extent.TWO_SIDES
    origin = _scaled(step.plane.to_world((0.0, 0.0), low if is_two_sided else 0.0), scale)
    yield f"# Step {number}: {operation}, {_extent_words(step, scale)}"
    yield "result = (" if number == 1 else "tool = ("
    frame = f"origin={_tuple(origin)}, xDir={_tuple(step.plane.x_axis)}, normal={_tuple(step.plane.z_axis)}"
    yield f"    cq.Workplane(cq.Plane({frame}))"
    for loop in step.profile.loops:
        yield from (f"    {call}" for call in _loop_calls(loop, scale))
    if is_two_sided:
        yield f"    .extrude({_number((high - low) * scale)})"
    elif step.extent is Extent.SYMMETRIC:
        yield f"    .extrude({_number(high * scale)}, both=True)"
    else:
        yield f"    .extrude({_number(step.distance_one * scale)})"
    yield ")"
    if number > 1:
        yield f"result = result.{_METHODS[operation]}(tool)"


def _extent_words(step: SketchExtrude, scale: float) -> str:
    low, high = (_number(abs(height) * scale) for height in step.heights)
    if step.extent is Extent.SYMMETRIC:
        return f"{high} to both sides of the sketch"
    if step.extent is Extent.TWO_SIDES:
        return f"from {low} below the sketch to {high} above it"
    return f"{high} along the normal" if step.distance_one > 0 else f"{low} against the normal"


def _loop_calls(loop: Loop, scale: float) -> Iterator[str]:
    first = loop.curves[0]
    if isinstance(first, Circle):
        yield f".moveTo({_pair(first.center, scale)}).circle({_number(first.radius * scale)})"
        return
    yield f".moveTo({_pair(loop.start, scale)})"
    last = len(loop.curves) - 1
    for index, curve in enumerate(loop.curves):
        if isinstance(curve, Arc):
            yield f".threePointArc(({_pair(curve.mid, scale)}), ({_pair(curve.end, scale)}))"
        elif not isinstance(curve, Circle) and index < last:  # close() draws the last line
            yield f".lineTo({_pair(curve.end, scale)})"
    yield ".close()"


def _scaled(vector: Vector3, scale: float) -> Vector3:
    return vector[0] * scale, vector[1] * scale, vector[2] * scale


def _pair(point: Point2, scale: float) -> str:
    return f"{_number(point[0] * scale)}, {_number(point[1] * scale)}"


def _tuple(vector: Vector3) -> str:
    return f"({', '.join(_number(value) for value in vector)})"


def _number(value: float) -> str:
    """Ten digits, and none behind the ninth decimal: that is below any kernel's tolerance."""
    return f"{round(value, 9) + 0.0:.10g}"
