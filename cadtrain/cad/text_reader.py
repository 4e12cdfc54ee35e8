"""A place in a text that moves forward by what it recognises; codecs read with it and complain by it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cadtrain.cad.grid import LEVELS
from cadtrain.errors import GrammarError

_NUMBER = re.compile(r"[0-9]+")
_FROM_ONE = ("the radius", "the sweep", "the size")


class TextReader:
    """Reads `text` from its start; every method raises `GrammarError` at the place of the fault, and nothing else."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0

    @property
    def at_end(self) -> bool:
        """Whether everything has been read."""
        return self.position >= len(self.text)

    @property
    def next(self) -> str:
        """The next character, empty at the end."""
        return self.text[self.position : self.position + 1]

    def accept(self, mark: str) -> bool:
        """Move past `mark` if the text goes on with it."""
        if not self.text.startswith(mark, self.position):
            return False
        self.position += len(mark)
        return True

    def expect(self, mark: str, what: str) -> None:
        """Move past `mark`, which the text must go on with; `what` describes it."""
        if not self.accept(mark):
            raise self.error(f"expected {what}, {self._found()}")

    def letter(self, choices: str, what: str) -> str:
        """The next character, one of `choices`."""
        letter = self.next
        if not letter or letter not in choices:
            raise self.error(f"expected {what}, {self._found()}")
        self.position += 1
        return letter

    def number(self, what: str, low: int = 0, high: int = LEVELS - 1) -> int:
        """The next whole number, in low..high and without leading zeros."""
        match = _NUMBER.match(self.text, self.position)
        if match is None:
            raise self.error(f"expected {what}, a number, {self._found()}")
        digits = match[0]
        if len(digits) > 1 and digits[0] == "0":
            raise self.error(f"{what} is written {_clipped(digits)}, with a leading zero")
        if len(digits) > 3 or not low <= int(digits) <= high:
            raise self.error(f"{what} is {_clipped(digits)}, outside {low}..{high}")
        self.position = match.end()
        return int(digits)

    def numbers(self, *what: str) -> list[int]:
        """Numbers with commas between them; a radius, sweep or size is at least 1."""
        values = []
        for index, name in enumerate(what):
            if index:
                self.expect(",", f"a comma and {name}")
            values.append(self.number(name, low=1 if name in _FROM_ONE else 0))
        return values

    def end(self) -> None:
        """Refuse whatever is left."""
        if not self.at_end:
            raise self.error("something follows the end mark")

    def error(self, reason: str, position: int | None = None) -> GrammarError:
        """A complaint about `position`, by default about the present one."""
        return GrammarError(reason, position=self.position if position is None else position)

    def _found(self) -> str:
        return "but the text ends" if self.at_end else f"found {self.next!r}"


def _clipped(digits: str) -> str:
    return digits if len(digits) <= 8 else f"{digits[:8]}…"


def either(names: Sequence[str]) -> str:
    """`'a', 'b' or 'c'`."""
    quoted = [repr(name) for name in names]
    return f"{', '.join(quoted[:-1])} or {quoted[-1]}" if len(quoted) > 1 else quoted[0]
