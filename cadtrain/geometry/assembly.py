"""The order in which a design's extrusions are combined, apart from the kernel that combines them.

Extrusions of one kind in a row are handed over together, and only where their boxes meet: a boolean operation of two
shapes far from each other can take seconds to find that there is nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

Combine = Callable[[str, Any, list[Any], str], Any]
"""`(kind, shape, tools, place)` to the shape added to, cut or intersected by the tools; None where nothing is left of
it."""

_REACH = 1e-6
"""Boxes closer than this meet; ten times what the kernel takes for touching."""


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A shape and a box that holds it, all in the kernel's unit."""

    shape: Any
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    def meets(self, other: Piece) -> bool:
        """Whether the two boxes touch or overlap."""
        return bool((self.low <= other.high + _REACH).all() and (other.low <= self.high + _REACH).all())


def assemble(tools: list[Piece], kinds: list[str], combine: Combine, *, singly: bool) -> list[Piece]:
    """The pieces that the body consists of after all steps, empty if nothing is left.

    `kinds` are `add`, `cut` or `intersect`; the first tool begins the body whatever its kind. `singly` hands over one
    tool at a time, for results that are not sound otherwise. Raises what `combine` raises.
    """
    body = [tools[0]]
    numbered = list(enumerate(zip(tools, kinds, strict=True), start=1))[1:]
    for kind, run in groupby(numbered, key=lambda item: item[1][1]):
        items = [(number, tool) for number, (tool, _) in run]
        # Tools of an intersection must not be united first, so those always go one by one.
        for batch in [[item] for item in items] if singly or kind == "intersect" else [items]:
            place = f"step {batch[0][0]}" if len(batch) == 1 else f"steps {batch[0][0]}-{batch[-1][0]}"
            shapes = [tool for _, tool in batch]
            body = (
                _added(body, shapes, combine, place) if kind == "add" else _reduced(kind, body, shapes, combine, place)
            )
    return body


def _added(body: list[Piece], tools: list[Piece], combine: Combine, place: str) -> list[Piece]:
    """Body and tools, those fused whose boxes meet."""
    groups: list[list[Piece]] = []
    for piece in [*body, *tools]:
        met = [group for group in groups if any(piece.meets(other) for other in group)]
        groups = [group for group in groups if not any(group is other for other in met)]
        groups.append([*(member for group in met for member in group), piece])
    fused = []
    for first, *others in groups:
        shape = combine("add", first.shape, [piece.shape for piece in others], place) if others else first.shape
        low = np.min([piece.low for piece in (first, *others)], axis=0)
        high = np.max([piece.high for piece in (first, *others)], axis=0)
        fused.append(Piece(shape, low, high))
    return [piece for piece in fused if piece.shape is not None]


def _reduced(kind: str, body: list[Piece], tools: list[Piece], combine: Combine, place: str) -> list[Piece]:
    """What a cut or an intersection leaves of each piece of the body."""
    left = []
    for piece in body:
        meeting = [tool.shape for tool in tools if tool.meets(piece)]
        if meeting:
            left.append(Piece(combine(kind, piece.shape, meeting, place), piece.low, piece.high))
        elif kind == "cut":
            left.append(piece)
    return [piece for piece in left if piece.shape is not None]
