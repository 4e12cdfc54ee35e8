"""Parts about one axis: shafts, flanges, and stacks of all kinds of outlines."""

from __future__ import annotations

from dataclasses import dataclass

from cadtrain.cad.sequence import Loop, Profile
from cadtrain.data.synth.captions import Words, counted
from cadtrain.data.synth.drawing import LONGEST_SIDE, Dice, Drawing
from cadtrain.data.synth.families.prism import body, name_body
from cadtrain.data.synth.features import around, stamp
from cadtrain.data.synth.outlines import Outline
from cadtrain.data.synth.shapes import circle

L = LONGEST_SIDE
_KINDS = {"four": 0.34, "round": 0.22, "roundish": 0.34, "few": 0.1, "many": 0.03, "arcs": 0.03}


def flange(dice: Dice, drawing: Drawing) -> Words:
    """A disc with a hub, a bore and bolt holes, some with a spigot on the other side."""
    thickness, rise = dice.log_even(4, 24), dice.log_even(6, 70)
    hub = dice.even(24, 56)
    bore = dice.log_even(6, hub - 8)
    bolts = around(dice, L, dice.weighted({3: 0.2, 4: 0.35, 5: 0.08, 6: 0.25, 8: 0.12}))
    bolt = dice.even(4, min(14, bolts.width))
    words = Words("round flange", f"of diameter {L} and thickness {thickness}")
    words.add(counted(len(bolts.centers), "bolt hole"), f"of diameter {bolt} {bolts.words}")
    inner = (circle(bore), *(circle(bolt, center) for center in bolts.centers))
    drawing.extrude("z", 0, thickness, [Profile(circle(L), inner)])
    drawing.extrude("z", thickness, thickness + rise, [Profile(circle(hub), (circle(bore),))])
    words.add("a hub", f"of diameter {hub} and height {rise} on the {drawing.face('z', 1)} face")
    words.add("a central bore", f"of diameter {bore}")
    if dice.chance(0.25):
        spigot, depth = dice.even(bore + 4, hub), dice.log_even(4, 24)
        drawing.extrude("z", -depth, 0, [Profile(circle(spigot), (circle(bore),))])
        words.add("a spigot", f"of diameter {spigot} and height {depth} on the {drawing.face('z', -1)} face")
    return words


def shaft(dice: Dice, drawing: Drawing) -> Words:
    """A stepped shaft of two to six sections along one axis, some with a bore."""
    wanted = dice.weighted({2: 0.42, 3: 0.26, 4: 0.14, 5: 0.11, 6: 0.07})
    ends = sorted({0, L, *(dice.even(4, L - 4) for _ in range(wanted - 1))})
    thickest = dice.log_even(10, 110)
    diameters: list[int] = []
    for _ in ends[1:]:
        choice = dice.even(max(4, 0.3 * thickest), thickest)
        diameters.append(choice + 4 if diameters and choice == diameters[-1] else choice)
    bore = dice.log_even(2, min(diameters) - 4) if min(diameters) >= 10 and dice.chance(0.3) else 0
    hole = (circle(bore),) if bore else ()
    for start, end, diameter in zip(ends, ends[1:], diameters, strict=False):
        drawing.extrude("z", start, end, [Profile(circle(diameter), hole)])
    sections = [f"diameter {d} length {b - a}" for a, b, d in zip(ends, ends[1:], diameters, strict=False)]
    words = Words("stepped shaft" if len(ends) > 2 else "round rod", f"of length {L}")
    if len(ends) > 2:
        words.add(counted(len(diameters), "section"), f"({', '.join(sections)})")
    else:
        words = Words("round rod", f"of diameter {diameters[0]} and length {L}")
    if bore:
        words.add("a bore", f"of diameter {bore} along its axis")
    return words


@dataclass(frozen=True, slots=True)
class _Level:
    """A boss on the surface before it, or a pocket into it."""

    outline: Outline
    side: int
    amount: int
    is_pocket: bool


def stack(dice: Dice, drawing: Drawing) -> Words:
    """A body with smaller ones on it, each on the one before, or pockets each in the one before; some bored through."""
    outline, depth = body(dice, dice.weighted(_KINDS), least=4)
    levels = _levels(dice, outline, depth)
    if depth == L and max(outline.width, outline.height) < L:
        depth -= sum(level.amount for level in levels if not level.is_pocket)
    bore = _bore(dice, [outline, *(level.outline for level in levels)], levels)
    hole: tuple[Loop, ...] = (circle(bore),) if bore else ()
    words = name_body(outline, depth)
    drawing.extrude("z", 0, depth, [Profile(outline.loop, hole)])
    at = {1: depth, -1: 0}
    for level in levels:
        start, side = at[level.side], level.side
        end = start - side * level.amount if level.is_pocket else start + side * level.amount
        face = drawing.face("z", side)
        if level.is_pocket:
            drawing.cut("z", start, end, [level.outline.loop])
            words.add(f"a {level.outline.name} pocket", f"{level.outline.size} and {level.amount} deep from the {face}")
        else:
            drawing.extrude("z", start, end, [Profile(level.outline.loop, hole)])
            words.add(
                f"a {level.outline.name} boss", f"{level.outline.size} and {level.amount} high towards the {face}"
            )
        at[side] = end
    if bore:
        words.add("a central bore", f"of diameter {bore}")
    return words


def _levels(dice: Dice, outline: Outline, depth: int) -> list[_Level]:
    """What is on the body, from it outwards: as much as there is room for, at least one level where there is any room."""
    is_rod = max(outline.width, outline.height) < L
    spare = round(L * 0.6) if is_rod else L - depth
    number = dice.weighted({1: 0.52, 2: 0.3, 3: 0.12, 4: 0.06})
    is_two_sided = number > 1 and dice.chance(0.35)
    first_side = dice.one_of((1, 1, -1))
    surface = {1: outline, -1: outline}
    deep = {1: depth * 0.45, -1: depth * 0.45}
    levels: list[_Level] = []
    for k in range(number):
        side = first_side * (-1) ** k if is_two_sided else first_side
        x, y, width, height = surface[side].room
        if min(width, height) < 6 or abs(x) + abs(y) > 1e-9:
            continue
        is_pocket = dice.chance(0.27) and deep[side] >= 4 and not is_rod
        most = deep[side] * 0.9 if is_pocket else spare / (number - k)
        if most < 2:
            continue
        next_outline = _nested(dice, surface[side], is_pocket)
        amount = dice.log_even(2, most)
        levels.append(_Level(next_outline, side, amount, is_pocket))
        surface[side] = next_outline
        if is_pocket:
            deep[side] -= amount
        else:
            spare -= amount
            deep[side] += amount
    return levels


def _nested(dice: Dice, base: Outline, is_pocket: bool) -> Outline:
    """An outline that fits on the base with a margin."""
    _, _, width, height = base.room
    margin = 4 if is_pocket or base.name in ("square", "rectangular") else 0
    return stamp(dice, max(4, width - margin), max(4, height - margin), round_share=0.3)


def _bore(dice: Dice, outlines: list[Outline], levels: list[_Level]) -> int:
    if not dice.chance(0.45) or any(level.is_pocket for level in levels):
        return 0
    if any(abs(outline.room[0]) + abs(outline.room[1]) > 1e-9 for outline in outlines):
        return 0
    room = min(min(outline.room[2:]) for outline in outlines)
    return dice.log_even(2, room - 2) if room >= 6 else 0
