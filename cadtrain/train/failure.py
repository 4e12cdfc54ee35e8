"""What a rank leaves behind when it fails: `logs/rank_NN.error.json`, read by `launch`."""

from __future__ import annotations

import json
import time
import traceback
from pathlib import Path

from cadtrain.checkpoint.layout import write_atomically
from cadtrain.errors import CadtrainError
from cadtrain.logs import log_path


def write_failure(run_dir: Path, rank: int, error: BaseException) -> None:
    """Record `error` with its traceback; the launcher shows the earliest of all ranks' records."""
    path = log_path(run_dir, rank).with_suffix(".error.json")
    record = {
        "rank": rank,
        "time": time.time(),
        "type": type(error).__name__,
        "message": str(error) or type(error).__name__,
        "is_expected": isinstance(error, CadtrainError),
        "exit_code": error.exit_code if isinstance(error, CadtrainError) else 4,
        "traceback": "".join(traceback.format_exception(error)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record, indent=1) + "\n")
