"""Parts of several bodies side by side: tables, gates and grates."""

from __future__ import annotations

from cadtrain.data.synth.captions import Words, counted
from cadtrain.data.synth.drawing import LONGEST_SIDE, Dice, Drawing
from cadtrain.data.synth.outlines import rectangular, round_outline
from cadtrain.data.synth.shapes import rectangle, shifted
from cadtrain.data.synth.sizes import MIDDLE_OF_OTHERS, body_noun

L = LONGEST_SIDE


def table(dice: Dice, drawing: Drawing) -> Words:
    """A plate on legs or between posts: four at the corners, two at the ends, or walls."""
    width = max(20, 2 * round(L * dice.binned(MIDDLE_OF_OTHERS) / 2))
    top = dice.log_even(2, 16)
    height = dice.log_even(8, L - top - 2)
    leg = dice.log_even(2, min(20, width / 3))
    side = dice.one_of((1, -1))
    drawing.extrude("z", 0, top, [rectangle(L, width)])
    inset = 0 if dice.chance(0.5) else dice.even(2, 6)
    x, y = L / 2 - leg / 2 - inset, width / 2 - leg / 2 - inset
    low, high = (top, top + height) if side > 0 else (-height, 0)
    name = "square" if width == L else "rectangular"
    words = Words(body_noun(name, L, width, top), f"{L} x {width} x {top}")
    kind = dice.weighted({"corners": 0.55, "walls": 0.3, "ends": 0.15})
    where = f"on the {drawing.face('z', side)} face"
    if kind == "walls":
        drawing.extrude("z", low, high, [shifted(rectangle(leg, width), (s * (L / 2 - leg / 2), 0.0)) for s in (-1, 1)])
        words.add("two end walls", f"{leg} thick and {height} high {where}")
        return words
    post = round_outline(dice, leg, leg) if dice.chance(0.4) else rectangular(dice, leg, leg)
    centers = [(-x, -y), (x, -y), (x, y), (-x, y)] if kind == "corners" else [(-x, 0.0), (x, 0.0)]
    drawing.extrude("z", low, high, [post.at(center) for center in centers])
    noun = f"{post.name} {'leg' if height > leg else 'foot'}"
    noun = counted(len(centers), noun).replace("foots", "feet")
    words.add(
        noun,
        f"{post.size} and {height} high, one {'near each corner' if len(centers) == 4 else 'at each end'}, {where}",
    )
    return words


def grate(dice: Dice, drawing: Drawing) -> Words:
    """Two rails and bars across them, each a body of its own: a ladder, a gate, a grate."""
    number = dice.weighted({1: 0.3, 2: 0.25, 3: 0.2, 4: 0.1, 6: 0.08, 9: 0.07})
    width = max(24, 2 * round(L * dice.binned(MIDDLE_OF_OTHERS) / 2))
    rail, thickness = dice.log_even(2, width / 4), dice.log_even(2, 20)
    between = width - 2 * rail
    pitch = 2 * (L // (number + 1) // 2) if number > 1 else 0
    bar = dice.log_even(2, max(2, (pitch or 60) / 2))
    low = dice.even(0, thickness // 2) if dice.chance(0.4) else 0
    high = thickness if dice.chance(0.6) else dice.even(low + 2, thickness)
    drawing.extrude("z", 0, thickness, [shifted(rectangle(L, rail), (0.0, s * (width - rail) / 2)) for s in (-1, 1)])
    bars = [shifted(rectangle(bar, between), ((k - (number - 1) / 2) * pitch, 0.0)) for k in range(number)]
    drawing.extrude("z", low, high, bars)
    words = Words("frame", f"{L} x {width} x {thickness}")
    words.add("two rails", f"{rail} wide")
    words.add(counted(number, "cross bar"), f"{bar} wide and {high - low} thick between them")
    return words
