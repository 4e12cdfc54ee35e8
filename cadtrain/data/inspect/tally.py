"""Counting over many designs: what a worker gathers from its share, added up by the parent.

A tally holds counters, and for every design a few numbers in plain arrays: about 50 bytes each, 25 MB for 450,000 designs.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b

from cadtrain.cad.grid import PlaneAngles, QuantizedArc, QuantizedCircle, QuantizedSequence, QuantizedStep
from cadtrain.data.inspect.values import Spread

_NORMALS = ("+z", "-y", "+x", "-z", "+y", "-x")
"""Of the axis frames, four to each."""
_EXAMPLES = 3
_MOST_GROUPS = 200
"""Kinds of faults told apart; a folder of other people's files may hold any number."""

Number = array


def hash64(text: str) -> int:
    """64 bits of a text's hash; two of a million texts are the same by chance once in 40 million folders."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def printable(text: str) -> str:
    """The text without what no terminal or page should get: control characters, and bytes of file names that are no text."""
    return (
        "".join(c if (c >= " " and c != "\x7f") or c in "\t\n" else "\ufffd" for c in text)
        .encode("utf-8", "replace")
        .decode()
    )


@dataclass(frozen=True, slots=True)
class Fault:
    """Inputs that fail in one way: `kind`, the place in the document (`$.entities.*.operation`, or empty), how many, and the
    first of them as (file or id, reason)."""

    kind: str
    place: str
    count: int
    examples: tuple[tuple[str, str], ...]


@dataclass(slots=True)
class FaultTally:
    """Faults by kind and place."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: dict[tuple[str, str], list[tuple[str, str]]] = field(default_factory=dict)

    def add(self, kind: str, place: str, name: str, reason: str) -> None:
        """Count one."""
        self._add((kind, place), 1, [(printable(name), printable(reason))])

    def merge(self, other: FaultTally) -> None:
        """Add what another one counted after this one."""
        for key, count in other.counts.items():
            self._add(key, count, other.examples[key])

    def _add(self, key: tuple[str, str], count: int, examples: Iterable[tuple[str, str]]) -> None:
        if key not in self.counts and len(self.counts) >= _MOST_GROUPS:
            key = (key[0], "elsewhere")
        self.counts[key] += count
        kept = self.examples.setdefault(key, [])
        kept.extend(list(examples)[: _EXAMPLES - len(kept)])

    def faults(self) -> tuple[Fault, ...]:
        """The most frequent first."""
        return tuple(
            Fault(kind, place, count, tuple(self.examples[kind, place]))
            for (kind, place), count in self.counts.most_common()
        )

    @property
    def total(self) -> int:
        """All faults."""
        return sum(self.counts.values())


@dataclass(frozen=True, slots=True)
class DesignStats:
    """What the designs are made of: counts over all of them, and spreads over designs.

    A plane is called by its normal's axis; `oblique` is any rotation off the axes. `characters` is the length of the text.
    """

    operations: dict[str, int]
    extents: dict[str, int]
    curves: dict[str, int]
    planes: dict[str, int]
    steps: Spread | None
    curves_per_part: Spread | None
    characters: Spread | None


@dataclass(slots=True)
class DesignTally:
    """Designs counted; entry i of every array belongs to the same design, `positions` says which one of the inputs it is."""

    operations: Counter[str] = field(default_factory=Counter)
    extents: Counter[str] = field(default_factory=Counter)
    curves: Counter[str] = field(default_factory=Counter)
    planes: Counter[str] = field(default_factory=Counter)
    positions: Number = field(default_factory=lambda: array("q"))
    steps: Number = field(default_factory=lambda: array("i"))
    num_curves: Number = field(default_factory=lambda: array("i"))
    characters: Number = field(default_factory=lambda: array("i"))
    hashes: Number = field(default_factory=lambda: array("Q"))
    tokens: Number = field(default_factory=lambda: array("i"))
    """Of each design's text in the codec asked for; empty without a tokenizer, -1 where that codec cannot write it."""
    sizes: Number = field(default_factory=lambda: array("d"))
    """Longest side in the source's unit; empty where it is not known."""

    def __len__(self) -> int:
        return len(self.positions)

    def add(self, position: int, sequence: QuantizedSequence, text: str) -> None:
        """Count one design; `text` is its text as stored."""
        before = self.curves.total()
        for step in sequence.steps:
            self._add_step(step)
        self.positions.append(position)
        self.steps.append(len(sequence.steps))
        self.num_curves.append(self.curves.total() - before)
        self.characters.append(len(text))
        self.hashes.append(hash64(text))

    def _add_step(self, step: QuantizedStep) -> None:
        self.operations[step.operation.value] += 1
        self.extents[step.extent.value] += 1
        self.planes["oblique" if isinstance(step.plane, PlaneAngles) else _NORMALS[step.plane // 4]] += 1
        for loop in step.loops:
            for curve in loop.curves:
                kind = (
                    "arc"
                    if isinstance(curve, QuantizedArc)
                    else "circle"
                    if isinstance(curve, QuantizedCircle)
                    else "line"
                )
                self.curves[kind] += 1

    def merge(self, other: DesignTally) -> None:
        """Add what another one counted after this one."""
        for name in ("operations", "extents", "curves", "planes"):
            getattr(self, name).update(getattr(other, name))
        for name in ("positions", "steps", "num_curves", "characters", "hashes", "tokens", "sizes"):
            getattr(self, name).extend(getattr(other, name))

    def stats(self) -> DesignStats:
        """The counts as values, the most frequent first."""
        operations, extents, curves, planes = (
            dict(counter.most_common()) for counter in (self.operations, self.extents, self.curves, self.planes)
        )
        return DesignStats(
            operations, extents, curves, planes,
            Spread.of(self.steps), Spread.of(self.num_curves), Spread.of(self.characters),
        )  # fmt: skip
