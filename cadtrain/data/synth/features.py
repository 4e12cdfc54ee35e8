"""What families put into and onto bodies: stamps of a size that fits, and where a number of them goes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cadtrain.cad.sequence import Loop, Point2
from cadtrain.data.synth import shapes
from cadtrain.data.synth.captions import Words, counted
from cadtrain.data.synth.drawing import Dice
from cadtrain.data.synth.letters import FEW_SIDES, MANY_SIDES, ROUNDISH
from cadtrain.data.synth.outlines import (
    Maker,
    Outline,
    Room,
    bowed,
    rectangular,
    round_outline,
    triangular,
)

GAP = 4
"""Least distance between neighbouring features: the 8-bit grid may move each of two edges by more than a unit."""
SMALLEST = 4
_MAKERS: dict[str, dict[Maker, float]] = {
    "roundish": ROUNDISH,
    "few": FEW_SIDES,
    "many": MANY_SIDES,
    "three": {triangular: 1.0},
    "arcs": {bowed: 1.0},
}


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a number of equal features lie, about the origin, and the largest size that each may have.

    `words` says it: `in a row`, `on a circle of diameter 80`.
    """

    centers: tuple[Point2, ...]
    width: float
    height: float
    words: str
    takes_only_round: bool = False


def stamp(dice: Dice, width: float, height: float, *, round_share: float = 0.5) -> Outline:
    """An outline that fits into `width` x `height` (each at least `SMALLEST`), of the kinds that real inner loops have."""
    w, h = dice.log_even(max(SMALLEST, width * 0.25), width), dice.log_even(max(SMALLEST, height * 0.25), height)
    kind = dice.weighted(
        {"round": round_share, "four": 0.14, "roundish": 0.3, "few": 0.07, "many": 0.015, "three": 0.03, "arcs": 0.06}
    )
    if min(w, h) < 6 and kind not in ("round", "four"):
        kind = "four"
    if kind == "round":
        return round_outline(dice, w, h)
    if kind == "four":
        return rectangular(dice, *((min(w, h), min(w, h)) if dice.chance(0.3) else (w, h)))
    outline = dice.weighted(_MAKERS[kind])(dice, w, h)
    (x0, y0), (x1, y1) = outline.loop.bounding_box()
    if x1 - x0 > width or y1 - y0 > height:
        return rectangular(dice, w, h)
    return outline


def row(dice: Dice, width: float, height: float, count: int) -> Layout:
    """`count` places in a row along the longer side."""
    long, is_x = max(width, height), width >= height
    pitch = _pitch(dice, long, count)
    places = [(k - (count - 1) / 2) * pitch for k in range(count)]
    centers = tuple((p, 0.0) if is_x else (0.0, p) for p in places)
    room = (pitch - GAP, min(width, height)) if is_x else (min(width, height), pitch - GAP)
    words = "in a row" if count > 2 else "side by side"
    return Layout(centers, *room, words)


def _pitch(dice: Dice, length: float, count: int) -> float:
    widest = 2 * math.floor(length / count / 2)
    return widest if widest < 12 or dice.chance(0.6) else dice.even(max(10, widest * 0.6), widest)


def grid(dice: Dice, width: float, height: float, columns: int, rows: int) -> Layout:
    """Rows and columns, every second row shifted by half a pitch where it is staggered (then it has one place less)."""
    px, py = _pitch(dice, width, columns), _pitch(dice, height, rows)
    is_staggered = rows >= 2 and columns >= 3 and dice.chance(0.3)
    centers = tuple(
        ((i - (columns - 1 - lost) / 2) * px, (j - (rows - 1) / 2) * py)
        for j in range(rows)
        for lost in ((j % 2) * is_staggered,)
        for i in range(columns - lost)
    )
    words = f"in {rows} staggered rows" if is_staggered else f"in {rows} rows of {columns}"
    return Layout(centers, px - GAP, py - GAP, words)


def around(dice: Dice, diameter: float, count: int) -> Layout:
    """`count` places on a circle that, with its features, stays within `diameter`."""
    on = dice.even(diameter * 0.55, diameter * 0.8)
    first = dice.one_of((0.0, math.pi / count))
    centers = tuple(shapes.polar(on / 2, first + 2 * math.pi * k / count) for k in range(count))
    size = min(diameter - on - 2, on * math.sin(math.pi / count) - GAP) if count > 1 else diameter - on - 2
    return Layout(centers, size, size, f"on a circle of diameter {on}", takes_only_round=True)


def corners(dice: Dice, width: float, height: float) -> Layout:
    """Four places, one near each corner."""
    size = min(width, height) * dice.between(0.12, 0.3)
    x, y = math.floor(width / 2 - size / 2 - 1), math.floor(height / 2 - size / 2 - 1)
    return Layout(tuple((sx * x, sy * y) for sy in (-1, 1) for sx in (-1, 1)), size, size, "one near each corner")


def layout(dice: Dice, width: float, height: float, count: int) -> Layout:
    """Some layout of `count` places (a grid may have a few more or less) in `width` x `height`."""
    if count == 1:
        return Layout(((0.0, 0.0),), width, height, "")
    square = min(width, height)
    is_slim = max(width, height) > 3.5 * square
    if count == 4 and square >= 24 and dice.chance(0.5):
        return corners(dice, width, height)
    if 3 <= count <= 12 and not is_slim and square >= 30 and dice.chance(0.3):
        return around(dice, square, count)
    rows = 1 if count < 4 or (is_slim and count < 12) else dice.whole(2, 2 + count // 6)
    columns = round(count / rows)
    if rows == 1 or columns == 1:
        return row(dice, width, height, count)
    small, large = sorted((rows, columns))
    return grid(dice, width, height, *((large, small) if width >= height else (small, large)))


def number_of_openings(dice: Dice) -> int:
    """How many inner loops a profile has that has any."""
    return dice.weighted(
        {1: 0.63, 2: 0.07, 3: 0.06, 4: 0.08, 5: 0.04, 6: 0.04, 8: 0.03, 12: 0.02, 15: 0.01, 24: 0.01, 40: 0.01}
    )


def openings(dice: Dice, room: Room, words: Words, count: int, *, round_share: float = 0.5) -> list[Loop]:
    """About `count` equal openings in the room of a body's outline, said in `words`; none where there is no room."""
    x, y, width, height = room
    if min(width, height) < SMALLEST + GAP:
        return []
    has_middle = count == 5
    places = layout(dice, width - GAP, height - GAP, 4 if has_middle else count)
    if min(places.width, places.height) < SMALLEST:
        return []
    hole = stamp(dice, places.width, places.height, round_share=1e9 if places.takes_only_round else round_share)
    say_openings(words, hole, places, is_centred=abs(x) < 1e-9 and abs(y) < 1e-9)
    loops = [hole.at((x + cx, y + cy)) for cx, cy in places.centers]
    free = min(_free_in_the_middle(places, hole), width - GAP, height - GAP)
    if has_middle and free >= 8 and places.words.startswith(("one", "on a")):
        middle = round_outline(dice, *[dice.log_even(SMALLEST, free)] * 2)
        loops.append(middle.at((x, y)))
        words.add("a round hole", f"{middle.size} in the middle")
    return loops


def _free_in_the_middle(places: Layout, hole: Outline) -> float:
    nearest = min(math.hypot(*center) for center in places.centers)
    return 1.4 * (nearest - math.hypot(hole.width, hole.height) / 2 - GAP)


def say_openings(words: Words, hole: Outline, places: Layout, *, is_centred: bool) -> None:
    """Say what a profile's openings are and where."""
    count = len(places.centers)
    noun = f"{hole.name} {'hole' if hole.name == 'round' else 'opening'}"
    if count == 1 and is_centred:
        noun = f"central {noun}"
    words.add(counted(count, noun), f"{hole.size} {places.words}".strip())
