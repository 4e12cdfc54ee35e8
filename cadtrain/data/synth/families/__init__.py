"""The families of procedural parts; each draws one part and says in words what it drew.

A family takes dice and an empty drawing, adds its steps, and returns the `Words` of its captions, with sizes in the drawing's
units. Its cuts remove only material that is there and its joins add only material that is not, so a part's volume is the signed
sum of its steps' volumes: the tests check the solids against that.
"""

from __future__ import annotations

from collections.abc import Callable

from cadtrain.data.synth.captions import Words
from cadtrain.data.synth.drawing import Dice, Drawing
from cadtrain.data.synth.families.composition import composition
from cadtrain.data.synth.families.frames import grate, table
from cadtrain.data.synth.families.hollow import bar_with_holes, bracket, housing
from cadtrain.data.synth.families.prism import link, prism
from cadtrain.data.synth.families.turned import flange, shaft, stack

Family = Callable[[Dice, Drawing], Words]

FAMILIES: dict[str, tuple[Family, float]] = {
    "prism": (prism, 0.45),
    "link": (link, 0.02),
    "stack": (stack, 0.11),
    "flange": (flange, 0.02),
    "shaft": (shaft, 0.03),
    "bracket": (bracket, 0.024),
    "bar_with_holes": (bar_with_holes, 0.022),
    "housing": (housing, 0.032),
    "table": (table, 0.03),
    "grate": (grate, 0.03),
    "composition": (composition, 0.235),
}
"""Name to family and its share of all parts; the order is part of what a seed means."""
