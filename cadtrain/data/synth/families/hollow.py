"""Parts with walls: housings, brackets, and bars of constant section with holes."""

from __future__ import annotations

from cadtrain.cad.sequence import Profile
from cadtrain.data.synth import shapes
from cadtrain.data.synth.captions import Words, counted
from cadtrain.data.synth.drawing import LONGEST_SIDE, Dice, Drawing
from cadtrain.data.synth.features import GAP, row
from cadtrain.data.synth.shapes import circle, polygon, rectangle
from cadtrain.data.synth.sizes import body_noun

L = LONGEST_SIDE


def housing(dice: Dice, drawing: Drawing) -> Words:
    """An open box: hollowed by a cut or a wall around a floor, with posts for screws, ribs or a window."""
    width, height = dice.even(40, 116), dice.log_even(16, 90)
    wall, floor = dice.log_even(2, 10), dice.log_even(2, 10)
    length_in, width_in = L - 2 * wall, width - 2 * wall
    radius = dice.even(wall + 4, 20) if dice.chance(0.3) else 0
    outer = shapes.cornered(L, width, [radius] * 4, is_round=True) if radius else rectangle(L, width)
    inner = (
        shapes.cornered(length_in, width_in, [radius - wall] * 4, is_round=True)
        if radius
        else rectangle(length_in, width_in)
    )
    words = Words("open housing", f"{L} x {width} x {height}")
    if dice.chance(0.5):
        drawing.extrude("z", 0, height, [outer])
        drawing.cut("z", floor, height, [inner])
    else:
        drawing.extrude("z", 0, floor, [outer])
        drawing.extrude("z", floor, height, [Profile(outer, (inner,))])
    if radius:
        words.add("rounded corners", f"of radius {radius}")
    words.add("", f"walls {wall} thick")
    words.add("", f"a floor {floor} thick")
    kind = dice.weighted({"none": 0.25, "posts": 0.45, "ribs": 0.3})
    rise = dice.even(4, height - floor - 2)
    inset = max(radius, 4)
    if kind == "posts":
        post = dice.even(6, 14)
        x, y = (length_in - post) // 2 - inset, (width_in - post) // 2 - inset
        number = dice.weighted({4: 0.6, 2: 0.4})
        centers = [(-x, -y), (x, y), (-x, y), (x, -y)][:number]
        if y * 2 > post + GAP:
            drawing.extrude("z", floor, floor + rise, [circle(post, center) for center in centers])
            words.add(counted(number, "round post"), f"of diameter {post} and height {rise} inside")
    elif kind == "ribs":
        number = dice.whole(1, 4)
        pitch = 2 * (length_in // (number + 1) // 2)
        rib = dice.even(2, max(2, min(8, pitch // 3)))
        bars = [shapes.shifted(rectangle(rib, width_in), ((k - (number - 1) / 2) * pitch, 0.0)) for k in range(number)]
        drawing.extrude("z", floor, floor + rise, bars)
        words.add(counted(number, "cross rib"), f"{rib} thick and {rise} high inside")
    if dice.chance(0.35) and height - floor >= 20:
        window = dice.even(4, min(40, height - floor - 10, width - 2 * inset - 4))
        middle = (floor + height) // 4 * 2
        drawing.cut("y", -width // 2, -width // 2 + wall, [circle(window, (0.0, middle))])
        words.add("a round hole", f"of diameter {window} through the {drawing.face('y', -1)} wall")
    return words


def bracket(dice: Dice, drawing: Drawing) -> Words:
    """An L bracket with holes through its legs and a gusset in its corner."""
    height, width = dice.even(40, L), dice.log_even(16, 116)
    wall = dice.log_even(4, 20)
    profile = polygon([(0, 0), (L, 0), (L, wall), (wall, wall), (wall, height), (0, height)])
    drawing.extrude("y", -width // 2, width // 2, [profile]) if width % 4 == 0 else drawing.extrude(
        "y", 0, width, [profile]
    )
    middle = 0 if width % 4 == 0 else width // 2
    words = Words("L-shaped bracket", f"with legs {L} and {height} long, {width} wide and {wall} thick")
    gusset = 0
    if dice.chance(0.4):
        gusset = dice.even(10, (min(L, height) - wall) // 2)
        rib = 4 * dice.whole(1, max(1, width // 16))
        corner = polygon([(wall, wall), (wall + gusset, wall), (wall, wall + gusset)])
        start = 2 * ((middle - rib // 2) // 2)
        drawing.extrude("y", start, start + rib, [corner])
        words.add("a triangular gusset", f"of side {gusset} and thickness {rib}")
    _leg_holes(dice, drawing, words, wall + gusset, L, width, middle, wall, axis="z", leg="long")
    _leg_holes(dice, drawing, words, wall + gusset, height, width, middle, wall, axis="x", leg="upright")
    return words


def _leg_holes(
    dice: Dice,
    drawing: Drawing,
    words: Words,
    start: int,
    end: int,
    width: int,
    middle: int,
    wall: int,
    *,
    axis: str,
    leg: str,
) -> None:
    """Holes in a leg that runs from `start` to `end`, across the part's width."""
    free = end - start - GAP
    number = dice.weighted({0: 0.3, 1: 0.35, 2: 0.35})
    if not number or free < 10 or width < 12:
        return
    places = row(dice, free, width - GAP, number)
    diameter = dice.log_even(4, min(places.width, places.height, 28))
    center = (start + end) / 2
    moved = [(u + center, v + middle) for u, v in places.centers]
    drawing.cut(axis, 0, wall, [circle(diameter, p if axis == "z" else (p[1], p[0])) for p in moved])
    words.add(counted(number, "round hole"), f"of diameter {diameter} through the {leg} leg")


def bar_with_holes(dice: Dice, drawing: Drawing) -> Words:
    """A bar of constant U, T, I or square-tube section, with holes through its web or floor."""
    section = dice.one_of(("U-shaped", "T-shaped", "I-shaped", "square"))
    width, height, wall = dice.log_even(20, 80), dice.log_even(20, 80), dice.log_even(2, 8)
    if section == "square":
        height = width
    w, h, t = width / 2, height, wall
    half = wall / 2
    outline = {
        "U-shaped": [(-w, 0), (w, 0), (w, h), (w - t, h), (w - t, t), (-w + t, t), (-w + t, h), (-w, h)],
        "T-shaped": [(-half, 0), (half, 0), (half, h - t), (w, h - t), (w, h), (-w, h), (-w, h - t), (-half, h - t)],
        "I-shaped": [
            (-w, 0), (w, 0), (w, t), (half, t), (half, h - t), (w, h - t),
            (w, h), (-w, h), (-w, h - t), (-half, h - t), (-half, t), (-w, t),
        ],
        "square": [(-w, 0), (w, 0), (w, h), (-w, h)],
    }[section]  # fmt: skip
    inner = (shapes.shifted(rectangle(width - 2 * t, height - 2 * t), (0.0, h / 2)),) if section == "square" else ()
    drawing.extrude("x", -L // 2, L // 2, [Profile(polygon(outline), inner)])
    noun = "square tube" if section == "square" else body_noun(section, width, height, L)
    words = Words(noun, f"{width} x {height} x {L}")
    words.add("", f"walls {wall} thick")
    # U: through its floor; square tube: through the lower wall; T and I: through the web, from the side.
    is_floor = section in ("U-shaped", "square")
    room = (width if is_floor else height) - 2 * wall - GAP
    number = dice.weighted({1: 0.3, 2: 0.4, 3: 0.15, 4: 0.1, 6: 0.05})
    places = row(dice, L, max(room, 2), number)
    diameter = dice.log_even(4, max(4, min(24, room - 2, L / number - GAP)))
    if room < 8:
        return words
    centers = [(x, 0.0 if is_floor else height / 2) for x, _ in places.centers]
    low, high = (0, wall) if is_floor else (-wall // 2, wall // 2)
    where = "floor" if section == "U-shaped" else "lower wall" if section == "square" else "web"
    drawing.cut("z" if is_floor else "y", low, high, [circle(diameter, center) for center in centers])
    words.add(counted(number, "round hole"), f"of diameter {diameter} through the {where}")
    return words
