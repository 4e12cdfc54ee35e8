"""The base of all sections, and faults that know their place inside one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator


@dataclass(frozen=True, slots=True)
class SectionFault:
    """One fault inside or between the fields of a section."""

    path: tuple[str | int, ...]
    """The key to look at, seen from the section or field that raises."""
    message: str
    """What is wrong, with the value found."""
    hint: str = ""
    """What to do about it."""
    also: tuple[tuple[str | int, ...], ...] = ()
    """Other keys that the fault depends on: with one of them faulty itself, this one says nothing."""


class SectionFaults(ValueError):
    """All faults that one validator found, each with its place; `load` turns them into lines of the YAML."""

    def __init__(self, faults: Sequence[SectionFault]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(f"{_dotted(f.path)}: {f.message} {f.hint}".strip() for f in self.faults))


def _dotted(path: tuple[str | int, ...]) -> str:
    return ".".join(map(str, path))


class Section(BaseModel):
    """Base of all sections: unknown keys are faults, values never change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, data: Any) -> Any:
        """Refuse `true` where a number belongs; pydantic would read it as 1."""
        if not isinstance(data, dict):
            return data
        numbers = [
            key
            for key, field in cls.model_fields.items()
            if {int, float} & {field.annotation, *get_args(field.annotation)}
        ]
        found = [
            SectionFault((key,), f"found {str(data[key]).lower()}, expected a number.")
            for key in numbers
            if isinstance(data.get(key), bool)
        ]
        if found:
            raise SectionFaults(found)
        return data
