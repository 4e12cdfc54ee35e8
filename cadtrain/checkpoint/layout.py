"""Names inside a run folder.

run/config.yaml  environment.json  metrics.jsonl  logs/  tensorboard/
    checkpoints/latest                     the newest whole checkpoint's name, replaced atomically
    checkpoints/scores.json                validation losses by step, for `keep_best`
    checkpoints/step-00001200/             manifest.json  state.json  config.yaml  engine/
    checkpoints/frozen-0123456789abcdef/   weights that do not learn, written once for all checkpoints
    checkpoints/step-00001300.tmp/         a save under way, or what is being removed
"""

from __future__ import annotations

import os
import re
from pathlib import Path

CHECKPOINTS = "checkpoints"
LATEST = "latest"
SCORES = "scores.json"
MANIFEST = "manifest.json"
STATE = "state.json"
CONFIG = "config.yaml"
ENGINE = "engine"
UNFINISHED = ".tmp"

_NAME = re.compile(r"step-(\d{8,})")
_FROZEN_NAME = re.compile(r"frozen-[0-9a-f]{16}")


def checkpoint_name(step: int) -> str:
    """`1200` -> `step-00001200`."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """`step-00001200` -> 1200; None for any other name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def frozen_name(digest: str) -> str:
    """The folder of frozen weights whose content has the hexadecimal `digest`."""
    return f"frozen-{digest[:16]}"


def is_frozen_name(name: str) -> bool:
    """Whether `name` is one that `frozen_name` gives: one folder beside the checkpoints, and no way out of them."""
    return _FROZEN_NAME.fullmatch(name) is not None


def list_steps(root: Path) -> list[int]:
    """Steps of the finished checkpoints in `root`, ascending."""
    if not root.is_dir():
        return []
    steps = (step_of(entry.name) for entry in root.iterdir() if entry.is_dir())
    return sorted(step for step in steps if step is not None)


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text` so that a reader sees the old or the new content, and never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` last: a file that is flushed can still lose its name in a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
