"""Single extrusions of one outline, plain or with openings, and links."""

from __future__ import annotations

from cadtrain.cad.sequence import Loop, Profile
from cadtrain.data.synth.captions import Words
from cadtrain.data.synth.drawing import LONGEST_SIDE, Dice, Drawing
from cadtrain.data.synth.features import number_of_openings, openings
from cadtrain.data.synth.letters import FEW_SIDES, MANY_SIDES, ROUNDISH
from cadtrain.data.synth.outlines import (
    Maker,
    Outline,
    bowed,
    quadrilateral,
    rectangular,
    round_outline,
    slot_shaped,
    triangular,
)
from cadtrain.data.synth.shapes import circle, rectangle
from cadtrain.data.synth.sizes import (
    MIDDLE_OF_BLOCKS,
    MIDDLE_OF_PRISMS,
    SHORT_OF_BLOCKS,
    body_noun,
    box_sides,
    sketch_and_depth,
)

L = LONGEST_SIDE

_KINDS = {"four": 0.37, "round": 0.19, "roundish": 0.24, "few": 0.165, "many": 0.075, "arcs": 0.03, "three": 0.012}
_MAKERS: dict[str, dict[Maker, float]] = {
    "four": {rectangular: 0.93, quadrilateral: 0.07},
    "roundish": ROUNDISH,
    "few": FEW_SIDES,
    "many": MANY_SIDES,
    "arcs": {bowed: 1.0},
    "three": {triangular: 1.0},
}
_SHARE_WITH_OPENINGS = {
    "four": 0.24,
    "round": 0.6,
    "roundish": 0.5,
    "few": 0.24,
    "many": 0.34,
    "arcs": 0.7,
    "three": 0.2,
}


def body(dice: Dice, kind: str, *, least: int = 2) -> tuple[Outline, int]:
    """An outline of a kind and the depth of its extrusion, the longest side of both `LONGEST_SIDE`."""
    if kind == "round":
        return _round_body(dice, least)
    middle = MIDDLE_OF_BLOCKS if kind == "four" else MIDDLE_OF_PRISMS
    for _ in range(8):
        sides = box_sides(dice, middle, SHORT_OF_BLOCKS, least=least)
        short, second = (0.67, 0.2) if kind == "four" else (0.62, 0.14)
        width, height, depth = sketch_and_depth(dice, sides, short=short, middle=second)
        if kind != "four" and min(width, height) < 0.12 * max(width, height):
            continue  # an outline this slim shows nothing of its shape
        outline = dice.weighted(_MAKERS[kind])(dice, width, height)
        (x0, y0), (x1, y1) = outline.loop.bounding_box()
        if abs(max(x1 - x0, y1 - y0, depth) - L) < 1e-6:
            return outline, depth
    return rectangular(dice, L, 2 * round(L / 4)), dice.even(least, 40)


def _round_body(dice: Dice, least: int) -> tuple[Outline, int]:
    if dice.chance(0.68):
        ratio = dice.binned(
            {(0.015, 0.05): 0.16, (0.05, 0.1): 0.22, (0.1, 0.2): 0.16, (0.2, 0.35): 0.2, (0.35, 0.9): 0.26}
        )
        return round_outline(dice, L, L), max(least, 2 * round(ratio * L / 2))
    ratio = dice.binned({(0.05, 0.2): 0.4, (0.2, 0.5): 0.4, (0.5, 0.95): 0.2})
    diameter = max(least, 2 * round(ratio * L / 2))
    return round_outline(dice, diameter, diameter), L


def prism(dice: Dice, drawing: Drawing) -> Words:
    """One extrusion: the commonest real part."""
    kind = dice.weighted(_KINDS)
    outline, depth = body(dice, kind)
    words = name_body(outline, depth)
    inner: list[Loop] = []
    if dice.chance(_SHARE_WITH_OPENINGS[kind]):
        inner = _inner(dice, outline, kind, words)
    drawing.extrude("z", 0, depth, [Profile(outline.loop, tuple(inner))])
    return words


def name_body(outline: Outline, depth: int) -> Words:
    """The words for an extruded outline, without features."""
    thick = (
        f"of diameter {outline.width} and length {depth}" if outline.name == "round" else f"{outline.size} x {depth}"
    )
    words = Words(body_noun(outline.name, outline.width, outline.height, depth), thick)
    words.details.extend(outline.details)
    return words


def _inner(dice: Dice, outline: Outline, kind: str, words: Words) -> list[Loop]:
    size = min(outline.width, outline.height)
    if kind == "round" and dice.chance(0.86) and size >= 12:
        bore = dice.log_even(max(4, 0.1 * size), size - max(4, 0.06 * size))
        words.add("a central round hole", f"of diameter {bore}")
        return [circle(bore)]
    if kind == "four" and outline.name != "trapezoidal" and size >= 20 and dice.chance(0.25):
        wall = dice.log_even(4, size * 0.35)
        width, height = outline.width - 2 * wall, outline.height - 2 * wall
        if outline.name in ("square", "rectangular"):
            name = "square" if width == height else "rectangular"
            words.add(f"a central {name} opening", f"{width} x {height}")
            return [rectangle(width, height)]
    return openings(dice, outline.room, words, number_of_openings(dice))


def link(dice: Dice, drawing: Drawing) -> Words:
    """A slot-shaped or drop-shaped arm with a hole at each end, with or without bosses around the holes."""
    width = dice.even(24, 56)
    hole, reach = dice.even(6, width // 2), (L - width) / 2
    thickness = dice.log_even(4, 30)
    slot = slot_shaped(dice, L, width)
    words = name_body(slot, thickness)
    words.add("two round holes", f"of diameter {hole}, one at each end")
    ends = ((-reach, 0.0), (reach, 0.0))
    drawing.extrude("z", 0, thickness, [Profile(slot.loop, tuple(circle(hole, end) for end in ends))])
    boss = dice.even(hole + 6, width)
    if boss <= width and dice.chance(0.7):
        rise = dice.log_even(4, 30)
        bossed = ends if dice.chance(0.6) else ends[1:]
        rings = [Profile(circle(boss, end), (circle(hole, end),)) for end in bossed]
        drawing.extrude("z", thickness, thickness + rise, rings)
        top = f"on the {drawing.face('z', 1)} face around {'the holes' if len(bossed) == 2 else 'one hole'}"
        words.add(
            "two round bosses" if len(bossed) == 2 else "a round boss", f"of diameter {boss} and height {rise} {top}"
        )
    return words
