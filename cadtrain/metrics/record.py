"""One line of a run's metrics, and what takes such lines."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step, over all ranks."""

    step: int
    """Steps done, this one included; from 1."""
    stage: str
    epoch: int
    loss: float
    """Mean cross entropy (nats) of a target token."""
    lr: float
    """The language model's rate."""
    rates: Mapping[str, float]
    """Every component's rate."""
    grad_norm: float | None
    """Before clipping; null where it is not a finite number."""
    samples: int
    tokens: int
    """Tokens in the model, modality placeholders included."""
    target_tokens: int
    tokens_per_second: float
    """Over all ranks."""
    seconds: float
    """Wall time of the step."""
    elapsed_seconds: float
    """Training time of the run so far, resumed parts included."""
    data_wait_seconds: float
    micro_steps: int
    memory_gib: float | None
    """Peak of what torch's allocator handed out on rank 0's device since the last record; null on CPU."""
    memory_reserved_gib: float | None
    """The same with what the allocator held in reserve; null on CPU."""
    skipped_steps: int
    """Steps so far whose gradient was not finite and that left the weights alone."""

    def to_json(self) -> dict[str, Any]:
        """A plain dict; a number that is not finite becomes null, since JSON has no word for it."""
        row = asdict(self)
        for key in ("loss", "grad_norm"):
            if row[key] is not None and not math.isfinite(row[key]):
                row[key] = None
        return row


@dataclass(frozen=True, slots=True)
class ValidationRecord:
    """Validation at the end of a stage (or of the run)."""

    step: int
    stage: str
    losses: Mapping[str, float]
    """Mean cross entropy of a target token for each modality set."""
    samples: Mapping[str, int]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """A plain dict; `validation` marks the line, and a loss that is not finite becomes null."""
        losses = {key: loss if math.isfinite(loss) else None for key, loss in self.losses.items()}
        return {"validation": True, **asdict(self), "losses": losses}


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What a run is, told to the sinks before the first step."""

    name: str
    run_dir: str
    total_steps: int
    first_step: int
    stages: tuple[tuple[str, int], ...]
    """Name and last step (exclusive) of each stage."""
    lines: tuple[tuple[str, str], ...] = field(default=())
    """Facts to show: label and text."""


class MetricSink(Protocol):
    """Takes metrics; changes nothing. Only rank 0 has one."""

    def start(self, facts: RunFacts) -> None:
        """The run begins or goes on."""
        ...

    def step(self, record: StepRecord) -> None:
        """An optimizer step is done."""
        ...

    def validation(self, record: ValidationRecord) -> None:
        """A validation is done."""
        ...

    def note(self, text: str) -> None:
        """Something happened that a person wants to know: a stage begins, a checkpoint is whole."""
        ...

    def rewind(self, step: int) -> None:
        """The run goes back to after `step` steps: what was said of later ones is void."""
        ...

    def close(self) -> None:
        """The run ends, for whatever reason."""
        ...


class NullSink:
    """A sink that keeps quiet: the default, and every rank but 0."""

    def start(self, facts: RunFacts) -> None:
        """Nothing."""

    def step(self, record: StepRecord) -> None:
        """Nothing."""

    def validation(self, record: ValidationRecord) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def rewind(self, step: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class CompositeSink:
    """Hands everything to several sinks; one that fails after the start is switched off, for a run is worth more than its log."""

    def __init__(self, sinks: list[MetricSink]) -> None:
        self._sinks = list(sinks)

    def start(self, facts: RunFacts) -> None:
        """To all; a sink that cannot start is an error."""
        for sink in self._sinks:
            sink.start(facts)

    def step(self, record: StepRecord) -> None:
        """To all."""
        self._tell(lambda sink: sink.step(record))

    def validation(self, record: ValidationRecord) -> None:
        """To all."""
        self._tell(lambda sink: sink.validation(record))

    def note(self, text: str) -> None:
        """To all."""
        self._tell(lambda sink: sink.note(text))

    def rewind(self, step: int) -> None:
        """To all."""
        self._tell(lambda sink: sink.rewind(step))

    def close(self) -> None:
        """To all."""
        self._tell(lambda sink: sink.close())

    def _tell(self, act: Callable[[MetricSink], None]) -> None:
        for sink in list(self._sinks):
            try:
                act(sink)
            except (OSError, RuntimeError, ValueError) as error:
                self._sinks.remove(sink)
                log.warning("%s is switched off: %s", type(sink).__name__, error)
