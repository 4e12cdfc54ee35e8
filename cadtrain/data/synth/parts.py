"""One procedural part as a pure function of (seed, index, attempt)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from cadtrain.cad.sequence import CadSequence
from cadtrain.data.synth.captions import Words, long_caption, short_caption
from cadtrain.data.synth.drawing import LONGEST_SIDE, Dice, Drawing, tilted
from cadtrain.data.synth.families import FAMILIES

GENERATOR_VERSION = 2
"""Raised whenever the same seed draws other parts; made datasets are kept apart by it."""

Captions = Literal["short", "long", "both"]
Difficulty = Literal["simple", "full"]

SIMPLE_MOST_STEPS = 5
SIMPLE_MOST_CURVES = 24
_MOST_TRIES = 64
_SHARE_OBLIQUE = 0.01


@dataclass(frozen=True, slots=True)
class DrawnPart:
    """A part as it was drawn: sizes in whole units, the longest side `LONGEST_SIDE`."""

    sequence: CadSequence
    short: str
    long: str
    caption: str
    """The one of the two that a dataset stores."""
    family: str


def draw_part(
    seed: int, index: int, attempt: int = 0, *, captions: Captions = "both", difficulty: Difficulty = "full"
) -> DrawnPart:
    """The part that (seed, index, attempt) means, whatever was drawn before, in whatever process.

    `index` goes up to 2^64 - 1. `attempt` counts the redraws after parts whose solid the kernel refuses. `captions` chooses the
    stored caption and nothing else: with "both", half of the parts have a short one. `difficulty` "simple" leaves out parts of more
    than `SIMPLE_MOST_STEPS` steps or `SIMPLE_MOST_CURVES` curves.
    """
    # Philox is counter-based: index and attempt select disjoint parts of one stream, so nothing has to be skipped over.
    key = np.array([seed, GENERATOR_VERSION], dtype=np.uint64)
    counter = np.array([0, 0, attempt, index], dtype=np.uint64)
    dice = Dice(np.random.Generator(np.random.Philox(key=key, counter=counter)))
    is_tossed = dice.chance(0.5)
    is_short = is_tossed if captions == "both" else captions == "short"
    for _ in range(_MOST_TRIES):
        family, words, sequence = _draw(dice)
        if difficulty == "full" or _is_simple(sequence):
            break
    short, long = short_caption(dice, words), long_caption(dice, words, sequence)
    if len(sequence.steps) == 1 and difficulty == "full" and dice.chance(_SHARE_OBLIQUE):
        # Turned parts are scaled to fit the grid's box again, so the sizes of the long caption would no longer hold.
        sequence, sentence = tilted(dice, sequence)
        long = f"{short} {sentence}"
    return DrawnPart(sequence, short, long, short if is_short else long, family)


def _draw(dice: Dice) -> tuple[str, Words, CadSequence]:
    """A family's part; drawn again where it did not come out with the longest side that it should have."""
    while True:
        family = dice.weighted({name: share for name, (_, share) in FAMILIES.items()})
        drawing = Drawing(dice)
        words = FAMILIES[family][0](dice, drawing)
        sequence = drawing.sequence()
        if abs(max(sequence.material_box().size) - LONGEST_SIDE) < 1e-6:
            return family, words, sequence


def _is_simple(sequence: CadSequence) -> bool:
    curves = sum(len(loop.curves) for step in sequence.steps for loop in step.profile.loops)
    return len(sequence.steps) <= SIMPLE_MOST_STEPS and curves <= SIMPLE_MOST_CURVES
