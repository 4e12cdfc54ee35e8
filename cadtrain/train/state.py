"""Where a run stands: plain numbers, saved as JSON in every checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from cadtrain.checkpoint.layout import STATE
from cadtrain.errors import CheckpointError

_NEWER = ("codec", "passed_over", "rollbacks")
"""Fields that checkpoints of earlier versions lack."""


@dataclass(slots=True)
class TrainState:
    """Counters of the run, over all ranks. The sample order and every draw follow from `step` alone."""

    step: int = 0
    """Optimizer steps done."""
    samples: int = 0
    tokens: int = 0
    target_tokens: int = 0
    skipped_steps: int = 0
    elapsed_seconds: float = 0.0
    order: str = ""
    """What the order of samples follows from, besides `step`: data, seed, batch size. A resumed run compares it."""
    passed_over: list[int] = field(default_factory=list)
    """0-based steps that train nothing: the run went back to before them, and their samples are passed over."""
    rollbacks: int = 0
    codec: str = "compact 1"
    """Name and version of the codec that the model learns to write. A run with another one cannot go on from here."""

    def to_json(self) -> dict[str, Any]:
        """A plain dict."""
        return asdict(self)

    @classmethod
    def read(cls, checkpoint: Path) -> TrainState:
        """The state saved in `checkpoint`; raises `CheckpointError`."""
        path = checkpoint / STATE
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{item.name: raw[item.name] for item in fields(cls) if item.name in raw or item.name not in _NEWER})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"is not a training state: {error!r}", where=str(path)) from error
