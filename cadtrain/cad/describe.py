"""Captions from a design's own numbers: true, if plain; for designs that come without one."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from cadtrain.cad.sequence import Arc, CadSequence, Circle, Line, Loop, Operation, SketchExtrude, Vector3

_NUMBER_WORDS = (
    "no",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)
_AXIS_NAMES = ("x", "y", "z")


@dataclass(frozen=True, slots=True)
class PartFacts:
    """What can be said of a design without building it."""

    num_steps: int
    num_joins: int
    """Steps after the first that add material."""
    num_cuts: int
    num_intersections: int
    num_lines: int
    num_arcs: int
    num_circles: int
    num_holes: int
    """Inner loops of the first profile; holes made by cuts are counted as cuts."""
    num_round_holes: int
    base_shape: str
    """The first profile: `round`, `ring-shaped`, `square`, `rectangular`, `rounded rectangular`, `slot-shaped`,
    `triangular`, `hexagonal`, ... or `free-form`."""
    size: Vector3
    """Edge lengths along x, y, z of the box around all added material."""
    base_axis: str
    """Axis of the first extrusion: `x`, `y`, `z`, or `oblique`."""
    cut_shapes: tuple[str, ...]
    """The profiles' shapes of the cuts, in order."""


def facts(sequence: CadSequence) -> PartFacts:
    """The design's facts. Raises `ValueError` for a sequence without steps."""
    size = sequence.material_box().size
    steps = sequence.steps
    curves = Counter(type(curve) for step in steps for loop in step.profile.loops for curve in loop.curves)
    adding = [s for i, s in enumerate(steps) if i == 0 or s.operation in (Operation.NEW, Operation.JOIN)]
    cuts = [s for s in steps[1:] if s.operation is Operation.CUT]
    holes = steps[0].profile.inner
    normal = steps[0].plane.z_axis
    along = [name for name, value in zip(_AXIS_NAMES, normal, strict=True) if abs(value) > 0.999]
    return PartFacts(
        num_steps=len(steps),
        num_joins=len(adding) - 1,
        num_cuts=len(cuts),
        num_intersections=sum(1 for s in steps[1:] if s.operation is Operation.INTERSECT),
        num_lines=curves[Line],
        num_arcs=curves[Arc],
        num_circles=curves[Circle],
        num_holes=len(holes),
        num_round_holes=sum(1 for loop in holes if isinstance(loop.curves[0], Circle)),
        base_shape=_profile_shape(steps[0]),
        size=size,
        base_axis=along[0] if along else "oblique",
        cut_shapes=tuple(_profile_shape(step) for step in cuts),
    )


def describe(sequence: CadSequence) -> str:
    """A caption: `Generate a CAD model of a rectangular plate ... with four round holes.` Raises `ValueError` as
    `facts` does."""
    found = facts(sequence)
    sentences = [
        f"Generate a CAD model of {_with_article(_body_name(sequence.steps[0], found.base_shape))}{_holes(found)}."
    ]
    if found.num_joins:
        extrusions = _count(found.num_joins, "further extrusion").capitalize()
        sentences.append(f"{extrusions} {_verb(found.num_joins, 'adds', 'add')} material.")
    if found.num_cuts:
        sentences.append(f"{_cuts(found)} {_verb(found.num_cuts, 'is', 'are')} taken away.")
    if found.num_intersections:
        times = "once" if found.num_intersections == 1 else f"{_word(found.num_intersections)} times"
        sentences.append(f"The body is {times} reduced to what it shares with another extrusion.")
    if proportions := _proportions(found.size):
        sentences.append(proportions)
    return " ".join(sentences)


# -------------------------------------------------------------------------------------------- shapes


def _profile_shape(step: SketchExtrude) -> str:
    outer, inner = step.profile.outer, step.profile.inner
    shape = _loop_shape(outer)
    if shape == "round" and len(inner) == 1 and isinstance(inner[0].curves[0], Circle):
        circle = outer.curves[0]
        if isinstance(circle, Circle) and math.dist(circle.center, inner[0].curves[0].center) < 1e-3 * circle.radius:
            return "ring-shaped"
    return shape


def _loop_shape(loop: Loop) -> str:
    curves = loop.curves
    if isinstance(curves[0], Circle):
        return "round"
    lines = [curve for curve in curves if isinstance(curve, Line)]
    arcs = [curve for curve in curves if isinstance(curve, Arc)]
    (x0, y0), (x1, y1) = loop.bounding_box()
    fills_box = abs(loop.signed_area) / ((x1 - x0) * (y1 - y0))
    if not arcs:
        return _polygon_shape(lines)
    if not lines and _is_one_circle(arcs):
        return "round"
    if len(lines) == 2 and len(arcs) == 2 and all(abs(abs(arc.sweep_rad) - math.pi) < 0.02 for arc in arcs):
        return "slot-shaped"
    quarter = [arc for arc in arcs if abs(abs(arc.sweep_rad) - math.pi / 2) < 0.02]
    if len(lines) == len(arcs) == len(quarter) == 4 and _turns_one_way(arcs) and fills_box > 0.75:
        return "rounded rectangular"
    return "free-form"


def _is_one_circle(arcs: list[Arc]) -> bool:
    first = arcs[0]
    return all(
        math.dist(arc.center, first.center) < 1e-3 * first.radius
        and abs(arc.radius - first.radius) < 1e-3 * first.radius
        for arc in arcs
    )


def _turns_one_way(arcs: list[Arc]) -> bool:
    return len({arc.sweep_rad > 0 for arc in arcs}) == 1


def _polygon_shape(lines: list[Line]) -> str:
    sides = [line for line in lines if line.start != line.end]
    vectors = [(line.end[0] - line.start[0], line.end[1] - line.start[1]) for line in sides]
    lengths = [math.hypot(*vector) for vector in vectors]
    pairs = zip(vectors, vectors[1:] + vectors[:1], strict=True)
    cosines = [(a[0] * b[0] + a[1] * b[1]) / math.hypot(*a) / math.hypot(*b) for a, b in pairs]
    if any(cosine > 0.9999 for cosine in cosines):
        return "polygonal"  # a corner that is none: counting sides would mislead
    are_equal = max(lengths) - min(lengths) < 0.01 * max(lengths)
    if len(sides) == 4:
        if all(abs(cosine) < 0.01 for cosine in cosines):
            return "square" if are_equal else "rectangular"
        return "four-sided"
    names = {3: "triangular", 5: "pentagonal", 6: "hexagonal", 8: "octagonal"}
    return names.get(len(sides), "polygonal")


# -------------------------------------------------------------------------------------------- words


def _body_name(step: SketchExtrude, shape: str) -> str:
    low, high = step.heights
    (x0, y0), (x1, y1) = step.profile.bounding_box()
    thickness = (high - low) / max(x1 - x0, y1 - y0)
    if shape == "round":
        return "flat disc" if thickness < 0.25 else "long cylinder" if thickness > 4 else "cylinder"
    if shape == "ring-shaped":
        return "flat ring" if thickness < 0.25 else "tube" if thickness > 1 else "ring"
    if shape in ("square", "rectangular") and not step.profile.inner and 0.25 <= thickness <= 4:
        return "block" if shape == "rectangular" else "square block"
    kind = "plate" if thickness < 0.25 else "bar" if thickness > 4 else "body"
    return f"{shape} {kind}"


def _holes(found: PartFacts) -> str:
    num = found.num_holes - (1 if found.base_shape == "ring-shaped" else 0)
    num_round = found.num_round_holes - (1 if found.base_shape == "ring-shaped" else 0)
    if not num:
        return ""
    if num_round == num:
        return f" with {_count(num, 'round hole')}"
    if not num_round:
        return f" with {_count(num, 'opening')}"
    return f" with {_count(num_round, 'round hole')} and {_count(num - num_round, 'other opening')}"


def _cuts(found: PartFacts) -> str:
    shapes = set(found.cut_shapes)
    word = f"{found.cut_shapes[0]} cut" if len(shapes) == 1 and found.cut_shapes[0] != "free-form" else "cut"
    return _count(found.num_cuts, word).capitalize()


def _proportions(size: Vector3) -> str:
    length, width, height = sorted(size, reverse=True)
    if not height > 0:
        return ""
    first, second = length / width, width / height
    if first < 1.1 and second < 1.1:
        return "It is about as long as wide and high."
    middle = "about as long as wide" if first < 1.1 else f"{_times(first)} as long as wide"
    last = "about as high as wide" if second < 1.1 else f"{_times(second)} as wide as high"
    return f"Overall it is {middle} and {last}."


def _times(ratio: float) -> str:
    if ratio < 1.75:
        return f"about {ratio:.1f} times"
    whole = round(ratio)
    return "about twice" if whole == 2 else f"about {_word(whole)} times" if whole <= 12 else "more than twelve times"


def _word(number: int) -> str:
    return _NUMBER_WORDS[number] if number < len(_NUMBER_WORDS) else str(number)


def _count(number: int, noun: str) -> str:
    return f"{_word(number)} {noun}{'' if number == 1 else 's'}"


def _verb(number: int, one: str, many: str) -> str:
    return one if number == 1 else many


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
