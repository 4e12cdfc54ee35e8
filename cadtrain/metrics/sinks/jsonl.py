"""`metrics.jsonl`: one JSON object a line, in the order of steps, without repeats after a resume."""

from __future__ import annotations

import json
import os
from pathlib import Path

from cadtrain.metrics.record import NullSink, RunFacts, StepRecord, ValidationRecord


class JsonlSink(NullSink):
    """Appends records to a file, a line a write, so that a killed run leaves whole lines."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def start(self, facts: RunFacts) -> None:
        """Open the file, without the lines of steps that the resumed run will do again."""
        self.rewind(facts.first_step)

    def rewind(self, step: int) -> None:
        """Take the lines after `step` away and go on behind the rest."""
        self.close()
        drop_lines_after(self._path, step)
        self._file = open(self._path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed in close()

    def step(self, record: StepRecord) -> None:
        """Write the step."""
        self._file.write(json.dumps(record.to_json(), allow_nan=False) + "\n")

    def validation(self, record: ValidationRecord) -> None:
        """Write the validation."""
        self._file.write(json.dumps(record.to_json(), allow_nan=False) + "\n")

    def close(self) -> None:
        """Close the file."""
        if hasattr(self, "_file"):
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, object]]:
    """All whole lines of a metrics file; a last line that was cut off by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _is_before(row: dict[str, object], step: int) -> bool:
    """Whether a line stays when a run goes on after `step`; a validation at `step` itself is done again."""
    number = row.get("step")
    return isinstance(number, int) and (number < step or (number == step and not row.get("validation")))


def drop_lines_after(path: Path, step: int) -> None:
    """Keep the lines up to `step`: those after it belong to work that was lost and is done again."""
    if not path.exists():
        return
    kept = [row for row in read_metrics(path) if _is_before(row, step)]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    os.replace(temporary, path)
