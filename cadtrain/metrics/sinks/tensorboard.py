"""TensorBoard event files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cadtrain.metrics.record import NullSink, RunFacts, StepRecord, ValidationRecord


class TensorBoardSink(NullSink):
    """Scalars under `train/`, `rate/` and `validation/`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def start(self, facts: RunFacts) -> None:
        """Open the writer; steps that a resumed run repeats are purged from the view."""
        self.rewind(facts.first_step)

    def rewind(self, step: int) -> None:
        """A new event file, which hides the steps after `step` of the files before."""
        from torch.utils.tensorboard import SummaryWriter

        self.close()
        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1 if step else None)

    def step(self, record: StepRecord) -> None:
        """Write the step's scalars."""
        values = {"loss": record.loss, "grad_norm": record.grad_norm, "tokens_per_second": record.tokens_per_second,
                  "data_wait_seconds": record.data_wait_seconds, "memory_gib": record.memory_gib,
                  "memory_reserved_gib": record.memory_reserved_gib}  # fmt: skip
        for key, value in values.items():
            if value is not None:
                self._writer.add_scalar(f"train/{key}", value, record.step)
        for component, rate in record.rates.items():
            self._writer.add_scalar(f"rate/{component}", rate, record.step)

    def validation(self, record: ValidationRecord) -> None:
        """Write one scalar a modality set."""
        for key, loss in record.losses.items():
            self._writer.add_scalar(f"validation/{key}", loss, record.step)

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()
