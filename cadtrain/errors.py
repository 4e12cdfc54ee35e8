"""Every error that cadtrain raises on purpose, in one tree.

    CadtrainError                 exit 4 unless a branch below says otherwise
    ├── UsageError                exit 2   a wrong argument or path on the command line
    │   └── ConfigError           exit 2   faults of a configuration, all of them at once
    ├── DataError                 exit 2   input that cannot be read as what it claims to be
    │   ├── SchemaError                    a design file that breaks its schema: carries the JSON path
    │   └── GrammarError                   a sequence text that the grammar refuses: carries the position
    ├── GeometryError             exit 4   the kernel cannot make a solid of a design: carries a kind to count
    ├── EnvironmentFault          exit 3   the machine lacks something: device, library, disk
    ├── TrainingError             exit 4   a run that cannot go on
    │   └── CheckpointError                a checkpoint that cannot be written, verified or read
    └── Interrupted               exit 130 / 143, after the state has been saved

A message says what is wrong, where, the value found; `hint` says what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class CadtrainError(Exception):
    """An error with a place and a remedy, shown to people without a traceback."""

    exit_code = 4

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        if not self.hint:
            return text
        return f"{text} {self.hint}" if text.endswith((".", "!", "?")) else f"{text}. {self.hint}"

    def __reduce__(self) -> tuple[object, ...]:
        # Errors travel between processes (kernel workers); the default protocol would drop keyword arguments.
        return (_rebuild, (type(self), self.__dict__, self.args))


def _rebuild(cls: type[CadtrainError], state: dict[str, object], args: tuple[object, ...]) -> CadtrainError:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


class UsageError(CadtrainError):
    """A wrong argument, path or combination of options."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of a configuration: where it stands, what is wrong, and what to do."""

    where: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" + (f" {self.hint}" if self.hint else "")


class ConfigError(UsageError):
    """All faults of one configuration at once."""

    def __init__(self, faults: Sequence[Fault], *, where: str | None = None, hint: str | None = None) -> None:
        self.faults = tuple(faults)
        count = len(self.faults)
        head = f"{count} fault{'s' if count != 1 else ''} in the configuration"
        super().__init__("\n".join([head, *(f"  {fault}" for fault in self.faults)]), where=where, hint=hint)


class DataError(CadtrainError):
    """Input data that cannot be read as what it claims to be."""

    exit_code = 2


class SchemaError(DataError):
    """A design file that breaks its schema; `json_path` is the place inside the document."""

    def __init__(self, message: str, *, json_path: str, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(f"{json_path}: {message}", where=where, hint=hint)
        self.reason = message
        self.json_path = json_path


class GrammarError(DataError):
    """A sequence text that the grammar refuses; `position` is the 0-based character offset."""

    def __init__(self, reason: str, *, position: int, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(f"position {position}: {reason}", where=where, hint=hint)
        self.reason = reason
        self.position = position


class GeometryError(CadtrainError):
    """A design of which the kernel makes no solid; `kind` is the word under which it is counted."""

    def __init__(self, kind: str, reason: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(f"{kind}: {reason}", where=where, hint=hint)
        self.kind = kind
        self.reason = reason


class EnvironmentFault(CadtrainError):
    """The machine lacks something that the command needs."""

    exit_code = 3


class TrainingError(CadtrainError):
    """A run that cannot go on."""

    exit_code = 4


class CheckpointError(TrainingError):
    """A checkpoint that cannot be written, verified or read."""


class Interrupted(CadtrainError):
    """The run was asked to stop and has saved its state; the exit code is 128 + the signal's number."""

    def __init__(self, message: str, *, signal_number: int, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, where=where, hint=hint)
        self.exit_code = 128 + signal_number
