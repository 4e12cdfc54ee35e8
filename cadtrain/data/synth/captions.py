"""True words about a part: a short caption, as people and captioning models write them, and a long one with sizes and relations.

A family says what it drew as `Words`; every number in them is one that it drew with. Wording varies, facts do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cadtrain.cad.sequence import CadSequence, Operation
from cadtrain.data.synth.drawing import Dice

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_OPENINGS = ("", "", "Generate ", "Make ", "Create ", "Design ", "Generate a CAD model of ", "A CAD model of ")
_PLANES = ("YZ", "XZ", "XY")
_MOST_SHORT_DETAILS = 3


@dataclass(frozen=True, slots=True)
class Detail:
    """One feature in words: `four round holes`, and `four round holes of diameter 8 in a row`; `short` may be empty."""

    short: str
    long: str


@dataclass(slots=True)
class Words:
    """What a family drew: `noun` (`rectangular plate`), `size` (`120 x 80 x 10`), and its features."""

    noun: str
    size: str
    details: list[Detail] = field(default_factory=list)

    def add(self, short: str, more: str = "") -> None:
        """Add a feature; the long caption says `short` and then `more`."""
        self.details.append(Detail(short, f"{short} {more}".strip()))


def number(count: int) -> str:
    """`4` -> `four`, `13` -> `13`."""
    return _NUMBERS[count] if count < len(_NUMBERS) else str(count)


def plural(noun: str) -> str:
    """The noun for more than one."""
    return noun + ("es" if noun.endswith("ss") else "s")


def counted(count: int, noun: str) -> str:
    """`1, "hole"` -> `a hole`; `4, "round hole"` -> `four round holes`."""
    return with_article(noun) if count == 1 else f"{number(count)} {plural(noun)}"


def with_article(phrase: str) -> str:
    """By sound, not by letter: an L-shaped bar, a U-shaped one."""
    return f"{'an' if phrase[0] in 'aeio' or phrase.startswith(('L-', 'I-', 'H-')) else 'a'} {phrase}"


def joined(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def short_caption(dice: Dice, words: Words) -> str:
    """One clause: what it is, and up to three features."""
    details = [detail.short for detail in words.details if detail.short][:_MOST_SHORT_DETAILS]
    text = with_article(words.noun) + (f" with {joined(details)}" if details else "")
    return _sentence(dice.one_of(_OPENINGS) + text)


def long_caption(dice: Dice, words: Words, sequence: CadSequence) -> str:
    """What it is with its size, every feature with size and place, then proportions, sketch plane and steps, not always all."""
    text = f"{with_article(words.noun)} {words.size}"
    if words.details:
        link = " with " if " with " not in text else ", with "
        text += link + joined([detail.long for detail in words.details])
    sentences = [_sentence(dice.one_of(_OPENINGS) + text)]
    if dice.chance(0.6):
        sentences.append(_proportions(dice, sequence))
    if dice.chance(0.6):
        plane = sketched_on(sequence)
        sentences.append(
            dice.one_of((f"It is sketched on the {plane} plane.", f"Its first sketch lies on the {plane} plane."))
        )
    if dice.chance(0.5):
        sentences.append(_steps(sequence))
    return " ".join(sentences)


def sketched_on(sequence: CadSequence) -> str:
    """The main plane that the first sketch lies in or parallel to."""
    normal = sequence.steps[0].plane.z_axis
    return _PLANES[max(range(3), key=lambda axis: abs(normal[axis]))]


def _proportions(dice: Dice, sequence: CadSequence) -> str:
    long, middle, short = sorted(sequence.material_box().size, reverse=True)
    first, second = _times(long / middle), _times(middle / short)
    start = dice.one_of(("Overall it is", "It is", "The whole part is"))
    return f"{start} {first} as long as wide and {second} as wide as thick."


def _times(ratio: float) -> str:
    return "about" if ratio < 1.05 else f"about {ratio:.1f} times" if ratio < 9.95 else f"about {ratio:.0f} times"


def _steps(sequence: CadSequence) -> str:
    steps = sequence.steps
    num_cuts = sum(step.operation is Operation.CUT for step in steps)
    if len(steps) == 1:
        return "It is a single extrusion."
    end = "." if not num_cuts else ", one of them a cut." if num_cuts == 1 else f", {number(num_cuts)} of them cuts."
    return f"It takes {number(len(steps))} extrusions{end}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
