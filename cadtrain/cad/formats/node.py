"""JSON documents whose values know their place, so that every complaint about one can name that place."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cadtrain.errors import DataError, SchemaError

T = TypeVar("T")

_FAULTS_SHOWN = 7


def load_json(path: str | Path) -> Any:
    """The parsed file.

    Raises `DataError` for a file that is not there or is no UTF-8, `SchemaError` for one that is no complete JSON (line
    and column).
    """
    where = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}.", where=where) from error
    except UnicodeDecodeError as error:
        raise DataError(f"is no UTF-8 text (byte {error.start}).", where=where) from error
    if not text:
        raise SchemaError("the file is empty (0 bytes).", json_path="$", where=where)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at_end = error.pos >= len(text.rstrip())
        problem = "the JSON is cut off" if at_end or "Unterminated" in error.msg else f"no JSON: {error.msg}"
        place = f"line {error.lineno} column {error.colno}"
        raise SchemaError(f"{problem} at {place}.", json_path="$", where=where) from error
    except ValueError as error:
        raise SchemaError("a whole number has thousands of digits.", json_path="$", where=where) from error
    except RecursionError as error:
        raise SchemaError("the JSON is nested too deeply.", json_path="$", where=where) from error


class Faults:
    """The faults of one document, gathered so that its reader can name all of them at once."""

    def __init__(self) -> None:
        self._errors: list[SchemaError] = []

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Keep a `SchemaError` of the block and go on behind it."""
        try:
            yield
        except SchemaError as error:
            self._errors.append(error)

    def raise_any(self) -> None:
        """Raise what was kept, if anything: one `SchemaError` at the place of the first fault that names them all."""
        distinct = list({error.message: error for error in self._errors}.values())
        if not distinct:
            return
        first, *others = distinct
        if not others:
            raise first
        listed = " ".join(error.message for error in others[:_FAULTS_SHOWN])
        rest = f" And {len(others) - _FAULTS_SHOWN} more." if len(others) > _FAULTS_SHOWN else ""
        reason = f"{first.reason} {len(others)} further fault{'s' if len(others) > 1 else ''}: {listed}{rest}"
        raise SchemaError(reason, json_path=first.json_path, where=first.where)


@dataclass(frozen=True, slots=True)
class Node:
    """`value` at `path` (`$.entities.F1.profiles[0]`) of the document `where`; every method raises `SchemaError`."""

    value: Any
    path: str
    where: str

    def error(self, reason: str) -> SchemaError:
        """An error at this place."""
        return SchemaError(f"{reason}.", json_path=self.path, where=self.where)

    def mapping(self) -> dict[str, Any]:
        """The value as an object."""
        if not isinstance(self.value, dict):
            raise self._unlike("an object")
        return self.value

    def has(self, key: str) -> bool:
        """Whether the object has the key."""
        return key in self.mapping()

    def child(self, key: str, reason: str | None = None) -> Node:
        """The object's value for a key; `reason` replaces the message for a missing one."""
        mapping = self.mapping()
        if key not in mapping:
            raise self.error(reason or f"{key!r} is missing; there is {_listed(mapping)}")
        name = f".{key}" if key.isidentifier() else f"[{key!r}]"
        return Node(mapping[key], self.path + name, self.where)

    def items(self) -> Iterator[Node]:
        """The list's values."""
        if not isinstance(self.value, list):
            raise self._unlike("a list")
        for index, value in enumerate(self.value):
            yield Node(value, f"{self.path}[{index}]", self.where)

    def text(self) -> str:
        """The value as a string."""
        if not isinstance(self.value, str):
            raise self._unlike("a string")
        return self.value

    def number(self) -> float:
        """The value as a finite float."""
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise self._unlike("a number")
        try:
            number = float(self.value)
        except OverflowError:
            number = math.inf
        if not abs(number) < 1e9:
            raise self._unlike("a number of moderate size")
        return number

    def truth(self) -> bool:
        """The value as true or false."""
        if not isinstance(self.value, bool):
            raise self._unlike("true or false")
        return self.value

    def whole_number(self, low: int, high: int) -> int:
        """The value as an int in low..high."""
        if isinstance(self.value, bool) or not isinstance(self.value, int) or not low <= self.value <= high:
            raise self._unlike(f"a whole number in {low}..{high}")
        return self.value

    def choice(self, choices: dict[str, T]) -> T:
        """What the string stands for."""
        text = self.text()
        if text not in choices:
            raise self._unlike(" or ".join(repr(choice) for choice in choices))
        return choices[text]

    def _unlike(self, expected: str) -> SchemaError:
        return self.error(f"expected {expected}, found {_shown(self.value)}")


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = json.dumps(value) if not isinstance(value, float) or math.isfinite(value) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _listed(mapping: dict[str, Any]) -> str:
    names = [repr(name) for name in mapping]
    if not names:
        return "nothing"
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
