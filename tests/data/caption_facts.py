"""What a procedural part's caption says, found in its words again and held against the sequence alone.

`false_claims` reads a caption without knowing how it was made: counts, shapes, sizes, places, proportions, planes, steps.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from cadtrain.cad.describe import facts
from cadtrain.cad.sequence import Arc, CadSequence, Circle, Line, Loop, Operation, SketchExtrude

WORDS = dict(
    zip(
        ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"],
        range(13),
        strict=True,
    )
)
WORDS |= {"a": 1, "an": 1}
COUNT = rf"\b({'|'.join(WORDS)}|\d+)"
FEATURE = re.compile(
    rf"{COUNT} (?:central )?((?:[A-Za-z]+-?)+(?: rectangular)?)? ?"
    r"\b(hole|opening|pocket|boss|ring|rib|leg|post|hub|spigot|feet|foot)(?:s|es)? "
    r"(?:of diameter (\d+)|(\d+) x (\d+))(?: with a hole of diameter \d+)?(?: and (?:height )?(\d+)(?: high| deep)?)?"
    r"(.*?)(?=, | and (?:an?|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\d+) [A-Za-z]|\. |\.$|$)",
)
TOWARDS = {"top": (2, 1), "bottom": (2, -1), "back": (1, 1), "front": (1, -1), "right": (0, 1), "left": (0, -1)}
SHAPES = {
    "round",
    "square",
    "rectangular",
    "rounded rectangular",
    "hexagonal",
    "octagonal",
    "triangular",
    "slot-shaped",
}

Claim = tuple[str, bool]
"""What is claimed, and whether it is so."""


def false_claims(caption: str, sequence: CadSequence) -> list[str]:
    """The caption's claims that the sequence does not bear out."""
    return [claim for claim, holds in claims(caption, sequence) if not holds]


def claims(caption: str, sequence: CadSequence) -> Iterator[Claim]:
    """Every claim that the caption makes in a way that is known here."""
    yield from _sentences(caption, sequence)
    yield from _body(caption, sequence.steps[0])
    yield from _features(caption, sequence)
    yield from _bars_and_sections(caption, sequence)
    yield from _outline(caption, sequence.steps[0].profile.outer)


def _close(a: float, b: float, tolerance: float = 1.01) -> bool:
    return abs(a - b) <= tolerance


def _number(word: str) -> int:
    return WORDS[word] if word in WORDS else int(word)


def _sides(loop: Loop) -> list[float]:
    (x0, y0), (x1, y1) = loop.bounding_box()
    return sorted((x1 - x0, y1 - y0))


def _is_circle(loop: Loop) -> bool:
    return isinstance(loop.curves[0], Circle)


def _has_size(loop: Loop, diameter: str | None, first: str | None, second: str | None) -> bool:
    if diameter:
        return _is_circle(loop) and _close(_sides(loop)[0], int(diameter), 1e-6)
    sides = sorted((int(first or 0), int(second or 0)))
    return not _is_circle(loop) and all(_close(a, b) for a, b in zip(_sides(loop), sides, strict=True))


def _depth(step: SketchExtrude) -> float:
    low, high = step.heights
    return high - low


# ------------------------------------------------------------------------------------------------------------ sentences


def _sentences(caption: str, sequence: CadSequence) -> Iterator[Claim]:
    steps = sequence.steps
    if found := re.search(r"(?:sketched|lies) on the (XY|XZ|YZ) plane\.", caption):
        axis = {"XY": 2, "XZ": 1, "YZ": 0}[found[1]]
        yield found[0], abs(steps[0].plane.z_axis[axis]) == 1
    if "plane is oblique" in caption:
        yield "oblique", max(map(abs, steps[0].plane.z_axis)) < 0.999
    if found := re.search(rf"It takes {COUNT} extrusions(?:, {COUNT} of them (?:a )?cuts?)?\.", caption):
        cuts = sum(step.operation is Operation.CUT for step in steps)
        yield found[0], _number(found[1]) == len(steps) and (_number(found[2]) if found[2] else 0) == cuts
    if "It is a single extrusion." in caption:
        yield "a single extrusion", len(steps) == 1
    times = r"about(?: ([\d.]+) times)?"
    if found := re.search(rf"is {times} as long as wide and {times} as wide as thick", caption):
        long, middle, short = sorted(sequence.material_box().size, reverse=True)
        for said, ratio in ((found[1], long / middle), (found[2], middle / short)):
            yield found[0], _close(float(said or 1), ratio, 0.051 if ratio < 9.95 else 0.51)


# ------------------------------------------------------------------------------------------------------------ the body


def _body(caption: str, step: SketchExtrude) -> Iterator[Claim]:
    head = re.split(r" with |\. ", caption)[0]
    outer = step.profile.outer
    if found := re.search(r"of diameter (\d+) and (?:length|thickness) (\d+)", head):
        yield found[0], _has_size(outer, found[1], None, None) and _close(_depth(step), int(found[2]), 1e-6)
    is_whole_part = re.search(r"housing|frame", head)
    if (found := re.search(r"(\d+) x (\d+) x (\d+)", head)) and not is_whole_part:
        said = sorted(map(int, found.groups()))
        yield found[0], all(_close(a, b) for a, b in zip(sorted((*_sides(outer), _depth(step))), said, strict=True))
    shape = facts(CadSequence((step,))).base_shape
    for name in SHAPES & {
        "square",
        "rectangular",
        "hexagonal",
        "octagonal",
        "triangular",
        "slot-shaped",
        "rounded rectangular",
    }:
        if re.search(rf"an? {name} (?:plate|block|bar)\b", head.lower()):
            yield name, shape == name
    ratio = _depth(step) / _sides(outer)[0]
    if found := re.search(r"(plate|disc) (?:\d|of)", head):
        yield found[0], ratio < 0.26
    if found := re.search(r" (bar|rod) (?:\d|of)", head):
        yield found[0], _depth(step) > 1.49 * _sides(outer)[1]


def _outline(caption: str, outer: Loop) -> Iterator[Claim]:
    lines = [curve for curve in outer.curves if isinstance(curve, Line)]
    arcs = [curve for curve in outer.curves if isinstance(curve, Arc)]
    is_softened = "corners rounded" in caption or "corner rounded" in caption or "rounded corners" in caption
    if found := re.search(r"(\d+) teeth", caption):
        yield found[0], len(arcs) == int(found[1])
    if found := re.search(r"(\d+) points", caption):
        yield found[0], len(lines) == 2 * int(found[1])
    if (found := re.search(rf"{COUNT} notch(?:es)? in one side", caption)) and not is_softened:
        yield found[0], len(lines) == 4 + 4 * _number(found[1])
    if found := re.search(r"all four corners (rounded|chamfered) by (\d+)", caption):
        radii = [arc.radius for arc in arcs] if found[1] == "rounded" else [_leg(line) for line in lines if _leg(line)]
        yield found[0], len(radii) == 4 and all(_close(radius, int(found[2]), 1e-6) for radius in radii)


def _leg(line: Line) -> float:
    dx, dy = abs(line.end[0] - line.start[0]), abs(line.end[1] - line.start[1])
    return dx if dx > 1e-9 and dy > 1e-9 else 0.0


# ------------------------------------------------------------------------------------------------------------ features


def _features(caption: str, sequence: CadSequence) -> Iterator[Claim]:
    """Features of equal kind and size are counted together: two groups of bosses may be alike."""
    totals: Counter[tuple[str, ...]] = Counter()
    phrases = list(FEATURE.finditer(caption))
    for found in phrases:
        count, name, noun, diameter, first, second, amount, rest = found.groups()
        first, second = sorted((first, second), key=lambda side: int(side or 0))
        key = (noun, diameter or "", first or "", second or "", amount or "")
        totals[key] += _number(count)
        made = _made(sequence, noun, diameter, first, second, amount)
        yield from _placed(found[0], rest, made, _number(count), sequence)
        if name in SHAPES and made:
            shapes = {facts(CadSequence((_as_step(step, loop),))).base_shape for step, loop in made}
            yield found[0], name in shapes
    for (noun, diameter, first, second, amount), total in totals.items():
        made = _made(sequence, noun, diameter or None, first or None, second or None, amount or None)
        said = f"{total} {noun} {diameter or f'{first} x {second}'} {amount}"
        yield said, len(made) == total if noun not in ("hole", "opening") else len(made) >= total
        others = [f for f in re.findall(r"of diameter (\d+)", caption) if f == diameter]
        if noun == "hole" and len(others) == sum(f[4] == diameter for f in phrases):
            yield f"{said}, no more", len(made) == total or "link" in caption or _rings(sequence)


def _rings(sequence: CadSequence) -> bool:
    """Whether a hole runs through several added bodies and so is drawn several times."""
    return any(step.profile.inner for step in sequence.steps[1:])


def _made(
    sequence: CadSequence, noun: str, diameter: str | None, first: str | None, second: str | None, amount: str | None
) -> list[tuple[SketchExtrude, Loop]]:
    """The loops that a feature of this kind and size can be, with their steps."""
    cuts = [step for step in sequence.steps if step.operation is Operation.CUT]
    added = [step for step in sequence.steps[1:] if step.operation is not Operation.CUT]
    if noun in ("hole", "opening"):
        loops = [(step, loop) for step in sequence.steps for loop in step.profile.inner]
        loops += [(step, step.profile.outer) for step in cuts]
    else:
        loops = [(step, step.profile.outer) for step in (cuts if noun == "pocket" else added)]
    return [
        (step, loop)
        for step, loop in loops
        if _has_size(loop, diameter, first, second) and (not amount or _close(_depth(step), int(amount), 1e-6))
    ]


def _as_step(step: SketchExtrude, loop: Loop) -> SketchExtrude:
    return replace(step, profile=replace(step.profile, outer=loop, inner=()), operation=Operation.NEW)


def _placed(
    phrase: str, rest: str, made: list[tuple[SketchExtrude, Loop]], count: int, sequence: CadSequence
) -> Iterator[Claim]:
    if len(made) != count or not made:
        return  # equal features elsewhere: which of them are meant cannot be told
    boxes = [_middle(loop) for _, loop in made]
    middle = sum(x for x, _ in boxes) / count, sum(y for _, y in boxes) / count
    if found := re.search(r"on a circle of diameter (\d+)", rest):
        yield phrase, all(_close(2 * math.dist(box, middle), int(found[1]), 1e-6) for box in boxes)
    if "in a row" in rest or "side by side" in rest:
        yield phrase, min(max(b[k] for b in boxes) - min(b[k] for b in boxes) for k in (0, 1)) < 0.51
    if found := re.search(r"in (\d+) rows of (\d+)", rest):
        levels = sorted(len({round(box[k], 3) for box in boxes}) for k in (0, 1))
        yield phrase, levels == sorted((int(found[1]), int(found[2]))) and math.prod(levels) == count
    if "one near each corner" in rest and count == 4:
        yield phrase, len({(box[0] > middle[0], box[1] > middle[1]) for box in boxes}) == 4
    if found := re.search(r"\b(?:on|in|from|towards|through) the (top|bottom|front|back|left|right)\b", rest):
        axis, sign = TOWARDS[found[1]]
        base = sequence.steps[0].bounding_box().center[axis]
        for step, _ in made:
            centre = step.bounding_box().center[axis]
            is_across = abs(step.plane.z_axis[axis]) == 1
            yield phrase, is_across if "through" in found[0] else sign * (centre - base) > 0


def _middle(loop: Loop) -> tuple[float, float]:
    (x0, y0), (x1, y1) = loop.bounding_box()
    return (x0 + x1) / 2, (y0 + y1) / 2


def _bars_and_sections(caption: str, sequence: CadSequence) -> Iterator[Claim]:
    steps = sequence.steps
    added = [step for step in steps if step.operation is not Operation.CUT]
    if found := re.search(rf"{COUNT} sections? \((.*?)\)", caption):
        said = [(int(d), int(length)) for d, length in re.findall(r"diameter (\d+) length (\d+)", found[2])]
        drawn = [(round(_sides(step.profile.outer)[0]), round(_depth(step))) for step in added]
        yield found[0], said == drawn and _number(found[1]) == len(drawn)
    if found := re.search(rf"{COUNT} cross bars? (\d+) wide and (\d+) thick", caption):
        bars = [s for s in added[2:] if _close(_depth(s), int(found[3]), 1e-6)]
        yield (
            found[0],
            len(bars) == _number(found[1]) and all(int(found[2]) in map(round, _sides(b.profile.outer)) for b in bars),
        )
    if found := re.search(rf"{COUNT} cross ribs? (\d+) thick and (\d+) high", caption):
        ribs = [
            s for s in added if _close(_sides(s.profile.outer)[0], int(found[2])) and _close(_depth(s), int(found[3]))
        ]
        yield found[0], len(ribs) == _number(found[1])
    if found := re.search(r"two end walls (\d+) thick and (\d+) high", caption):
        walls = added[1:]
        yield found[0], len(walls) == 2 and all(_close(_depth(s), int(found[2])) for s in walls)
    for diameter in re.findall(r"bore of diameter (\d+)", caption):
        circles = [loop for step in steps for loop in step.profile.inner if _has_size(loop, diameter, None, None)]
        yield f"bore {diameter}", bool(circles)
    if found := re.search(r"open housing (\d+) x (\d+) x (\d+)|frame (\d+) x (\d+) x (\d+)", caption):
        said = sorted(int(value) for value in found.groups() if value)
        yield found[0], said == sorted(round(side) for side in sequence.material_box().size)
    if found := re.search(r"legs (\d+) and (\d+) long, (\d+) wide and (\d+) thick", caption):
        first = steps[0]
        sides = sorted((int(found[1]), int(found[2])))
        lengths = {round(math.dist(c.start, c.end)) for c in first.profile.outer.curves if isinstance(c, Line)}
        yield (
            found[0],
            _sides(first.profile.outer) == sides and _depth(first) == int(found[3]) and int(found[4]) in lengths,
        )
