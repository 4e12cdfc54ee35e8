"""What a deep stack of equal decoder layers holds, with any number of them recomputed, from traces of a few layers.

Legend: L layers, the first k of which are recomputed, the others kept.

A trace tells what is held at the worst moment of each phase of a pass: ahead of the layers, in each layer forward, in
the head, in each layer backward, behind the layers. While a layer is at work everything that the layers below it keep is
held in full, whatever else there is. So another layer put into the stack adds what such a layer keeps to every phase of
the layers above it and of the head, and nothing to the others. With the phases of a short stack the peak of a deep one
is the largest of sums, which is exact where the layers are equal; it is not a line, as another phase may be the worst.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

Parts = Mapping[str, int]
"""Bytes by part of the model."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes beside weights, gradients and optimizer states."""

    saved: dict[str, int]
    """What the backward pass needs, at the end of the forward pass, by part of the model."""
    peak: dict[str, int]
    """What is held at the worst moment of both passes, by part; `backward` is what the backward pass itself makes."""

    @property
    def saved_bytes(self) -> int:
        """All of `saved`."""
        return sum(self.saved.values())

    @property
    def peak_bytes(self) -> int:
        """All of `peak`."""
        return sum(self.peak.values())


@dataclass(frozen=True, slots=True)
class StackTrace:
    """One trace of a stack."""

    saved: Parts
    """Held at the end of the forward pass."""
    boundaries: tuple[Parts, ...]
    """Held ahead of each layer in the forward pass."""
    before: Parts
    """The worst moment before the layers."""
    forward: tuple[Parts, ...]
    """The worst moment in each layer's forward pass."""
    head: Parts
    """The worst moment between the last layer's forward and its backward pass."""
    backward: tuple[Parts, ...]
    """The worst moment in each layer's backward pass; none where no gradient comes to the layers."""
    after: Parts
    """The worst moment behind the layers' backward pass."""

    def kept_by(self, layer: int) -> Counter[str]:
        """What `layer`, not the last, keeps for the backward pass: what is held more behind it than ahead of it."""
        found = Counter(self.boundaries[layer + 1])
        found.subtract(self.boundaries[layer])
        return found

    def moments(self) -> list[tuple[int, Parts]]:
        """Each phase's worst moment, and the number of layers below it."""
        layers = len(self.forward)
        inside = [*enumerate(self.forward), *enumerate(self.backward)]
        return [(0, self.before), *inside, (layers, self.head), (0, self.after)]

    def footprint(self) -> Footprint:
        """Of the traced stack itself."""
        worst = max((parts for _, parts in self.moments()), key=_total)
        return Footprint(_positive(self.saved), _positive(worst))


@dataclass(frozen=True, slots=True)
class Insertion:
    """`count` more layers (or fewer, below 0) above the layer `above` of a trace, each like that one."""

    above: int
    count: int


def deeper(trace: StackTrace, insertions: tuple[Insertion, ...]) -> Footprint:
    """The footprint of `trace`'s stack with more layers in it."""
    kept = {insertion: trace.kept_by(insertion.above) for insertion in insertions}

    def grown(layers_below: int, parts: Parts) -> Counter[str]:
        found = Counter(parts)
        for insertion, more in kept.items():
            # The topmost of the new layers passes through the same phases as the one that it is like.
            if layers_below >= insertion.above and (layers_below > insertion.above or insertion.count > 0):
                for part, count in more.items():
                    found[part] += insertion.count * count
        return found

    worst = max((grown(below, parts) for below, parts in trace.moments()), key=_total)
    return Footprint(_positive(grown(len(trace.forward), trace.saved)), _positive(worst))


def _total(parts: Parts) -> int:
    return sum(parts.values())


def _positive(parts: Parts) -> dict[str, int]:
    return {part: count for part, count in parts.items() if count > 0}


class RecomputeDial:
    """The footprints of one pack with the first 0 to L of a stack's layers recomputed.

    `trace(layers, recomputed)` traces a stack of the first `layers` with the first `recomputed` of them recomputed; it is
    called when it is needed, three times at most where the layers are equal.
    """

    def __init__(self, num_layers: int, trace: Callable[[int, int], StackTrace], *, are_equal: bool = True) -> None:
        self.num_layers = num_layers
        self._trace = trace
        self._is_short = num_layers <= 4 or not are_equal
        self._found: dict[int, Footprint] = {}

    def footprint(self, recomputed: int) -> Footprint:
        """With the first `recomputed` layers recomputed."""
        if recomputed not in self._found:
            self._found[recomputed] = self._make(recomputed)
        return self._found[recomputed]

    def fewest(self, fits: Callable[[int], bool]) -> int:
        """The smallest number of recomputed layers whose peak in bytes `fits`; else the smallest with the lowest peak."""
        best = 0
        for recomputed in range(self.num_layers + 1):
            if fits(peak := self.footprint(recomputed).peak_bytes):
                return recomputed
            if peak < self.footprint(best).peak_bytes:
                best = recomputed
        return best

    def scaled(self, factor: float) -> RecomputeDial:
        """As far as memory follows the number of tokens: for packs of `factor` times as many."""
        return _ScaledDial(self, factor)

    def _make(self, recomputed: int) -> Footprint:
        """From a trace of three kept layers, of three recomputed ones, or of two of each."""
        layers = self.num_layers
        if self._is_short:
            return self._trace(layers, recomputed).footprint()
        if recomputed == 0:
            return deeper(self._kept, (Insertion(1, layers - 3),))
        if recomputed == layers:
            return deeper(self._recomputed, (Insertion(1, layers - 3),))
        return deeper(self._mixed, (Insertion(1, recomputed - 2), Insertion(2, layers - recomputed - 2)))

    @cached_property
    def _kept(self) -> StackTrace:
        return self._trace(3, 0)

    @cached_property
    def _mixed(self) -> StackTrace:
        return self._trace(4, 2)

    @cached_property
    def _recomputed(self) -> StackTrace:
        return self._trace(3, 3)


class _ScaledDial(RecomputeDial):
    def __init__(self, dial: RecomputeDial, factor: float) -> None:
        super().__init__(dial.num_layers, dial._trace)
        self._dial, self._factor = dial, factor

    def _make(self, recomputed: int) -> Footprint:
        found = self._dial.footprint(recomputed)
        return Footprint(self._times(found.saved), self._times(found.peak))

    def _times(self, parts: dict[str, int]) -> dict[str, int]:
        return {part: round(count * self._factor) for part, count in parts.items()}
