"""Outlines of many straight sides: letters, steps, combs, toothed and random ones."""

from __future__ import annotations

import math
from itertools import pairwise

from cadtrain.cad.sequence import Line, Point2
from cadtrain.data.synth import shapes
from cadtrain.data.synth.captions import Detail
from cadtrain.data.synth.drawing import Dice
from cadtrain.data.synth.outlines import (
    Maker,
    Outline,
    Room,
    belted,
    cornered,
    d_shaped,
    quadrilateral,
    regular,
    sector,
    slot_shaped,
)


def _walls(dice: Dice, width: int, height: int) -> float:
    """A wall's thickness: an even number where there is room for one."""
    short = min(width, height)
    return dice.log_even(max(2, short * 0.08), short * 0.4) if short >= 12 else short * dice.between(0.12, 0.4)


def _polygon(
    name: str, points: list[Point2], width: int, height: int, room: Room, wall: float | None = None
) -> Outline:
    details = (Detail("", f"walls {wall} thick"),) if isinstance(wall, int) else ()
    middle = [(x - width / 2, y - height / 2) for x, y in points]
    center = (room[0] - width / 2, room[1] - height / 2)
    return Outline(name, shapes.polygon(middle), width, height, (*center, room[2], room[3]), details)


def l_shaped(dice: Dice, width: int, height: int) -> Outline:
    """Two legs at a right angle."""
    w, h, t = width, height, _walls(dice, width, height)
    s = t if dice.chance(0.6) else h * dice.between(0.15, 0.6)
    points = [(0.0, 0.0), (w, 0.0), (w, s), (t, s), (t, h), (0.0, h)]
    return _polygon("L-shaped", points, w, h, (w / 2, s / 2, w, s), t if s == t else None)


def t_shaped(dice: Dice, width: int, height: int) -> Outline:
    """A bar on a stem."""
    w, h, t = width, height, _walls(dice, width, height)
    a, b = (w - t) / 2, (w + t) / 2
    points = [(a, 0.0), (b, 0.0), (b, h - t), (w, h - t), (w, h), (0.0, h), (0.0, h - t), (a, h - t)]
    return _polygon("T-shaped", points, w, h, (w / 2, h - t / 2, w, t), t)


def u_shaped(dice: Dice, width: int, height: int) -> Outline:
    """Two legs on a floor."""
    w, h, t = width, height, _walls(dice, width, height)
    points = [(0.0, 0.0), (w, 0.0), (w, h), (w - t, h), (w - t, t), (t, t), (t, h), (0.0, h)]
    return _polygon("U-shaped", points, w, h, (w / 2, t / 2, w, t), t)


def stepped(dice: Dice, width: int, height: int) -> Outline:
    """Stairs that rise towards the left, of two to five steps."""
    number = dice.whole(2, 5)
    treads = [point for k in range(number) for point in _tread(k, number, width, height)]
    points = [(0.0, 0.0), (width, 0.0), *treads, (0.0, height)]
    return _polygon("stair-shaped", points, width, height, (width / 2, height / number / 2, width, height / number))


def _tread(k: int, number: int, width: int, height: int) -> list[Point2]:
    x, y = width * (number - k) / number, height * (k + 1) / number
    return [(x, y)] if k == number - 1 else [(x, y), (width * (number - k - 1) / number, y)]


def plus_shaped(dice: Dice, width: int, height: int) -> Outline:
    """A cross with arms of one width."""
    w, h, t = width, height, _walls(dice, width, height)
    a, b, c, d = (w - t) / 2, (w + t) / 2, (h - t) / 2, (h + t) / 2
    points = [(a, 0.0), (b, 0.0), (b, c), (w, c), (w, d), (b, d), (b, h), (a, h), (a, d), (0.0, d), (0.0, c), (a, c)]
    return _polygon("plus-shaped", points, w, h, (w / 2, h / 2, w, t), t)


def h_shaped(dice: Dice, width: int, height: int) -> Outline:
    """Two flanges and a web: an I lying down."""
    w, h, t = width, height, _walls(dice, width, height) * 0.75
    a, b = (w - t) / 2, (w + t) / 2
    points = [
        (0.0, 0.0), (w, 0.0), (w, t), (b, t), (b, h - t), (w, h - t),
        (w, h), (0.0, h), (0.0, h - t), (a, h - t), (a, t), (0.0, t),
    ]  # fmt: skip
    return _polygon("I-shaped", points, w, h, (w / 2, t / 2, w, t))


def notched(dice: Dice, width: int, height: int) -> Outline:
    """A rectangle with one to four equal notches in its upper side."""
    number = dice.weighted({1: 0.5, 2: 0.25, 3: 0.15, 4: 0.1})
    depth, pitch = height * dice.between(0.15, 0.6), width / number
    gap = pitch * dice.between(0.2, 0.6)
    points: list[Point2] = [(0.0, 0.0), (width, 0.0), (width, height)]
    for k in reversed(range(number)):
        middle = (k + 0.5) * pitch
        a, b = middle - gap / 2, middle + gap / 2
        points += [(b, height), (b, height - depth), (a, height - depth), (a, height)]
    points.append((0.0, height))
    name = "notched" if number == 1 else "comb-shaped"
    count = {1: "one notch", 2: "two notches", 3: "three notches", 4: "four notches"}[number]
    outline = _polygon(name, points, width, height, (width / 2, (height - depth) / 2, width, height - depth))
    return Outline(name, outline.loop, width, height, outline.room, (Detail(count, f"{count} in one side"),))


def house_shaped(dice: Dice, width: int, height: int) -> Outline:
    """Five sides: a rectangle with a pointed end, or with one end cut off aslant."""
    rise = height * dice.between(0.15, 0.6)
    tip = width * dice.one_of((0.0, 0.25, 0.5))
    points = [(0.0, 0.0), (width, 0.0), (width, height - rise), (tip, height), (0.0, height - rise if tip else height)]
    points = points if tip else [*points[:3], (width * 0.35, height), (0.0, height)]
    return _polygon("five-sided", points, width, height, (width / 2, (height - rise) / 2, width, height - rise))


def arrow_shaped(dice: Dice, width: int, height: int) -> Outline:
    """An arrow to the right."""
    head, t = width * dice.between(0.25, 0.55), height * dice.between(0.2, 0.6)
    a, b = (height - t) / 2, (height + t) / 2
    x = width - head
    points = [(0.0, a), (x, a), (x, 0.0), (width, height / 2), (x, height), (x, b), (0.0, b)]
    return _polygon("arrow-shaped", points, width, height, (width - head, height / 2, min(head, x) * 0.7, t))


def rectilinear(dice: Dice, width: int, height: int) -> Outline:
    """A skyline: three to six neighbouring rectangles of different heights on one floor."""
    number = dice.whole(3, 8)
    cuts = [0.0, *sorted(dice.between(0.08, 0.92) * width for _ in range(number - 1)), float(width)]
    if min(b - a for a, b in pairwise(cuts)) < 0.06 * width:
        cuts = [width * k / number for k in range(number + 1)]
    tops: list[float] = []
    for k in range(number):
        low = 0.35 if k % 2 else 0.7
        tops.append(height * dice.between(low, low + 0.25))
    tops[0] = float(height)
    points: list[Point2] = [(0.0, 0.0), (float(width), 0.0)]
    for k in reversed(range(number)):
        points += [(cuts[k + 1], tops[k]), (cuts[k], tops[k])]
    floor = min(tops)
    return _polygon("many-sided", points, width, height, (width / 2, floor / 2, width, floor))


def star(dice: Dice, width: int, height: int) -> Outline:
    """A star of four or eight points, as wide as the smaller size."""
    size = min(width, height)
    number = dice.one_of((4, 8))
    root = size / 2 * dice.between(0.45, 0.75)
    points = [shapes.polar(size / 2 if k % 2 == 0 else root, math.pi * k / number) for k in range(2 * number)]
    detail = Detail(f"{number} points", f"{number} points")
    return Outline("star-shaped", shapes.polygon(points), size, size, (0.0, 0.0, root, root), (detail,))


def toothed(dice: Dice, width: int, height: int) -> Outline:
    """A toothed wheel, as wide as the smaller size."""
    size = min(width, height)
    number = 4 * dice.whole(2, 6)  # teeth on both axes, so that its box is exactly `size` across
    root = size / 2 * dice.between(0.7, 0.88)
    detail = Detail(f"{number} teeth", f"{number} teeth")
    return Outline("gear-shaped", shapes.gear(number, size / 2, root), size, size, (0.0, 0.0, root, root), (detail,))


FEW_SIDES: dict[Maker, float] = {
    l_shaped: 0.24, t_shaped: 0.08, u_shaped: 0.16, regular: 0.14, house_shaped: 0.16, notched: 0.1, arrow_shaped: 0.04,
    stepped: 0.1,
}  # fmt: skip
"""Outlines of mostly five to eight straight sides."""
MANY_SIDES: dict[Maker, float] = {
    plus_shaped: 0.2, h_shaped: 0.2, notched: 0.1, rectilinear: 0.3, stepped: 0.05, star: 0.08,
}  # fmt: skip
"""Outlines of mostly nine and more sides."""


def softened(dice: Dice, width: int, height: int) -> Outline:
    """Another outline of straight sides with all (or every second one) of its corners rounded."""
    sharp = dice.weighted(SOFTENED)(dice, width, height)
    sides = [math.dist(curve.start, curve.end) for curve in sharp.loop.curves if isinstance(curve, Line)]
    every = 2 if len(sides) > 4 and dice.chance(0.25) else 1
    loop = shapes.softened(sharp.loop, min(sides) * dice.between(0.15, 0.45), every=every)
    x, y, room_width, room_height = sharp.room
    (x0, y0), (x1, y1) = loop.bounding_box()
    if x1 - x0 < width - 1e-6 or y1 - y0 < height - 1e-6:
        return sharp  # a rounded tip lies inside the box: the sizes in the captions would be those of the sharp one
    details = (
        *sharp.details,
        Detail("rounded corners", "all corners rounded" if every == 1 else "every second corner rounded"),
    )
    return Outline(sharp.name, loop, width, height, (x, y, room_width * 0.9, room_height * 0.9), details)


SOFTENED: dict[Maker, float] = {
    l_shaped: 0.2, t_shaped: 0.08, u_shaped: 0.14, stepped: 0.08, plus_shaped: 0.08, h_shaped: 0.06, notched: 0.12,
    quadrilateral: 0.22, house_shaped: 0.12, rectilinear: 0.22,
}  # fmt: skip
"""What is softened."""
ROUNDISH: dict[Maker, float] = {
    slot_shaped: 0.1, cornered: 0.22, d_shaped: 0.27, belted: 0.12, sector: 0.14, softened: 0.16, toothed: 0.05,
}  # fmt: skip
"""Outlines of lines and arcs."""
