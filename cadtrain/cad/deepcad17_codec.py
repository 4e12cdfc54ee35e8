"""The `deepcad17` codec: a quantised design in DeepCAD's commands and columns, one row a line.

    4                                       a loop starts
    0,223,128                               line to x, y
    0,223,185
    0,128,185
    0,128,128
    4
    2,176,157,19                            circle x, y, radius            (arc: 1,x,y,sweep,ccw)
    5,128,128,128,68,92,122,120,140,128,0,0     extrusion theta, phi, gamma, x, y, z, size, e1, e2, operation, extent
    3                                       the end

Columns that a command does not use (-1 in the 17 of a vector) are left out; `formats.deepcad17` says what the columns
are. A plane is spelt by angles that DeepCAD's own decoder turns into the true plane: 128 + steps of 2 pi / 256, modulo
256. DeepCAD's encoder writes other numbers for some planes (mirrored ones, and 255 for half a turn where this has 0), and
`formats.deepcad17.to_vectors` gives those; here nothing is lost. Planes have one spelling, as in the compact grammar.
"""

from __future__ import annotations

from cadtrain.cad.formats.deepcad17_rows import (
    ARC,
    CIRCLE,
    COLUMNS,
    END,
    EXTENTS,
    EXTRUDE,
    LINE,
    LOOP,
    OPERATIONS,
    rows_of,
)
from cadtrain.cad.grid import (
    AXIS_ANGLES,
    CENTER,
    LEVELS,
    PlaneAngles,
    QuantizedArc,
    QuantizedCircle,
    QuantizedCurve,
    QuantizedLine,
    QuantizedLoop,
    QuantizedSequence,
    QuantizedStep,
)
from cadtrain.cad.text_reader import TextReader

DEEPCAD17_VERSION = 1

_AXIS_PLACES = {angles: place for place, angles in enumerate(AXIS_ANGLES)}


class Deepcad17Codec:
    """DeepCAD's rows as text behind the interface of `codec`."""

    name = "deepcad17"
    version = DEEPCAD17_VERSION

    def encode(self, sequence: QuantizedSequence) -> str:
        """The design's text."""
        rows = rows_of(sequence, _columns_of)
        return "\n".join(",".join(str(row[column]) for column in (0, *COLUMNS[row[0]])) for row in rows)

    def decode(self, text: str) -> QuantizedSequence:
        """The text's design; raises `GrammarError` with position and reason for every other text, and nothing else."""
        reader = TextReader(text)
        steps = [_read_step(reader)]
        while not reader.accept(str(END)):
            steps.append(_read_step(reader))
        reader.end()
        return QuantizedSequence(tuple(steps))


def _columns_of(plane: int | PlaneAngles) -> tuple[int, int, int]:
    angles = plane if isinstance(plane, PlaneAngles) else AXIS_ANGLES[plane]
    return _turned(angles.theta), _turned(angles.phi), _turned(angles.gamma)


def _turned(steps: int) -> int:
    """Steps of an angle as a column's value, and the other way: half a turn on."""
    return (steps + CENTER) % LEVELS


def _read_step(reader: TextReader) -> QuantizedStep:
    loops = [_read_loop(reader)]
    while reader.next == str(LOOP):
        loops.append(_read_loop(reader))
    reader.expect(f"{EXTRUDE},", "a curve '0', '1', '2', the next loop '4' or the extrusion '5,'")
    start = reader.position
    plane = _plane(reader.numbers("theta", "phi", "gamma"), reader, start)
    reader.expect(",", "a comma and the position's x")
    x, y, z, size = reader.numbers("the position's x", "the position's y", "the position's z", "the size")
    reader.expect(",", "a comma and the first distance")
    start = reader.position
    one, two = reader.numbers("the first distance", "the second distance")
    reader.expect(",", "a comma and the operation")
    operation = OPERATIONS[reader.number("the operation", high=len(OPERATIONS) - 1)]
    reader.expect(",", "a comma and the extent")
    extent = EXTENTS[reader.number("the extent", high=len(EXTENTS) - 1)]
    _expect_new_line(reader)
    if reason := QuantizedStep.extent_fault(extent, one, two):
        raise reader.error(reason, start)
    return QuantizedStep(plane, (x, y, z), size, loops[0], tuple(loops[1:]), operation, extent, one, two)


def _plane(columns: list[int], reader: TextReader, start: int) -> int | PlaneAngles:
    angles = PlaneAngles(*map(_turned, columns))
    if angles in _AXIS_PLACES:
        return _AXIS_PLACES[angles]
    if angles.theta > CENTER:
        raise reader.error(f"theta is {columns[0]}, it must be 0 or at least {CENTER}", start)
    if angles.fault():
        raise reader.error(f"phi is {columns[1]}, it must be {CENTER} where theta is {columns[0]}", start)
    return angles


def _read_loop(reader: TextReader) -> QuantizedLoop:
    start = reader.position
    reader.expect(str(LOOP), f"a loop's start '{LOOP}'")
    _expect_new_line(reader)
    curves = [_read_curve(reader)]
    while reader.next and reader.next in f"{LINE}{ARC}{CIRCLE}":
        curves.append(_read_curve(reader))
    if reason := QuantizedLoop.fault(curves):
        raise reader.error(reason, start)
    return QuantizedLoop(tuple(curves))


def _read_curve(reader: TextReader) -> QuantizedCurve:
    command = int(reader.letter(f"{LINE}{ARC}{CIRCLE}", "a curve '0', '1' or '2'"))
    reader.expect(",", "a comma and x")
    if command == LINE:
        curve: QuantizedCurve = QuantizedLine(*reader.numbers("x", "y"))
    elif command == CIRCLE:
        curve = QuantizedCircle(*reader.numbers("x", "y", "the radius"))
    else:
        x, y, sweep = reader.numbers("x", "y", "the sweep")
        reader.expect(",", "a comma and the sense of rotation")
        curve = QuantizedArc(x, y, sweep, is_ccw=bool(reader.number("the sense of rotation", high=1)))
    _expect_new_line(reader)
    return curve


def _expect_new_line(reader: TextReader) -> None:
    reader.expect("\n", "a new line")
