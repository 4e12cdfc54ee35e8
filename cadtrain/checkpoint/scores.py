"""Validation losses by step, kept beside the checkpoints: what `keep_best` goes by."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from cadtrain.checkpoint.layout import SCORES, write_atomically

log = logging.getLogger(__name__)


class Scores:
    """The file `scores.json` in `checkpoints/`: a loss for each validated step; lower is better. Rank 0's."""

    def __init__(self, root: Path) -> None:
        self._path = root / SCORES

    def read(self) -> dict[int, float]:
        """All losses; empty where there are none or the file is no such list."""
        try:
            raw = json.loads(self._path.read_text(encoding="utf-8"))
            return {int(step): float(loss) for step, loss in raw.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            log.warning("%s cannot be read, so no checkpoint counts as best: %s", self._path, error)
            return {}

    def note(self, step: int, loss: float) -> None:
        """Add the loss of a step; what stood there for later ones belongs to work that was lost. A disk that fails is a warning."""
        kept = {known: value for known, value in self.read().items() if known < step}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, json.dumps({**kept, step: loss}) + "\n")
        except OSError as error:
            log.warning("the validation loss of step %d could not be kept: %s", step, error)
