"""Real designs and procedural ones side by side, as histograms with a distance each.

    python -m tests.data.synth_statistics FOLDER [--count 2000] [--seed 0] [--difficulty full]

Every design counts once in every histogram, however many steps it has: a design with seventy steps would else be a sixth of
all steps. The distance is the total variation, half the sum of the absolute differences of two shares: 0 for equal
histograms, 1 for disjoint ones. `pooled` is the same with every step, loop or curve counting once.
"""

from __future__ import annotations

import argparse
import bisect
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from cadtrain.cad.codec import get_codec
from cadtrain.cad.formats.deepcad import read_deepcad_json
from cadtrain.cad.quantize import quantize
from cadtrain.cad.sequence import Arc, CadSequence, Circle, Curve, Extent, Line, Loop, SketchExtrude
from cadtrain.data.synth.parts import Difficulty, draw_part
from cadtrain.errors import CadtrainError

FOLDERS = ("omni-cad-test-subset", "text2cad-medium", "text2cad-random100")
BAR_CHARS = 24


@dataclass(frozen=True)
class Statistic:
    """Something to count over a design: `bins` in the order of printing, `values` a design's bins, one for each thing counted."""

    name: str
    bins: tuple[str, ...]
    values: Callable[[CadSequence], Iterable[str]]


def _binned(edges: Sequence[float], digits: int = 0) -> tuple[tuple[str, ...], Callable[[float], str]]:
    def say(value: float) -> str:
        return f"{value:.{digits}f}"

    middle = [f"{say(a)}-{say(b)}" for a, b in pairwise(edges)]
    if not digits:
        middle = [say(a) if b - a == 1 else f"{say(a)}-{say(b - 1)}" for a, b in pairwise(edges)]
    names = (f"<{say(edges[0])}", *middle, f">={say(edges[-1])}")
    return names, lambda value: names[bisect.bisect_right(edges, value)]


def _per_part(name: str, edges: Sequence[float], value: Callable[[CadSequence], float], digits: int = 0) -> Statistic:
    bins, find = _binned(edges, digits)
    return Statistic(name, bins, lambda sequence: [find(value(sequence))])


def _per_step(
    name: str, edges: Sequence[float], value: Callable[[SketchExtrude, float], float], digits: int = 0
) -> Statistic:
    bins, find = _binned(edges, digits)

    def values(sequence: CadSequence) -> list[str]:
        longest = max(sequence.material_box().size)
        return [find(value(step, longest)) for step in sequence.steps]

    return Statistic(name, bins, values)


def _sides(sequence: CadSequence) -> list[float]:
    return sorted(sequence.material_box().size, reverse=True)


def _direction(step: SketchExtrude) -> str:
    for axis, value in zip("xyz", step.plane.z_axis, strict=True):
        if abs(value) > 0.9999:
            return ("+" if value > 0 else "-") + axis
    return "oblique"


def _extent(step: SketchExtrude) -> str:
    if step.extent is Extent.ONE_SIDE:
        return "one side" if step.distance_one > 0 else "negative"
    return step.extent.value.replace("_", " ")


def _profile_side(step: SketchExtrude) -> float:
    (x0, y0), (x1, y1) = step.profile.bounding_box()
    return max(x1 - x0, y1 - y0)


def _depth(step: SketchExtrude) -> float:
    low, high = step.heights
    return high - low


def _outline(loop: Loop) -> str:
    kinds = {type(curve) for curve in loop.curves}
    if kinds == {Circle}:
        return "circle"
    if kinds == {Line}:
        num = len(loop.curves)
        return {3: "3 lines", 4: "4 lines"}.get(num, "5-8 lines" if num <= 8 else "9+ lines")
    return "arcs" if kinds == {Arc} else "lines and arcs"


def _loops(sequence: CadSequence) -> list[Loop]:
    return [loop for step in sequence.steps for loop in step.profile.loops]


def _curves(sequence: CadSequence) -> list[Curve]:
    return [curve for loop in _loops(sequence) for curve in loop.curves]


def _sweep(arc: Arc) -> str:
    degrees = abs(math.degrees(arc.sweep_rad))
    return "90" if abs(degrees - 90) < 1 else "180" if abs(degrees - 180) < 1 else "<90" if degrees < 90 else ">90"


def _text_length(sequence: CadSequence) -> int:
    return len(get_codec("compact").encode(quantize(sequence)))


_LOOP_CURVES, _loop_curves = _binned([2, 3, 4, 5, 7, 9, 13])
_LOOPS, _num_loops = _binned([2, 3, 5, 9])

STATISTICS: tuple[Statistic, ...] = (
    _per_part("steps of a part", [2, 3, 4, 5, 7, 10, 15], lambda s: len(s.steps)),
    _per_part("characters of its text", [50, 100, 150, 200, 300, 450, 700, 1200], _text_length),
    _per_part("curves of a part", [2, 3, 5, 9, 13, 19, 27, 41, 81], lambda s: len(_curves(s))),
    _per_part("sketch directions of a part", [2, 3, 4], lambda s: len({_direction(step) for step in s.steps})),
    _per_part("middle / longest side", [0.2, 0.35, 0.5, 0.65, 0.8, 0.95], lambda s: _sides(s)[1] / _sides(s)[0], 2),
    _per_part("shortest / longest side", [0.05, 0.1, 0.2, 0.3, 0.45, 0.7], lambda s: _sides(s)[2] / _sides(s)[0], 2),
    Statistic("operation", ("new", "join", "cut", "intersect"), lambda s: [step.operation.value for step in s.steps]),
    Statistic(
        "extent", ("one side", "negative", "symmetric", "two sides"), lambda s: [_extent(step) for step in s.steps]
    ),
    Statistic(
        "plane's normal", ("+x", "-x", "+y", "-y", "+z", "-z", "oblique"), lambda s: [_direction(x) for x in s.steps]
    ),
    _per_step(
        "depth / sketch's longest side",
        [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2],
        lambda s, _: _depth(s) / _profile_side(s),
        2,
    ),
    _per_step(
        "depth / part's longest side", [0.02, 0.05, 0.1, 0.2, 0.4, 0.8], lambda s, longest: _depth(s) / longest, 2
    ),
    _per_step(
        "sketch / part's longest side",
        [0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.99],
        lambda s, longest: _profile_side(s) / longest,
        2,
    ),
    Statistic("loops of a profile", _LOOPS, lambda s: [_num_loops(len(step.profile.loops)) for step in s.steps]),
    Statistic(
        "outer loop",
        ("circle", "3 lines", "4 lines", "5-8 lines", "9+ lines", "lines and arcs", "arcs"),
        lambda s: [_outline(step.profile.outer) for step in s.steps],
    ),
    Statistic(
        "inner loop",
        ("circle", "3 lines", "4 lines", "5-8 lines", "9+ lines", "lines and arcs", "arcs"),
        lambda s: [_outline(loop) for step in s.steps for loop in step.profile.inner],
    ),
    Statistic("curves of a loop", _LOOP_CURVES, lambda s: [_loop_curves(len(loop.curves)) for loop in _loops(s)]),
    Statistic("curve", ("line", "arc", "circle"), lambda s: [type(curve).__name__.lower() for curve in _curves(s)]),
    Statistic(
        "sweep of an arc (degrees)",
        ("<90", "90", ">90", "180"),
        lambda s: [_sweep(curve) for curve in _curves(s) if isinstance(curve, Arc)],
    ),
)


def shares(statistic: Statistic, sequences: Iterable[CadSequence], *, is_pooled: bool = False) -> dict[str, float]:
    """Each bin's share, every design (or, pooled, everything counted) weighing the same."""
    total: Counter[str] = Counter()
    for sequence in sequences:
        values = list(statistic.values(sequence))
        for value in values:
            total[value] += 1.0 if is_pooled else 1.0 / len(values)  # type: ignore[assignment]
    weight = sum(total.values()) or 1.0
    return {name: total[name] / weight for name in statistic.bins}


def total_variation(a: dict[str, float], b: dict[str, float]) -> float:
    """Half the sum of the absolute differences."""
    return sum(abs(a[name] - b[name]) for name in a) / 2


def real_sequences(folder: Path) -> list[CadSequence]:
    """The readable designs of `folder`'s collections of real parts, in the order of their paths."""
    found = []
    for path in sorted(path for name in FOLDERS for path in (folder / name).rglob("*.json")):
        try:
            found.append(read_deepcad_json(path))
        except CadtrainError:
            continue  # captions and other JSON lie beside the designs
    return found


def synthetic_sequences(count: int, seed: int, difficulty: Difficulty) -> list[CadSequence]:
    """The first `count` procedural designs."""
    return [draw_part(seed, index, difficulty=difficulty).sequence for index in range(count)]


def table(statistic: Statistic, real: Sequence[CadSequence], synthetic: Sequence[CadSequence]) -> tuple[str, float]:
    """The two histograms side by side as text, and their distance."""
    a, b = shares(statistic, real), shares(statistic, synthetic)
    distance = total_variation(a, b)
    pooled = total_variation(shares(statistic, real, is_pooled=True), shares(statistic, synthetic, is_pooled=True))
    lines = [f"{statistic.name}: total variation {distance:.3f} (pooled {pooled:.3f})"]
    for name in statistic.bins:
        lines.append(f"  {name:>14}  {a[name]:6.1%} {_bar(a[name])}  {b[name]:6.1%} {_bar(b[name])}".rstrip())
    return "\n".join(lines), distance


def _bar(share: float) -> str:
    return ("#" * round(share * BAR_CHARS)).ljust(BAR_CHARS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print all tables; 0 where real designs were found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder with " + ", ".join(FOLDERS))
    parser.add_argument("--count", type=int, default=2000, help="procedural parts to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--difficulty", default="full", choices=("simple", "full"))
    parser.add_argument("--brief", action="store_true", help="only the distances")
    options = parser.parse_args(arguments)
    real = real_sequences(options.folder)
    if not real:
        print(f"{options.folder}: no designs under {', '.join(FOLDERS)}", file=sys.stderr)
        return 2
    synthetic = synthetic_sequences(options.count, options.seed, options.difficulty)
    print(f"{len(real)} real designs (left), {len(synthetic)} procedural ones (right)\n")
    distances = []
    for statistic in STATISTICS:
        text, distance = table(statistic, real, synthetic)
        distances.append(distance)
        print(text.splitlines()[0] if options.brief else text + "\n")
    print(f"mean {sum(distances) / len(distances):.3f}, largest {max(distances):.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
