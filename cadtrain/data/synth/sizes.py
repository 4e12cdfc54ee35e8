"""Overall sizes and step counts of parts, drawn from histograms of the real ones (`tests/data/synth_statistics.py`)."""

from __future__ import annotations

from cadtrain.data.synth.drawing import LONGEST_SIDE, Dice

Bins = dict[tuple[float, float], float]

MIDDLE_OF_BLOCKS: Bins = {
    (0.06, 0.2): 0.13, (0.2, 0.35): 0.17, (0.35, 0.5): 0.09, (0.5, 0.65): 0.25, (0.65, 0.8): 0.09, (0.8, 0.95): 0.12,
    (0.95, 1): 0.1, (1, 1): 0.07,
}  # fmt: skip
"""Middle side over longest side of single rectangular extrusions."""
MIDDLE_OF_PRISMS: Bins = {
    (0.06, 0.2): 0.24, (0.2, 0.35): 0.13, (0.35, 0.5): 0.16, (0.5, 0.65): 0.14, (0.65, 0.8): 0.16, (0.8, 0.95): 0.07, (1, 1): 0.11,
}  # fmt: skip
"""The same of single extrusions of other outlines."""
MIDDLE_OF_OTHERS: Bins = {
    (0.06, 0.2): 0.1, (0.2, 0.35): 0.09, (0.35, 0.5): 0.17, (0.5, 0.65): 0.17, (0.65, 0.8): 0.13, (0.8, 0.95): 0.14, (1, 1): 0.22,
}  # fmt: skip
"""The same of parts of several extrusions."""
SHORT_OF_BLOCKS: Bins = {
    (0.015, 0.05): 0.22, (0.05, 0.1): 0.14, (0.1, 0.2): 0.14, (0.2, 0.35): 0.1, (0.35, 0.5): 0.08, (0.5, 0.7): 0.11,
    (0.7, 0.95): 0.1, (0.95, 1): 0.06, (1, 1): 0.06,
}  # fmt: skip
"""Shortest side over middle side of single extrusions."""
SHORT_OF_OTHERS: Bins = {
    (0.015, 0.05): 0.2, (0.05, 0.1): 0.14, (0.1, 0.2): 0.18, (0.2, 0.35): 0.13, (0.35, 0.5): 0.13, (0.5, 0.7): 0.12,
    (0.7, 0.95): 0.14, (1, 1): 0.12,
}  # fmt: skip
"""The same of parts of several extrusions."""
STEPS: Bins = {
    (2, 3): 0.22, (3, 4): 0.15, (4, 5): 0.1, (5, 7): 0.17, (7, 10): 0.17, (10, 15): 0.18, (15, 57): 0.3,
}  # fmt: skip
"""Steps of parts of several extrusions; a bin's upper end does not belong to it."""


def box_sides(dice: Dice, middle: Bins, short: Bins, *, least: int = 2) -> tuple[int, int, int]:
    """Even sides, the longest (`LONGEST_SIDE`) first, none below `least`."""
    second = max(least, 2 * round(LONGEST_SIDE * dice.binned(middle) / 2))
    third = max(least, 2 * round(second * dice.binned(short) / 2))
    return LONGEST_SIDE, second, third


def sketch_and_depth(dice: Dice, sides: tuple[int, int, int], *, short: float, middle: float) -> tuple[int, int, int]:
    """Sketch width, height and extrusion depth: which of the sides the depth is goes by the probabilities, else it is the
    longest."""
    long_side, middle_side, short_side = sides
    mark = dice.between(0, 1)
    if mark < short:
        sketch, depth = (long_side, middle_side), short_side
    elif mark < short + middle:
        sketch, depth = (long_side, short_side), middle_side
    else:
        sketch, depth = (middle_side, short_side), long_side
    width, height = sketch if dice.chance(0.6) else sketch[::-1]
    return width, height, depth


def body_noun(name: str, width: float, height: float, depth: int) -> str:
    """A noun for an extrusion of an outline: `round disc`, `L-shaped bar`, `rectangular plate`, `hexagonal block`."""
    if name == "square" and depth == width:
        return "cube"
    if depth < 0.25 * min(width, height):
        return f"{name} {'disc' if name == 'round' else 'plate'}"
    if depth > 1.5 * max(width, height):
        return f"{name} {'rod' if name == 'round' else 'bar'}"
    return "cylinder" if name == "round" else f"{name} block"
