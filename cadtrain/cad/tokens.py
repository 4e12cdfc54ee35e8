"""The `tokens` codec: a quantised design as a row of words, each of which becomes one token of the vocabulary.

    <cad:Sa><cad:68><cad:92><cad:122><cad:120><cad:L><cad:223><cad:128>…<cad:ENO><cad:140><cad:.>

    sequence  = step { step } <cad:.>
    step      = plane x y z size  loop { <cad:;> loop }  extrude
    plane     = <cad:Sa> … <cad:Sx>                    a sketch on the axis frame of that place in `AXIS_FRAMES`
              | <cad:S*> theta phi gamma               a sketch on any other plane, in steps of 2 pi / 256
    loop      = curve { curve }                        the outer loop first
    curve     = <cad:L> x y  |  <cad:A> x y sweep  |  <cad:B> x y sweep  |  <cad:C> x y radius
    extrude   = <cad:ENO> distance …                   E, operation (N J C I), extent (O one side, S symmetric)
              | <cad:ENT> distance distance            the same with two sides
    number    = <cad:0> … <cad:255>

Letters and numbers mean what they mean in `grammar`; a plane, and an operation with its extent, are one word each. There
is exactly one row of words for a design and `decode` accepts that one only. The words are no text that a tokenizer
knows: `vocabulary` lists them for it. A caption cannot spell one (`without_words`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import product

from cadtrain.cad.grid import (
    AXIS_FRAMES,
    CENTER,
    LEVELS,
    PlaneAngles,
    QuantizedArc,
    QuantizedCircle,
    QuantizedCurve,
    QuantizedLine,
    QuantizedLoop,
    QuantizedSequence,
    QuantizedStep,
)
from cadtrain.cad.sequence import Extent, Operation
from cadtrain.errors import GrammarError

TOKENS_VERSION = 1

_OPEN, _CLOSE = "<cad:", ">"
_FRAMES = tuple(f"S{letter}" for letter in "abcdefghijklmnopqrstuvwx")
_ANGLES, _NEXT_LOOP, _END = "S*", ";", "."
_CURVES = ("L", "A", "B", "C")
_OPERATIONS = {"N": Operation.NEW, "J": Operation.JOIN, "C": Operation.CUT, "I": Operation.INTERSECT}
_EXTENTS = {"O": Extent.ONE_SIDE, "S": Extent.SYMMETRIC, "T": Extent.TWO_SIDES}
_EXTRUDES = {f"E{o}{e}": (_OPERATIONS[o], _EXTENTS[e]) for o, e in product(_OPERATIONS, _EXTENTS)}
_EXTRUDE_WORDS = {kind: word for word, kind in _EXTRUDES.items()}
_NUMBERS = {str(value): value for value in range(LEVELS)}
_LONGEST = 3

_WORDS = (*_FRAMES, _ANGLES, *_CURVES, _NEXT_LOOP, *_EXTRUDES, *_NUMBERS, _END)
_KNOWN = frozenset(_WORDS)
_WORD = re.compile(re.escape(_OPEN) + rf"([^<>]{{1,{_LONGEST}}})" + _CLOSE)
# What stands between the words of the compact grammar (commas, line ends, the bracket after angles) has no word.
_COMPACT_WORD = re.compile(r"S[a-x(]|E[NJCI][OST]|[0-9]+|[LABC;.]")

assert len(_FRAMES) == len(AXIS_FRAMES)
assert len(_KNOWN) == len(_WORDS)


def vocabulary() -> tuple[str, ...]:
    """The 299 words, in the order in which they are added to a tokenizer; fixed for a version of the codec."""
    return tuple(_written(word) for word in _WORDS)


def num_words(text: str) -> int:
    """How many words a text that `encode` wrote has: its tokens, without asking a tokenizer."""
    return text.count(_OPEN)


def without_words(text: str) -> str:
    """`text` with a blank put into whatever a tokenizer could take for one of the words."""
    return text.replace(_OPEN, "< cad:")


def _written(word: str) -> str:
    return f"{_OPEN}{word}{_CLOSE}"


_FROM_COMPACT: Mapping[str, str] = {word: _written(word) for word in _WORDS} | {"S(": _written(_ANGLES)}


def respell_compact(text: str) -> str:
    """The words of a design that the compact grammar spells: `encode(grammar.decode(text))` at a twentieth of its time.

    `text` is one that `grammar.encode` wrote; any other gives words that spell nothing or another design.
    """
    return "".join([_FROM_COMPACT[word] for word in _COMPACT_WORD.findall(text)])


# -------------------------------------------------------------------------------------------- encode


def encode(sequence: QuantizedSequence) -> str:
    """The design's words, end mark included."""
    words = [word for step in sequence.steps for word in _step_words(step)]
    return "".join(_written(word) for word in [*words, _END])


def _step_words(step: QuantizedStep) -> list[str]:
    if isinstance(step.plane, PlaneAngles):
        words = [_ANGLES, *_numbers(step.plane.theta, step.plane.phi, step.plane.gamma)]
    else:
        words = [_FRAMES[step.plane]]
    words += _numbers(*step.position, step.size)
    for number, loop in enumerate(step.loops):
        words += [_NEXT_LOOP] if number else []
        for curve in loop.curves:
            words += _curve_words(curve)
    distances = (step.distance_one, step.distance_two) if step.extent is Extent.TWO_SIDES else (step.distance_one,)
    return [*words, _EXTRUDE_WORDS[step.operation, step.extent], *_numbers(*distances)]


def _curve_words(curve: QuantizedCurve) -> list[str]:
    if isinstance(curve, QuantizedLine):
        return ["L", *_numbers(curve.x, curve.y)]
    if isinstance(curve, QuantizedArc):
        return ["A" if curve.is_ccw else "B", *_numbers(curve.x, curve.y, curve.sweep)]
    return ["C", *_numbers(curve.x, curve.y, curve.radius)]


def _numbers(*values: int) -> list[str]:
    return [str(value) for value in values]


# -------------------------------------------------------------------------------------------- decode


def decode(text: str) -> QuantizedSequence:
    """The design that the words spell; raises `GrammarError` with the position (of a character, from 0) and the reason for
    every other text, and nothing else."""
    reader = _Reader(text)
    steps = [_read_step(reader)]
    while not reader.accept(_END):
        if reader.next not in _FRAMES and reader.next != _ANGLES:
            raise reader.unexpected("the next sketch <cad:Sa>..<cad:Sx> or <cad:S*>, or the end mark <cad:.>")
        steps.append(_read_step(reader))
    if reader.position < len(text):
        raise reader.error("something follows the end mark")
    return QuantizedSequence(tuple(steps))


class _Reader:
    """A place in a row of words that moves forward by what it recognises."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0

    @property
    def next(self) -> str | None:
        """The word at this place without its brackets; None where there is none."""
        match = _WORD.match(self.text, self.position)
        return match[1] if match is not None and match[1] in _KNOWN else None

    def accept(self, word: str) -> bool:
        if self.next != word:
            return False
        self._advance(word)
        return True

    def choose(self, choices: Sequence[str] | Mapping[str, object], what: str) -> str:
        word = self.next
        if word is None or word not in choices:
            raise self.unexpected(what)
        self._advance(word)
        return word

    def number(self, what: str) -> int:
        start = self.position
        value = _NUMBERS[self.choose(_NUMBERS, f"{what}, a number")]
        if value == 0 and what in ("the size", "the sweep", "the radius"):
            raise self.error(f"{what} is 0, outside 1..{LEVELS - 1}", start)
        return value

    def numbers(self, *what: str) -> list[int]:
        return [self.number(name) for name in what]

    def error(self, reason: str, position: int | None = None) -> GrammarError:
        return GrammarError(reason, position=self.position if position is None else position)

    def unexpected(self, what: str) -> GrammarError:
        if self.position >= len(self.text):
            return self.error(f"expected {what}, but the text ends")
        word = self.next
        rest = self.text[self.position : self.position + len(_OPEN) + _LONGEST + len(_CLOSE)]
        return self.error(f"expected {what}, found {_written(word) if word is not None else repr(rest)}")

    def _advance(self, word: str) -> None:
        self.position += len(_OPEN) + len(word) + len(_CLOSE)


def _read_step(reader: _Reader) -> QuantizedStep:
    plane = _read_plane(reader)
    x, y, z, size = reader.numbers("the position's x", "the position's y", "the position's z", "the size")
    loops = [_read_loop(reader)]
    while reader.accept(_NEXT_LOOP):
        loops.append(_read_loop(reader))
    what = "a curve <cad:L>, <cad:A>, <cad:B>, <cad:C>, the next loop <cad:;> or an extrusion <cad:ENO>..<cad:EIT>"
    operation, extent = _EXTRUDES[reader.choose(_EXTRUDES, what)]
    start = reader.position
    names = ("the first distance", "the second distance")
    distances = reader.numbers(*(names if extent is Extent.TWO_SIDES else names[:1]))
    one, two = distances if extent is Extent.TWO_SIDES else (distances[0], CENTER)
    if reason := QuantizedStep.extent_fault(extent, one, two):
        raise reader.error(reason, start)
    return QuantizedStep(plane, (x, y, z), size, loops[0], tuple(loops[1:]), operation, extent, one, two)


def _read_plane(reader: _Reader) -> int | PlaneAngles:
    start = reader.position
    if not reader.accept(_ANGLES):
        return _FRAMES.index(reader.choose(_FRAMES, "a sketch <cad:Sa>..<cad:Sx> or <cad:S*>"))
    plane = PlaneAngles(*reader.numbers("theta", "phi", "gamma"))
    if reason := plane.fault():
        raise reader.error(reason, start)
    return plane


def _read_loop(reader: _Reader) -> QuantizedLoop:
    start = reader.position
    curves = [_read_curve(reader)]
    while reader.next in _CURVES:
        curves.append(_read_curve(reader))
    if reason := QuantizedLoop.fault(curves):
        raise reader.error(reason, start)
    return QuantizedLoop(tuple(curves))


def _read_curve(reader: _Reader) -> QuantizedCurve:
    letter = reader.choose(_CURVES, "a curve <cad:L>, <cad:A>, <cad:B> or <cad:C>")
    if letter == "L":
        return QuantizedLine(*reader.numbers("x", "y"))
    if letter == "C":
        return QuantizedCircle(*reader.numbers("x", "y", "the radius"))
    x, y, sweep = reader.numbers("x", "y", "the sweep")
    return QuantizedArc(x, y, sweep, is_ccw=letter == "A")


class TokensCodec:
    """The words behind the interface of `codec`."""

    name = "tokens"
    version = TOKENS_VERSION

    def encode(self, sequence: QuantizedSequence) -> str:
        """See `encode`."""
        return encode(sequence)

    def decode(self, text: str) -> QuantizedSequence:
        """See `decode`."""
        return decode(text)
