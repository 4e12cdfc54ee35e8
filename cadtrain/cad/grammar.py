"""The `compact` grammar: a quantised design as one short line of text per step.

    Sa68,92,122,120L223,128L223,185L128,185L128,128;C176,157,19ENO140
    Sa171,152,134,10C176,128,48ECO116.

is a plate with a hole, and a cut into it.

    sequence  = step { newline step } "."
    step      = "S" plane number "," number "," number "," number  loop { ";" loop }  extrude
    plane     = one letter "a".."x": the axis frame of that place in `AXIS_FRAMES`
              | "(" theta "," phi "," gamma ")": any other rotation, in steps of 2 pi / 256
    loop      = curve { curve }                       the outer loop first
    curve     = "L" x "," y                           (x, y) is its end; a loop starts where its last curve ends
              | "A" x "," y "," sweep                 counter-clockwise
              | "B" x "," y "," sweep                 clockwise
              | "C" x "," y "," radius                alone in its loop
    extrude   = "E" operation extent number           operation: N new, J join, C cut, I intersect
              | "E" operation "T" number "," number   extent: O one side, S symmetric, T two sides
    number    = "0".."255" without leading zeros

The four numbers after the plane are the position and the size of the sketch; `quantize` says what every number means.
The full stop is the end mark. There is exactly one text for a design: no blanks, no second spelling, and `decode`
accepts that one only. A model that writes the text needs no token beyond its tokenizer's own.
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
from cadtrain.cad.text_reader import TextReader

GRAMMAR_VERSION = 1
END_MARK = "."

_OPERATIONS = {"N": Operation.NEW, "J": Operation.JOIN, "C": Operation.CUT, "I": Operation.INTERSECT}
_EXTENTS = {"O": Extent.ONE_SIDE, "S": Extent.SYMMETRIC, "T": Extent.TWO_SIDES}
_OPERATION_LETTERS = {operation: letter for letter, operation in _OPERATIONS.items()}
_EXTENT_LETTERS = {extent: letter for letter, extent in _EXTENTS.items()}
_PLANE_LETTERS = "abcdefghijklmnopqrstuvwx"

assert len(_PLANE_LETTERS) == len(AXIS_FRAMES)


def encode(sequence: QuantizedSequence) -> str:
    """The design's text, end mark included."""
    return "\n".join(_encode_step(step) for step in sequence.steps) + END_MARK


def _encode_step(step: QuantizedStep) -> str:
    if isinstance(step.plane, PlaneAngles):
        plane = f"({step.plane.theta},{step.plane.phi},{step.plane.gamma})"
    else:
        plane = _PLANE_LETTERS[step.plane]
    x, y, z = step.position
    loops = ";".join("".join(_encode_curve(curve) for curve in loop.curves) for loop in step.loops)
    distances = (
        f"{step.distance_one},{step.distance_two}" if step.extent is Extent.TWO_SIDES else f"{step.distance_one}"
    )
    kind = _OPERATION_LETTERS[step.operation] + _EXTENT_LETTERS[step.extent]
    return f"S{plane}{x},{y},{z},{step.size}{loops}E{kind}{distances}"


def _encode_curve(curve: QuantizedCurve) -> str:
    if isinstance(curve, QuantizedLine):
        return f"L{curve.x},{curve.y}"
    if isinstance(curve, QuantizedArc):
        return f"{'A' if curve.is_ccw else 'B'}{curve.x},{curve.y},{curve.sweep}"
    return f"C{curve.x},{curve.y},{curve.radius}"


def decode(text: str) -> QuantizedSequence:
    """The design that the text spells; raises `GrammarError` with position and reason for every other text, and nothing
    else."""
    reader = TextReader(text)
    steps = [_read_step(reader)]
    while reader.accept("\n"):
        steps.append(_read_step(reader))
    reader.expect(END_MARK, "a new line and the next step, or the end mark '.'")
    reader.end()
    return QuantizedSequence(tuple(steps))


def _read_step(reader: TextReader) -> QuantizedStep:
    reader.expect("S", "a sketch 'S'")
    plane = _read_plane(reader)
    x, y, z, size = reader.numbers("the position's x", "the position's y", "the position's z", "the size")
    loops = [_read_loop(reader)]
    while reader.accept(";"):
        loops.append(_read_loop(reader))
    reader.expect("E", "a curve 'L', 'A', 'B', 'C', the next loop ';' or the extrusion 'E'")
    operation = _OPERATIONS[reader.letter("NJCI", "an operation 'N', 'J', 'C' or 'I'")]
    extent = _EXTENTS[reader.letter("OST", "an extent 'O', 'S' or 'T'")]
    start = reader.position
    names = ("the first distance", "the second distance")
    distances = reader.numbers(*(names if extent is Extent.TWO_SIDES else names[:1]))
    one, two = distances if extent is Extent.TWO_SIDES else (distances[0], CENTER)
    if reason := QuantizedStep.extent_fault(extent, one, two):
        raise reader.error(reason, start)
    return QuantizedStep(plane, (x, y, z), size, loops[0], tuple(loops[1:]), operation, extent, one, two)


def _read_plane(reader: TextReader) -> int | PlaneAngles:
    start = reader.position
    if not reader.accept("("):
        return _PLANE_LETTERS.index(reader.letter(_PLANE_LETTERS, "a plane 'a'..'x' or '('"))
    plane = PlaneAngles(*reader.numbers("theta", "phi", "gamma"))
    reader.expect(")", "')'")
    if reason := plane.fault():
        raise reader.error(reason, start)
    return plane


def _read_loop(reader: TextReader) -> QuantizedLoop:
    start = reader.position
    curves = [_read_curve(reader)]
    while reader.next and reader.next in "LABC":
        curves.append(_read_curve(reader))
    if reason := QuantizedLoop.fault(curves):
        raise reader.error(reason, start)
    return QuantizedLoop(tuple(curves))


def _read_curve(reader: TextReader) -> QuantizedCurve:
    letter = reader.letter("LABC", "a curve 'L', 'A', 'B' or 'C'")
    if letter == "L":
        return QuantizedLine(*reader.numbers("x", "y"))
    if letter == "C":
        return QuantizedCircle(*reader.numbers("x", "y", "the radius"))
    x, y, sweep = reader.numbers("x", "y", "the sweep")
    return QuantizedArc(x, y, sweep, is_ccw=letter == "A")


class CompactCodec:
    """The grammar behind the interface of `codec`."""

    name = "compact"
    version = GRAMMAR_VERSION

    def encode(self, sequence: QuantizedSequence) -> str:
        """See `encode`."""
        return encode(sequence)

    def decode(self, text: str) -> QuantizedSequence:
        """See `decode`."""
        return decode(text)
