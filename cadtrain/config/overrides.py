"""`--set key.path=value`: single values laid over a configuration before it is checked."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from cadtrain.config.yaml_source import Document, KeyPath, dotted, read_yaml
from cadtrain.errors import ConfigError, Fault


class Overlay:
    """A document with overrides laid over it: the values, and for each key path the place it was written."""

    def __init__(self, document: Document) -> None:
        self.values: dict[str, Any] = document.values if isinstance(document.values, dict) else {}
        self.faults: list[Fault] = list(document.faults)
        self.assigned: dict[KeyPath, str] = {}
        self._document = document

    def where(self, path: KeyPath) -> str:
        """`file:line key.path`, or `--set key.path` where an override wrote the value."""
        for length in range(len(path), 0, -1):
            key = self.assigned.get(path[:length])
            if key is not None:
                return f"--set {key}" if length == len(path) else f"--set {key} ({dotted(path)})"
        return self._document.where(path)

    def origin(self, path: KeyPath) -> str:
        """Where exactly `path` was written: `file:line`, `--set`, or nothing."""
        for length in range(len(path), 0, -1):
            key = self.assigned.get(path[:length])
            if key is not None:
                # A whole section set at once says nothing of the keys that it leaves out.
                return "--set" if length == len(path) or _holds(self.values, path) else ""
        return f"{self._document.name}:{self._document.lines[path]}" if path in self._document.lines else ""

    def apply(self, assignments: Sequence[str]) -> None:
        """Lay every `key.path=value` over the values; what cannot be placed becomes a fault."""
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            key = key.strip()
            if not equals or not key:
                hint = "Write `--set key.path=value`, e.g. `--set batch.global_batch_size=32`."
                self.faults.append(Fault(f"--set {assignment}", "no `=` between a key and a value.", hint))
                continue
            try:
                document = read_yaml(text, f"--set {key}")
            except ConfigError as error:
                self.faults.extend(error.faults)
                continue
            self.faults.extend(document.faults)
            self._assign(key, document.values)

    def _assign(self, key: str, value: Any) -> None:
        place: Any = self.values
        path: KeyPath = ()
        words = key.split(".")
        for position, word in enumerate(words):
            is_last = position == len(words) - 1
            step = self._step(place, word, key)
            if step is None:
                return
            path = (*path, step)
            if is_last:
                place[step] = value
            elif isinstance(place, dict) and place.get(step) is None:
                place[step] = {}
                self.assigned.setdefault(path, key)
            place = place[step]
        self.assigned = {old: text for old, text in self.assigned.items() if old[: len(path)] != path}
        self.assigned[path] = key

    def _step(self, place: Any, word: str, key: str) -> str | int | None:
        """The key or list position that `word` names in `place`; None after adding a fault."""
        if isinstance(place, dict):
            return word
        if isinstance(place, list):
            names = [item.get("name") for item in place if isinstance(item, dict)]
            if word in names:
                return next(i for i, item in enumerate(place) if isinstance(item, dict) and item.get("name") == word)
            if word.isdigit() and int(word) < len(place):
                return int(word)
            known = [str(name) for name in names if name]
            near = difflib.get_close_matches(word, known, n=1)
            hint = (
                f"Did you mean `{near[0]}`?"
                if near
                else f"Write 0 to {len(place) - 1}" + (f", or one of {', '.join(known)}." if known else ".")
            )
            self.faults.append(Fault(f"--set {key}", f"{word!r} names none of the {len(place)} items.", hint))
            return None
        self.faults.append(
            Fault(
                f"--set {key}",
                f"{word!r} would stand inside a single value ({place!r}).",
                "Set the whole value instead.",
            )
        )
        return None


def _holds(values: Any, path: KeyPath) -> bool:
    try:
        for step in path:
            values = values[step]
    except (KeyError, IndexError, TypeError):
        return False
    return True
