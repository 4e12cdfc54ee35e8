"""Features on the faces of a body: bosses, ribs, pockets, holes and stacks of them, in groups; the tail of long designs."""

from __future__ import annotations

from dataclasses import dataclass

from cadtrain.cad.sequence import Profile
from cadtrain.data.synth.captions import Words, counted
from cadtrain.data.synth.drawing import Dice, Drawing
from cadtrain.data.synth.features import GAP, SMALLEST, Layout, layout, stamp
from cadtrain.data.synth.outlines import Outline
from cadtrain.data.synth.shapes import circle, rectangle
from cadtrain.data.synth.sizes import MIDDLE_OF_OTHERS, SHORT_OF_OTHERS, STEPS, body_noun, box_sides

_KINDS = {"boss": 0.66, "pocket": 0.17, "hole": 0.17}
_OTHER = {"x": ("y", "z"), "y": ("x", "z"), "z": ("x", "y")}


@dataclass(frozen=True, slots=True)
class _Box:
    """The body: its low and high ends along the drawing's axes."""

    low: dict[str, int]
    high: dict[str, int]

    def size(self, axis: str) -> int:
        return self.high[axis] - self.low[axis]


@dataclass(frozen=True, slots=True)
class _Group:
    """Equal features on one face; `amount` is a boss's height or a pocket's depth."""

    kind: str
    axis: str
    side: int
    count: int


def composition(dice: Dice, drawing: Drawing) -> Words:
    """A block with one to four groups of features, each group on its own stretch of the block and on one of its faces."""
    groups = _groups(dice)
    sides = box_sides(dice, MIDDLE_OF_OTHERS, SHORT_OF_OTHERS, least=4)
    order = "xyz" if max(group.count for group in groups) > 4 else dice.one_of(("xyz", "xzy"))
    overall = dict(zip(order, sides, strict=True))
    rises = _rises(dice, groups, overall)
    box = _Box(
        {a: rises.get((a, -1), 0) - overall[a] // 4 * 2 for a in "xyz"},
        {a: overall[a] - overall[a] // 4 * 2 - rises.get((a, 1), 0) for a in "xyz"},
    )
    words = _draw_body(dice, drawing, box)
    stretch = box.size("x") // len(groups)
    for k, group in enumerate(groups):
        start = box.low["x"] + k * stretch
        _draw_group(dice, drawing, words, group, box, (start, start + stretch), rises)
    return words


def _groups(dice: Dice) -> list[_Group]:
    num_features = int(dice.binned(STEPS)) - 1
    number = dice.whole(1, min(4, num_features)) if num_features < 8 else dice.whole(1, 2)
    counts = [num_features // number] * number
    counts[0] += num_features - sum(counts)
    main = dice.one_of((("z", 1), ("z", 1), ("z", -1)))
    groups = []
    for count in counts:
        # Many features need the largest faces, which lie across z.
        axis, side = main if count > 4 or dice.chance(0.62) else dice.one_of((("y", -1), ("y", 1), ("z", -1)))
        groups.append(_Group(dice.weighted(_KINDS), axis, side, count))
    return groups


def _rises(dice: Dice, groups: list[_Group], overall: dict[str, int]) -> dict[tuple[str, int], int]:
    """How far bosses stand out of each face that has some; changes nothing of the overall size."""
    rises: dict[tuple[str, int], int] = {}
    for group in groups:
        key = (group.axis, group.side)
        if group.kind == "boss" and key not in rises:
            free = overall[group.axis] - rises.get((group.axis, -group.side), 0)
            if free >= 6:
                rises[key] = dice.log_even(2, min(free - 4, free * 0.7))
    return rises


def _draw_body(dice: Dice, drawing: Drawing, box: _Box) -> Words:
    axis = sorted("xyz", key=box.size)[dice.weighted({0: 0.62, 1: 0.18, 2: 0.2})]
    u, v = _OTHER[axis]
    width, height, depth = box.size(u), box.size(v), box.size(axis)
    center = ((box.low[u] + box.high[u]) / 2, (box.low[v] + box.high[v]) / 2)
    loop = rectangle(width, height)
    drawing.extrude(axis, box.low[axis], box.high[axis], [Outline("", loop, width, height, (0, 0, 0, 0)).at(center)])
    name = "square" if width == height else "rectangular"
    return Words(body_noun(name, width, height, depth), f"{width} x {height} x {depth}")


def _draw_group(
    dice: Dice,
    drawing: Drawing,
    words: Words,
    group: _Group,
    box: _Box,
    span: tuple[int, int],
    rises: dict[tuple[str, int], int],
) -> None:
    axis, side = group.axis, group.side
    across = "y" if axis == "z" else "z"
    room_x, room_across = span[1] - span[0] - GAP, box.size(across) - GAP
    depth = box.size(axis)
    if min(room_x, room_across) < SMALLEST:
        return
    places = layout(dice, room_x, room_across, group.count)
    if min(places.width, places.height) < SMALLEST:
        return
    middle = ((span[0] + span[1]) / 2, (box.low[across] + box.high[across]) / 2)
    feature = stamp(dice, places.width, places.height, round_share=1e9 if places.takes_only_round else 0.24)
    loops = [feature.at((middle[0] + x, middle[1] + y)) for x, y in places.centers]
    at = box.high[axis] if side > 0 else box.low[axis]
    face = f"{drawing.face(axis, side)} face"
    rise = rises.get((axis, side), 0)
    if group.kind == "boss" and rise:
        _draw_bosses(dice, drawing, words, feature, places, middle, axis, (at, at + side * rise), face)
    elif group.kind == "pocket" and depth >= 8:
        deep = dice.log_even(2, depth * 0.6)
        drawing.cut(axis, at, at - side * deep, loops)
        words.add(
            counted(len(loops), f"{feature.name} pocket"),
            _said(f"{feature.size} and {deep} deep", places, f"in the {face}"),
        )
        _maybe_deeper(dice, drawing, words, feature, places, middle, axis, at - side * deep, side, depth - deep)
    elif depth > 0:
        drawing.cut(axis, at, at - side * depth, loops)
        noun = f"{feature.name} {'hole' if feature.name == 'round' else 'opening'}"
        words.add(counted(len(loops), noun), _said(feature.size, places, f"through the {face}"))


def _said(size: str, places: Layout, where: str) -> str:
    return f"{size} {places.words} {where}" if places.words else f"{size} {where}"


def _draw_bosses(
    dice: Dice,
    drawing: Drawing,
    words: Words,
    feature: Outline,
    places: Layout,
    middle: tuple[float, float],
    axis: str,
    ends: tuple[int, int],
    face: str,
) -> None:
    """Solid bosses or, where round ones are wide enough, rings."""
    hole = (
        dice.log_even(2, feature.width - 4)
        if feature.name == "round" and feature.width >= 8 and dice.chance(0.45)
        else 0
    )
    centers = [(middle[0] + x, middle[1] + y) for x, y in places.centers]
    inner = [(circle(hole, center),) if hole else () for center in centers]
    profiles = [Profile(feature.at(center), loops) for center, loops in zip(centers, inner, strict=True)]
    drawing.extrude(axis, *ends, profiles)
    is_rib = feature.name == "rectangular" and max(feature.width, feature.height) >= 4 * min(
        feature.width, feature.height
    )
    noun = "straight rib" if is_rib else f"{feature.name} {'ring' if hole else 'boss'}"
    size = f"{feature.size}{f' with a hole of diameter {hole}' if hole else ''} and {abs(ends[1] - ends[0])} high"
    words.add(counted(len(centers), noun), _said(size, places, f"on the {face}"))


def _maybe_deeper(
    dice: Dice,
    drawing: Drawing,
    words: Words,
    feature: Outline,
    places: Layout,
    middle: tuple[float, float],
    axis: str,
    floor: int,
    side: int,
    left: int,
) -> None:
    """A pocket in a single pocket's floor, sometimes."""
    x, y, width, height = feature.room
    if len(places.centers) > 1 or min(width, height) < 8 + GAP or left < 6 or not dice.chance(0.35):
        return
    inside = stamp(dice, width - GAP, height - GAP)
    deep = dice.log_even(2, left * 0.6)
    drawing.cut(axis, floor, floor - side * deep, [inside.at((middle[0] + x, middle[1] + y))])
    words.add(f"a {inside.name} pocket", f"{inside.size} and {deep} deep in its floor")
