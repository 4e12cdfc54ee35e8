"""Weights & Biases, where the `wandb` extra is installed."""

from __future__ import annotations

from typing import Any

from cadtrain.errors import EnvironmentFault
from cadtrain.metrics.record import NullSink, RunFacts, StepRecord, ValidationRecord


class WandbSink(NullSink):
    """One W&B run for one run folder; a resumed run goes on in it."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._run: Any = None

    def start(self, facts: RunFacts) -> None:
        """Begin or continue the W&B run named after the run folder."""
        try:
            import wandb
        except ImportError:
            raise EnvironmentFault(
                "logging.wandb is on but wandb is not installed",
                hint='Run `pip install "cadtrain[wandb]"` or set logging.wandb to false.',
            ) from None
        name = facts.run_dir.rstrip("/").rpartition("/")[2]
        self._run = wandb.init(
            project="cadtrain", name=name, id=name, resume="allow", dir=facts.run_dir, config=self._config
        )

    def step(self, record: StepRecord) -> None:
        """Log the step."""
        self._run.log(
            {f"train/{key}": value for key, value in record.to_json().items() if value is not None}, step=record.step
        )

    def validation(self, record: ValidationRecord) -> None:
        """Log the losses."""
        self._run.log({f"validation/{key}": loss for key, loss in record.losses.items()}, step=record.step)

    def close(self) -> None:
        """Finish the W&B run."""
        if self._run is not None:
            self._run.finish()
