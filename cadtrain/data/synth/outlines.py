"""Named outlines of a given overall size: what a part's body, an opening, a boss or a pocket is sketched with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from cadtrain.cad.sequence import Loop, Point2
from cadtrain.data.synth import shapes
from cadtrain.data.synth.captions import Detail
from cadtrain.data.synth.drawing import Dice

Room = tuple[float, float, float, float]
"""Centre x, y and width, height of a rectangle that lies inside an outline."""


@dataclass(frozen=True, slots=True)
class Outline:
    """A closed outline about the origin. `width` and `height` are those of its box in the drawing's units."""

    name: str
    """An adjective: `round`, `rectangular`, `L-shaped`."""
    loop: Loop
    width: int
    height: int
    room: Room
    details: tuple[Detail, ...] = ()
    """What more captions can say: `rounded corners`, and at length `all four corners rounded by 6`."""

    def at(self, center: Point2) -> Loop:
        """The loop about another centre."""
        return shapes.shifted(self.loop, center)

    @property
    def size(self) -> str:
        """`of diameter 12` or `20 x 12`."""
        return f"of diameter {self.width}" if self.name == "round" else f"{self.width} x {self.height}"


Maker = Callable[[Dice, int, int], Outline]


def _whole_room(width: float, height: float, share: float = 1.0) -> Room:
    return 0.0, 0.0, width * share, height * share


def round_outline(dice: Dice, width: int, height: int) -> Outline:
    """A circle of the smaller of the two sizes."""
    d = min(width, height)
    return Outline("round", shapes.circle(d), d, d, _whole_room(d, d, 0.7))


def rectangular(dice: Dice, width: int, height: int) -> Outline:
    """A rectangle or, where both sizes are equal, a square."""
    name = "square" if width == height else "rectangular"
    return Outline(name, shapes.rectangle(width, height), width, height, _whole_room(width, height))


def quadrilateral(dice: Dice, width: int, height: int) -> Outline:
    """A trapezoid or a parallelogram, standing on its longer side along x."""
    w, h, slant = width / 2, height / 2, width * dice.between(0.12, 0.4)
    if dice.chance(0.6):
        left = slant * dice.one_of((0.0, 0.5, 1.0))
        points = [(-w, -h), (w, -h), (w - slant + left, h), (-w + left, h)]
        return Outline("trapezoidal", shapes.polygon(points), width, height, _whole_room(width - 2 * slant, height))
    loop = shapes.polygon([(-w, -h), (w - slant, -h), (w, h), (-w + slant, h)])
    return Outline("parallelogram-shaped", loop, width, height, _whole_room(width - 2 * slant, height))


def triangular(dice: Dice, width: int, height: int) -> Outline:
    """A right or an isosceles triangle."""
    w, h = width / 2, height / 2
    if dice.chance(0.6):
        return Outline(
            "triangular", shapes.polygon([(-w, -h), (w, -h), (-w, h)]), width, height,
            (-width * 0.25, -height * 0.25, width * 0.4, height * 0.4),
        )  # fmt: skip
    loop = shapes.polygon([(-w, -h), (w, -h), (0.0, h)])
    return Outline("triangular", loop, width, height, (0.0, -height * 0.25, width * 0.4, height * 0.4))


def regular(dice: Dice, width: int, height: int) -> Outline:
    """A regular hexagon or octagon with two corners on the x axis (the octagon: with four sides along the axes)."""
    size = min(width, height)
    if dice.chance(0.7):
        across_flats = size * math.sqrt(3) / 2
        loop = shapes.regular_polygon(6, size / 2)
        return Outline("hexagonal", loop, size, round(across_flats), _whole_room(size * 0.6, size * 0.6))
    loop = shapes.regular_polygon(8, size / 2 / math.cos(math.pi / 8), math.pi / 8)
    return Outline("octagonal", loop, size, size, _whole_room(size, size, 0.65))


def cornered(dice: Dice, width: int, height: int) -> Outline:
    """A rectangle with one to four corners rounded or cut off."""
    most = min(width, height) * 0.45
    is_round = dice.chance(0.6)
    size = dice.log_even(2, most) if most >= 4 else most * dice.between(0.4, 1.0)
    marks = dice.weighted(
        {(1, 1, 1, 1): 0.5, (1, 1, 0, 0): 0.12, (0, 1, 1, 0): 0.12, (1, 0, 0, 0): 0.2, (1, 0, 1, 0): 0.06}
    )
    loop = shapes.cornered(width, height, [size * mark for mark in marks], is_round=is_round)
    room = _whole_room(width - 2 * size, height - 2 * size) if sum(marks) else _whole_room(width, height)
    number, way = sum(marks), "rounded" if is_round else "chamfered"
    what = "all four corners" if number == 4 else "one corner" if number == 1 else "two corners"
    short = f"{way} corners" if number == 4 else f"{what} {way}"
    detail = Detail(short, f"{what} {way}" + (f" by {size}" if isinstance(size, int) else ""))
    if is_round and number == 4:
        return Outline("rounded rectangular", loop, width, height, room, (detail,))
    name = "round-cornered rectangular" if is_round else "chamfered rectangular"
    return Outline(name, loop, width, height, room, (detail,))


def slot_shaped(dice: Dice, width: int, height: int) -> Outline:
    """A stadium along its longer side; needs two different sizes."""
    if width == height:
        return cornered(dice, width, height)
    loop = shapes.slot(max(width, height), min(width, height))
    room = _whole_room(width - height, height) if width > height else _whole_room(width, height - width)
    return Outline("slot-shaped", loop if width > height else shapes.turned(loop), width, height, room)


def d_shaped(dice: Dice, width: int, height: int) -> Outline:
    """A rectangle with one bowed end, or a circle with a flat."""
    w, h = width / 2, height / 2
    if dice.chance(0.35):
        cut = h * dice.between(0.3, 0.8)  # height of the flat above the middle of the circle that is `height` across
        reach = math.sqrt(max(h * h - cut * cut, 0.0))
        sweep = 2 * math.pi - 2 * math.acos(cut / h)
        size = 2 * round(h)
        loop = shapes.path((-reach, cut), [(reach, cut, sweep), (-reach, cut)])
        return Outline("D-shaped", loop, size, round(h + cut), (0.0, -h * 0.2, h, h * 0.8))
    rise = min(height * dice.between(0.1, 0.6), w if dice.chance(0.5) else 0.4 * w)
    base = h - rise
    loop = shapes.path((-w, -h), [(w, -h), (w, base), (-w, base, 4 * math.atan(rise / w)), (-w, -h)])
    room = (0.0, -rise / 2, width * 1.0, height - rise)
    return Outline("D-shaped" if rise > 0.98 * w else "arched", loop, width, height, room)


def belted(dice: Dice, width: int, height: int) -> Outline:
    """Two unequal round ends and their common tangents: a cam, a drop, a link."""
    long, short = max(width, height), min(width, height)
    if long < 1.25 * short:
        return d_shaped(dice, width, height)
    loop = shapes.belt(long, short, short * dice.between(0.2, 0.8))
    middle = -(long - short) / 2
    loop, room = (loop, (middle, 0.0, short * 0.6, short * 0.6)) if width >= height else (
        shapes.turned(loop), (0.0, middle, short * 0.6, short * 0.6)
    )  # fmt: skip
    return Outline("drop-shaped", loop, width, height, room)


def sector(dice: Dice, width: int, height: int) -> Outline:
    """A piece of a ring that stands like a bridge, with straight or round ends."""
    radius = width / 2
    ring = radius * dice.between(0.2, 0.55)
    half_ring = dice.chance(0.4)
    sweep = math.pi if half_ring else math.radians(dice.between(40, 120))
    capped = dice.chance(0.4)
    loop = shapes.ring_sector(radius, ring, sweep, is_capped=capped)
    (x0, y0), (x1, y1) = loop.bounding_box()
    # Scaled to be exactly as wide as asked for, its box about the origin.
    scale = width / (x1 - x0)
    loop = shapes.ring_sector(radius * scale, ring * scale, sweep, is_capped=capped)
    (x0, y0), (x1, y1) = loop.bounding_box()
    middle = (y0 + y1) / 2
    room = (0.0, radius * scale - ring * scale / 2 - middle, ring * scale * 0.6, ring * scale * 0.6)
    name = "half-ring" if half_ring and not capped else "kidney-shaped" if capped else "ring-sector"
    return Outline(name, shapes.shifted(loop, (0.0, -middle)), width, round(y1 - y0), room)


def bowed(dice: Dice, width: int, height: int) -> Outline:
    """Arcs only: a lens, a crescent or a pillow."""
    long, short = max(width, height), min(width, height)
    if long > 1.3 * short and dice.chance(0.6):
        if dice.chance(0.6):
            loop, name = shapes.lens(long, short), "lens-shaped"
        else:
            inside = short * dice.between(0.2, 0.5)
            w = long / 2
            sweeps = [4 * math.atan(min(1.0, depth / w)) for depth in (short, inside)]
            raw = shapes.path((-w, 0.0), [(w, 0.0, sweeps[0]), (-w, 0.0, -sweeps[1])])
            loop, name = shapes.shifted(raw, (0.0, min(short, w) / 2)), "crescent-shaped"
            if short > w:
                short = 2 * round(w / 2)
        share = 0.5 if name == "lens-shaped" else 0.0
        width, height = (long, short) if width >= height else (short, long)
        return Outline(
            name, loop if width >= height else shapes.turned(loop), width, height, _whole_room(width, height, share)
        )
    bulge = short * dice.between(0.06, 0.2)
    room = _whole_room(width - 2 * bulge, height - 2 * bulge)
    return Outline("pillow-shaped", shapes.pillow(width, height, bulge), width, height, room)
