"""The rows of DeepCAD's vectors: their layout, and the quantised sequence that they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cadtrain.cad.formats.node import Node
from cadtrain.cad.grid import (
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
    axes_from_radians,
)
from cadtrain.cad.quantize import quantize_plane
from cadtrain.cad.sequence import Extent, Operation, SketchPlane
from cadtrain.errors import GeometryError

Row = tuple[int, ...]
Rows = tuple[Row, ...]

NUM_COLUMNS = 17
UNUSED = -1
LINE, ARC, CIRCLE, END, LOOP, EXTRUDE = range(6)
COLUMNS = {LINE: (1, 2), ARC: (1, 2, 3, 4), CIRCLE: (1, 2, 5), END: (), LOOP: (), EXTRUDE: tuple(range(6, 17))}
"""The columns that each command uses."""
OPERATIONS = tuple(Operation)
EXTENTS = tuple(Extent)


def row(command: int, *values: int) -> Row:
    """A row of 17: the command's values in their columns, -1 in all others."""
    numbers = [command] + [UNUSED] * (NUM_COLUMNS - 1)
    for column, value in zip(COLUMNS[command], values, strict=True):
        numbers[column] = value
    return tuple(numbers)


def rows_of(sequence: QuantizedSequence, angles_of: Callable[[int | PlaneAngles], tuple[int, int, int]]) -> Rows:
    """The rows of a quantised sequence, its planes spelt by `angles_of`; all other numbers are the sequence's own."""
    rows: list[Row] = []
    for step in sequence.steps:
        for loop in step.loops:
            rows.append(row(LOOP))
            rows += [_curve_row(curve) for curve in loop.curves]
        kind = OPERATIONS.index(step.operation), EXTENTS.index(step.extent)
        place = (*angles_of(step.plane), *step.position, step.size, step.distance_one, step.distance_two)
        rows.append(row(EXTRUDE, *place, *kind))
    return (*rows, row(END))


def _curve_row(curve: QuantizedCurve) -> Row:
    if isinstance(curve, QuantizedArc):
        return row(ARC, curve.x, curve.y, curve.sweep, int(curve.is_ccw))
    if isinstance(curve, QuantizedCircle):
        return row(CIRCLE, curve.x, curve.y, curve.radius)
    return row(LINE, curve.x, curve.y)


# --------------------------------------------------------------------------------------------------------------- reading


def from_vectors(rows: Sequence[Sequence[int]], where: str = "vectors") -> QuantizedSequence:
    """The design that rows of 17 whole numbers stand for, in the frame in which they were written.

    Takes what `to_vectors`, DeepCAD and the models after it write: rows behind the first end row are padding. Theta and
    gamma of 255 are read as the half turn that was cut off to it, an extrusion without thickness as the thinnest one along
    the normal. What has no area any more is left out as `quantize` does: curves that end where they start, loops, steps.
    Where none of this was needed, `to_vectors(dequantize(from_vectors(rows))) == rows` for rows that `to_vectors` wrote.

    Raises `SchemaError` (`$[row][column]`, value found, reason) for rows that break the layout, `GeometryError`
    (`below_resolution`) where the first step, or an intersection, has no area.
    """
    root = Node(_plain(rows), "$", where)
    steps: list[QuantizedStep] = []
    for number, draft in enumerate(_drafts(root), 1):
        step = draft.step()
        if step is not None:
            steps.append(step)
        elif number == 1 or draft.operation is Operation.INTERSECT:
            raise GeometryError("below_resolution", f"nothing is left of step {number} on the grid", where=where)
    return QuantizedSequence(tuple(steps))


def _plain(value: Any) -> Any:
    """Arrays and tuples as lists, their numbers as Python's."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


@dataclass(slots=True)
class _Draft:
    """One step's rows as they are met: its curves by loop, then the eleven numbers of its extrusion."""

    loops: list[list[QuantizedCurve]] = field(default_factory=list)
    numbers: tuple[int, ...] = ()

    @property
    def operation(self) -> Operation:
        return OPERATIONS[self.numbers[9]]

    def step(self) -> QuantizedStep | None:
        """The step; None where it has no area."""
        theta, phi, gamma, x, y, z, size, one, two, _, extent_index = self.numbers
        loops = [loop for loop in map(_loop, self.loops) if loop is not None]
        extent = EXTENTS[extent_index]
        if extent is Extent.SYMMETRIC:
            one = min(LEVELS - 1, CENTER + abs(one - CENTER))
        if extent is not Extent.TWO_SIDES:
            two = CENTER
        if one == two == CENTER:  # DeepCAD rounds thin extrusions flat, and which side they lay on is lost
            one = CENTER + 1
        if not loops or size == 0:
            return None
        outer = max(loops, key=lambda loop: abs(loop.on_grid().signed_area))
        return QuantizedStep(
            plane=_plane(theta, phi, gamma),
            position=(x, y, z),
            size=size,
            outer=outer,
            inner=tuple(loop for loop in loops if loop is not outer),
            operation=self.operation,
            extent=extent,
            distance_one=one,
            distance_two=two,
        )


def _drafts(root: Node) -> Iterator[_Draft]:
    draft = _Draft()
    count = 0
    for node in root.items():
        command, values = _read_row(node)
        if command == END:
            break
        if command == EXTRUDE:
            if not draft.loops or not draft.loops[-1]:
                raise node.error("an extrusion follows no curve")
            draft.numbers = values
            yield draft
            draft, count = _Draft(), count + 1
        elif command == LOOP:
            if draft.loops and not draft.loops[-1]:
                raise node.error("a loop starts where the one before has no curve yet")
            draft.loops.append([])
        elif not draft.loops:
            raise node.error("a curve stands outside a loop")
        else:
            _add_curve(node, draft.loops[-1], command, values)
    if draft.loops:
        raise root.error("the rows end inside a step: after the last loop there is no extrusion")
    if not count:
        raise root.error("no extrusion makes anything, so there is no part")


def _read_row(node: Node) -> tuple[int, tuple[int, ...]]:
    cells = list(node.items())
    if len(cells) != NUM_COLUMNS:
        raise node.error(f"expected {NUM_COLUMNS} columns, found {len(cells)}")
    command = cells[0].whole_number(0, EXTRUDE)
    used = COLUMNS[command]
    for column in range(1, NUM_COLUMNS):
        if column not in used and cells[column].value != UNUSED:
            raise cells[column].error(
                f"expected {UNUSED}, found {cells[column].value}: command {command} has no such value"
            )
    return command, tuple(cells[column].whole_number(*_range(column)) for column in used)


def _range(column: int) -> tuple[int, int]:
    lowest = 1 if column in (3, 5) else 0  # sweep, radius
    return lowest, {4: 1, 15: len(OPERATIONS) - 1, 16: len(EXTENTS) - 1}.get(column, LEVELS - 1)


def _add_curve(node: Node, loop: list[QuantizedCurve], command: int, values: tuple[int, ...]) -> None:
    if loop and (command == CIRCLE or isinstance(loop[0], QuantizedCircle)):
        raise node.error("a circle stands beside other curves in one loop")
    if command == CIRCLE:
        loop.append(QuantizedCircle(*values))
    elif command == ARC:
        x, y, sweep, is_ccw = values
        loop.append(QuantizedArc(x, y, sweep, bool(is_ccw)))
    else:
        loop.append(QuantizedLine(*values))


def _loop(curves: list[QuantizedCurve]) -> QuantizedLoop | None:
    """The curves without those that end where they start; None where they make no loop."""
    if isinstance(curves[0], QuantizedCircle):
        return QuantizedLoop(tuple(curves))
    kept: list[QuantizedCurve] = []
    before = curves[-1]
    for curve in curves:
        if (curve.x, curve.y) != (before.x, before.y):
            kept.append(curve)
        before = curve
    return QuantizedLoop(tuple(kept)) if QuantizedLoop.fault(kept) is None else None


def _plane(theta: int, phi: int, gamma: int) -> int | PlaneAngles:
    """The plane of three angle columns; the axes settle which of several spellings they were."""
    turns = (theta + (theta == LEVELS - 1), phi, gamma + (gamma == LEVELS - 1))
    angles = ((turn - CENTER) * 2 * math.pi / LEVELS for turn in turns)
    return quantize_plane(SketchPlane((0.0, 0.0, 0.0), *axes_from_radians(*angles)))
