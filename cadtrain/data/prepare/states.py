"""The states on the way to a design: what is there after its first extrusion, its first two, and so on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from cadtrain.cad.sequence import CadSequence, Operation, SketchExtrude


def states_before(sequence: CadSequence) -> Iterator[tuple[int, CadSequence]]:
    """Number of extrusions and design for each state before the last, which is the whole design.

    One extrusion of several profiles is several steps (`cad.sequence`), and there is no state in the middle of it. Two extrusions
    from one plane by one distance cannot be told from that and count as one.
    """
    goes_on = [_is_same_extrusion(step, after) for step, after in pairwise(sequence.steps)]
    number = 0
    for prefix, is_within in zip(sequence.prefixes(), goes_on, strict=False):
        if not is_within:
            number += 1
            yield number, prefix


def _is_same_extrusion(step: SketchExtrude, after: SketchExtrude) -> bool:
    is_same_operation = after.operation is step.operation or (
        step.operation is Operation.NEW and after.operation is Operation.JOIN
    )
    return is_same_operation and (step.plane, step.extent, step.distance_one, step.distance_two) == (
        after.plane,
        after.extent,
        after.distance_one,
        after.distance_two,
    )
