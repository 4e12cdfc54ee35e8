"""Drawing a part step by step along axes of its own, placed in the world from the first step on.

Parts are drawn in whole units with the longest side `LONGEST_SIDE`; heights and the positions of planes are even numbers.
The 8-bit grid gives a centred part 120 steps along its longest side, so every height and every plane's position of a drawing
falls on a grid value exactly: faces that touch in the drawing touch after quantisation, and the numbers in a caption are the
numbers that the sequence holds.

How often a plane, a direction or an extent is chosen follows the real parts (`tests/data/synth_statistics.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from cadtrain.cad.sequence import (
    CadSequence,
    Extent,
    Loop,
    Operation,
    Point2,
    Profile,
    SketchExtrude,
    SketchPlane,
    Vector3,
)
from cadtrain.data.synth.shapes import mapped

LONGEST_SIDE = 120

T = TypeVar("T")

_AXES = "xyz"
_IN_PLANE = {"x": ("y", "z"), "y": ("x", "z"), "z": ("x", "y")}
_FIRST_NORMAL = {"z": 0.57, "y": 0.33, "x": 0.10}
_FACE_NAMES = {
    ("z", 1): "top",
    ("z", -1): "bottom",
    ("y", -1): "front",
    ("y", 1): "back",
    ("x", 1): "right",
    ("x", -1): "left",
}
_FRAMES: dict[tuple[str, int], tuple[Vector3, Vector3, Vector3]] = {
    # The frames in which people sketch, by normal; the first of each axis is the usual one.
    ("z", 1): ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    ("y", -1): ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.0, -1.0, 0.0)),
    ("x", 1): ((0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0)),
    ("z", -1): ((1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, -1.0)),
    ("y", 1): ((-1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.0, 1.0, 0.0)),
    ("x", -1): ((0.0, -1.0, 0.0), (0.0, 0.0, 1.0), (-1.0, 0.0, 0.0)),
}
_USUAL_SIGN = {"x": 1, "y": -1, "z": 1}


class Dice:
    """Random choices in the words that the families use; bounds are inclusive."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def whole(self, low: int, high: int) -> int:
        """A whole number in [low, high]."""
        return int(self._rng.integers(low, high + 1))

    def even(self, low: float, high: float) -> int:
        """An even number in [low, high]; the lowest one above `low` where the interval holds none."""
        first, last = math.ceil(low / 2), math.floor(high / 2)
        return 2 * self.whole(first, max(first, last))

    def between(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        return low + (high - low) * float(self._rng.random())

    def log_even(self, low: float, high: float) -> int:
        """An even number in [low, high], small ones as likely as large ones by ratio; `low` where the interval holds none."""
        first, last = 2 * math.ceil(low / 2), 2 * math.floor(high / 2)
        if last <= first:
            return first
        value = 2 * round(math.exp(self.between(math.log(first), math.log(last))) / 2)
        return min(last, max(first, value))

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return float(self._rng.random()) < probability

    def one_of(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[int(self._rng.integers(len(items)))]

    def weighted(self, weights: dict[T, float]) -> T:
        """One of the keys, by weight."""
        names = list(weights)
        mark = float(self._rng.random()) * sum(weights.values())
        for name in names:
            mark -= weights[name]
            if mark < 0:
                return name
        return names[-1]

    def binned(self, bins: dict[tuple[float, float], float]) -> float:
        """A number from a histogram: a bin by weight, then any number in it."""
        low, high = self.weighted(bins)
        return self.between(low, high)


class Drawing:
    """A part being drawn; the first step settles how the drawing's axes lie in the world."""

    def __init__(self, dice: Dice) -> None:
        self._dice = dice
        self._steps: list[SketchExtrude] = []
        self._turn: dict[str, tuple[str, int]] = {}

    def extrude(
        self,
        axis: str,
        start: int,
        end: int,
        profiles: Sequence[Profile | Loop],
        operation: Operation | None = None,
    ) -> None:
        """Add a step for each profile, all made the same way: material (or a cut) from `start` to `end` along
        `axis`, whichever is the lower.

        A profile lies in the drawing's other two axes, in alphabetical order. Where the sketch plane is put, which way its
        normal points and how the extent is spelt is chosen here. `operation` is new for the first step and join or new for
        others unless it is given.
        """
        dice = self._dice
        if not self._steps:
            self._place(axis)
        if operation is None:
            is_new = not self._steps or dice.chance(0.13)
            operation = Operation.NEW if is_new else Operation.JOIN
        name, toward = self._turn[axis]
        sign = _USUAL_SIGN[name] * (-1 if dice.chance(0.035) else 1)
        at, extent, one, two = self._spelt(
            min(start, end), max(start, end), is_along=toward * sign > 0, operation=operation
        )
        for profile in profiles:
            solid = profile if isinstance(profile, Profile) else Profile(profile)
            step_operation = operation
            if operation is Operation.NEW and self._steps:
                step_operation = Operation.NEW if profile is profiles[0] else Operation.JOIN
            plane = self._plane(axis, at, (name, sign))
            self._steps.append(
                SketchExtrude(
                    plane, self._placed(solid, axis, (name, sign)), step_operation, extent, float(one), float(two)
                )
            )

    def cut(self, axis: str, start: int, end: int, profiles: Sequence[Profile | Loop]) -> None:
        """Remove material from `start` to `end` along `axis`, one step a profile."""
        self.extrude(axis, start, end, profiles, Operation.CUT)

    def face(self, axis: str, sign: int) -> str:
        """What the side of the part towards +axis or -axis is called in the world: top, bottom, front, back, left, right."""
        name, toward = self._turn[axis]
        return _FACE_NAMES[name, toward * sign]

    @property
    def num_steps(self) -> int:
        """Steps so far."""
        return len(self._steps)

    def sequence(self) -> CadSequence:
        """The steps drawn so far."""
        return CadSequence(tuple(self._steps))

    def _place(self, axis: str) -> None:
        world = self._dice.weighted(_FIRST_NORMAL)
        normal_sign = _USUAL_SIGN[world]
        x_axis, y_axis, _ = _FRAMES[world, normal_sign]
        u, v = (_named(vector) for vector in (x_axis, y_axis))
        if self._dice.chance(0.5):
            u, v = v, (u[0], -u[1])
        first, second = _IN_PLANE[axis]
        # (y, z) about x and (x, y) about z are right-handed, (x, z) about y is left-handed.
        self._turn = {axis: (world, normal_sign if axis != "y" else -normal_sign), first: u, second: v}

    def _spelt(self, low: int, high: int, *, is_along: bool, operation: Operation) -> tuple[int, Extent, int, int]:
        """Where the sketch plane stands, the extent and its distances; `is_along` says that the normal points to +axis."""
        dice, middle, depth = self._dice, (low + high) // 2, high - low
        if dice.chance(0.055 if operation is not Operation.CUT else 0.03):
            return middle, Extent.SYMMETRIC, depth // 2, 0
        if depth >= 4 and dice.chance(0.012):
            above = dice.even(2, depth - 2)
            return (
                (low if is_along else high) + (depth - above) * (1 if is_along else -1),
                Extent.TWO_SIDES,
                above,
                depth - above,
            )
        is_negative = dice.chance(0.84 if operation is Operation.CUT else 0.11)
        starts_low = is_along != is_negative
        return (low if starts_low else high), Extent.ONE_SIDE, (-depth if is_negative else depth), 0

    def _plane(self, axis: str, at: int, normal: tuple[str, int]) -> SketchPlane:
        world, toward = self._turn[axis]
        origin = tuple(float(at * toward) if name == world else 0.0 for name in _AXES)
        return SketchPlane((origin[0], origin[1], origin[2]), *_FRAMES[normal])

    def _placed(self, profile: Profile, axis: str, normal: tuple[str, int]) -> Profile:
        """The profile in the sketch frame of the plane."""
        x_axis, y_axis, _ = _FRAMES[normal]
        first, second = _IN_PLANE[axis]

        def move(point: Point2) -> Point2:
            world = {
                self._turn[first][0]: point[0] * self._turn[first][1],
                self._turn[second][0]: point[1] * self._turn[second][1],
            }
            vector = [world.get(name, 0.0) for name in _AXES]
            return _dot(vector, x_axis), _dot(vector, y_axis)

        return Profile(mapped(profile.outer, move), tuple(mapped(loop, move) for loop in profile.inner))


def tilted(dice: Dice, sequence: CadSequence) -> tuple[CadSequence, str]:
    """The design turned about one of the world's axes to an oblique plane, with a sentence that says so."""
    normal = sequence.steps[0].plane.z_axis
    about = dice.one_of([k for k in range(3) if abs(normal[k]) < 0.5])
    # A multiple of the grid's 2 pi / 256, so that the plane keeps its angle.
    turn = dice.one_of((8, 16, 24, 32, 40, 48))
    c, s = math.cos(turn * math.pi / 128), math.sin(turn * math.pi / 128)
    a, b = (about + 1) % 3, (about + 2) % 3

    def move(vector: Vector3) -> Vector3:
        out = list(vector)
        out[a], out[b] = c * vector[a] - s * vector[b], s * vector[a] + c * vector[b]
        return out[0], out[1], out[2]

    steps = [
        replace(step, plane=SketchPlane(*(move(v) for v in (p.origin, p.x_axis, p.y_axis, p.z_axis))))
        for step in sequence.steps
        for p in (step.plane,)
    ]
    degrees = turn * 360 / 256
    return CadSequence(
        tuple(steps)
    ), f"Its sketch plane is oblique, turned by {degrees:g} degrees about the {_AXES[about]} axis."


def _dot(a: Sequence[float], b: Vector3) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + 0.0


def _named(vector: Vector3) -> tuple[str, int]:
    place = max(range(3), key=lambda k: abs(vector[k]))
    return _AXES[place], int(vector[place])
