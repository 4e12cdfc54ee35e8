"""The `json` codec: a quantised design as one line of JSON, for comparison and for tools that want no grammar.

    {"steps":[{"plane":0,"position":[68,92,122],"size":120,"loops":[[["L",223,128],["L",223,185],["L",128,185],
    ["L",128,128]],[["C",176,157,19]]],"operation":"new","extent":"one_side","distances":[140]}]}

(broken here only). `plane` is the place of the frame in `AXIS_FRAMES` or three angles, curves are those of the compact
grammar, `distances` holds two numbers for `two_sides` and one for all else. Keys stand in this order, there are no
blanks, and one design has one text. Any JSON parser reads it; `decode` accepts this spelling alone.
"""

from __future__ import annotations

from cadtrain.cad.grid import (
    AXIS_FRAMES,
    CENTER,
    PlaneAngles,
    QuantizedArc,
    QuantizedCircle,
    QuantizedCurve,
    QuantizedLine,
    QuantizedLoop,
    QuantizedSequence,
    QuantizedStep,
)
from cadtrain.cad.sequence import Extent, Operation
from cadtrain.cad.text_reader import TextReader, either

JSON_VERSION = 1


class JsonCodec:
    """One line of JSON behind the interface of `codec`."""

    name = "json"
    version = JSON_VERSION

    def encode(self, sequence: QuantizedSequence) -> str:
        """The design's text."""
        return f'{{"steps":[{",".join(_encode_step(step) for step in sequence.steps)}]}}'

    def decode(self, text: str) -> QuantizedSequence:
        """The text's design; raises `GrammarError` with position and reason for every other text, and nothing else."""
        reader = TextReader(text)
        reader.expect('{"steps":[', "'{\"steps\":['")
        steps = [_read_step(reader)]
        while reader.accept(","):
            steps.append(_read_step(reader))
        reader.expect("]}", "',' and the next step, or the end ']}'")
        reader.end()
        return QuantizedSequence(tuple(steps))


def _encode_step(step: QuantizedStep) -> str:
    angles = step.plane
    plane = f"[{angles.theta},{angles.phi},{angles.gamma}]" if isinstance(angles, PlaneAngles) else f"{angles}"
    x, y, z = step.position
    loops = ",".join(f"[{','.join(map(_encode_curve, loop.curves))}]" for loop in step.loops)
    second = f",{step.distance_two}" if step.extent is Extent.TWO_SIDES else ""
    return (
        f'{{"plane":{plane},"position":[{x},{y},{z}],"size":{step.size},"loops":[{loops}],'
        f'"operation":"{step.operation}","extent":"{step.extent}","distances":[{step.distance_one}{second}]}}'
    )


def _encode_curve(curve: QuantizedCurve) -> str:
    if isinstance(curve, QuantizedLine):
        return f'["L",{curve.x},{curve.y}]'
    if isinstance(curve, QuantizedArc):
        return f'["{"A" if curve.is_ccw else "B"}",{curve.x},{curve.y},{curve.sweep}]'
    return f'["C",{curve.x},{curve.y},{curve.radius}]'


def _read_step(reader: TextReader) -> QuantizedStep:
    plane = _read_plane(reader)
    _expect(reader, ',"position":[')
    x, y, z = reader.numbers("the position's x", "the position's y", "the position's z")
    _expect(reader, '],"size":')
    (size,) = reader.numbers("the size")
    _expect(reader, ',"loops":[')
    loops = [_read_loop(reader)]
    while reader.accept(","):
        loops.append(_read_loop(reader))
    _expect(reader, '],"operation":"')
    operation = Operation(_word(reader, tuple(Operation)))
    _expect(reader, '","extent":"')
    extent = Extent(_word(reader, tuple(Extent)))
    _expect(reader, '","distances":[')
    start = reader.position
    names = ("the first distance", "the second distance")
    distances = reader.numbers(*(names if extent is Extent.TWO_SIDES else names[:1]))
    one, two = distances if extent is Extent.TWO_SIDES else (distances[0], CENTER)
    if reason := QuantizedStep.extent_fault(extent, one, two):
        raise reader.error(reason, start)
    _expect(reader, "]}")
    return QuantizedStep(plane, (x, y, z), size, loops[0], tuple(loops[1:]), operation, extent, one, two)


def _read_plane(reader: TextReader) -> int | PlaneAngles:
    _expect(reader, '{"plane":')
    start = reader.position
    if not reader.accept("["):
        return reader.number("the plane", high=len(AXIS_FRAMES) - 1)
    plane = PlaneAngles(*reader.numbers("theta", "phi", "gamma"))
    if reason := plane.fault():
        raise reader.error(reason, start)
    _expect(reader, "]")
    return plane


def _read_loop(reader: TextReader) -> QuantizedLoop:
    start = reader.position
    _expect(reader, "[")
    curves = [_read_curve(reader)]
    while reader.accept(","):
        curves.append(_read_curve(reader))
    _expect(reader, "]")
    if reason := QuantizedLoop.fault(curves):
        raise reader.error(reason, start)
    return QuantizedLoop(tuple(curves))


def _read_curve(reader: TextReader) -> QuantizedCurve:
    _expect(reader, '["')
    letter = reader.letter("LABC", "a curve 'L', 'A', 'B' or 'C'")
    _expect(reader, '",')
    if letter == "L":
        curve: QuantizedCurve = QuantizedLine(*reader.numbers("x", "y"))
    elif letter == "C":
        curve = QuantizedCircle(*reader.numbers("x", "y", "the radius"))
    else:
        x, y, sweep = reader.numbers("x", "y", "the sweep")
        curve = QuantizedArc(x, y, sweep, is_ccw=letter == "A")
    _expect(reader, "]")
    return curve


def _expect(reader: TextReader, mark: str) -> None:
    reader.expect(mark, repr(mark))


def _word(reader: TextReader, words: tuple[str, ...]) -> str:
    for word in words:
        if reader.accept(word):
            return word
    raise reader.error(f"expected {either([str(word) for word in words])}")
