"""Values with a unit: durations of a run, counts of bytes, and how both are written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

DurationUnit = Literal["steps", "epochs", "minutes"]

_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*([a-z]*)\s*")
_UNITS: dict[str, tuple[DurationUnit, float]] = {
    "": ("steps", 1), "step": ("steps", 1), "steps": ("steps", 1),
    "epoch": ("epochs", 1), "epochs": ("epochs", 1),
    "second": ("minutes", 1 / 60), "seconds": ("minutes", 1 / 60),
    "minute": ("minutes", 1), "minutes": ("minutes", 1),
    "hour": ("minutes", 60), "hours": ("minutes", 60),
}  # fmt: skip
_LONGEST = 1e12


@dataclass(frozen=True, slots=True)
class Duration:
    """A length of training: `20 steps`, `1.5 epochs`, `10 minutes`; a bare number is steps."""

    value: float
    unit: DurationUnit = "steps"

    @classmethod
    def parse(cls, text: str | int | float | Duration) -> Duration:
        """Read a duration; raises `ValueError` that says what is accepted."""
        if isinstance(text, Duration):
            return text
        match = _DURATION.fullmatch(str(text).lower())
        if isinstance(text, bool) or match is None or match[2] not in _UNITS:
            raise ValueError(
                f"{text!r} is no duration; write e.g. `20 steps`, `1.5 epochs`, `10 minutes`, or a bare number of steps"
            )
        unit, factor = _UNITS[match[2]]
        value = float(match[1]) * factor
        if value > _LONGEST:
            raise ValueError(f"{text!r} is longer than any run")
        if unit == "steps" and value != int(value):
            raise ValueError(f"{text!r}: a number of steps must be whole")
        return cls(value, unit)

    def in_steps(self, steps_per_epoch: int) -> int:
        """The duration as whole optimizer steps; raises `ValueError` for a duration in minutes."""
        if self.unit == "minutes":
            raise ValueError(f"{self} cannot be counted in steps before the run")
        return round(self.value * (steps_per_epoch if self.unit == "epochs" else 1))

    def __str__(self) -> str:
        # Exact, so that a configuration loads back equal: `:g` would write a million steps as 1e+06.
        number = str(int(self.value)) if self.value == int(self.value) else repr(self.value)
        return f"{number} {self.unit[:-1] if number == '1' else self.unit}"


_TIME_PARTS = re.compile(
    r"(?:(\d+)\s*d(?:ays?)?)?\s*(?:(\d+)\s*h(?:ours?)?)?\s*(?:(\d+)\s*m(?:in(?:utes?)?)?)?\s*(?:(\d+)\s*s(?:ec(?:onds?)?)?)?"
)
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):(\d{2}):(\d{2})")


def parse_seconds(text: str | int | float) -> float:
    """`3h50m`, `1d 2h`, `90 minutes`, `45s`, SLURM's `1-02:00:00` or `3:50:00`, or a bare number of seconds.

    Raises `ValueError` that says what is accepted.
    """
    if isinstance(text, int | float) and not isinstance(text, bool):
        if not 0 < text < _LONGEST:
            raise ValueError(f"{text!r} is no length of time above 0")
        return float(text)
    written = str(text).strip().lower()
    match = _CLOCK.fullmatch(written) or (_TIME_PARTS.fullmatch(written) if written else None)
    if match is None or not any(int(part or 0) for part in match.groups()):
        raise ValueError(f"{text!r} is no length of time above 0; write e.g. `3h50m`, `90 minutes`, `1d`, `3:50:00`")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def parse_bytes(text: str, *, needs_unit: bool = False) -> int:
    """`5GB` -> 5,000,000,000, `512MiB` -> 536,870,912, or, unless it `needs_unit`, a bare number of bytes.

    Raises `ValueError` that says what is accepted, also for less than one byte.
    """
    match = _SIZE.fullmatch(text.strip())
    size = 0
    if match is not None and (match[2] or not needs_unit):
        size = int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2].lower() or " "))
    if size < 1:
        accepted = "`48GB` or `44.5GiB`" if needs_unit else "`5GB`, `512MiB`, or a bare number of bytes"
        raise ValueError(f"{text!r} is no size above 0; write e.g. {accepted}")
    return size


def format_bytes(count: float) -> str:
    """`1536` -> `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def format_seconds(seconds: float) -> str:
    """`3725` -> `1 h 02 min`, `75` -> `1 min 15 s`, `4.2` -> `4 s`."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {secs:02d} s" if minutes else f"{secs} s"
