"""A sign of life of every rank: a small file in the run's logs that says where the rank stands.

A rank writes it at each phase, step and micro-step, and at each module that its model enters; `launch` reads it to see that
a run no longer moves and which rank lags. Writing is one system call of a few microseconds and asks no other rank.
"""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

RECORD_BYTES = 256
MODULE_BYTES = 128
STEPPING = "training"
"""The phase whose length is known from the steps before; every other one may take long."""
WARM_UP_STEPS = 2
"""First steps of a process, which compile and allocate: their length says nothing about later ones."""


@dataclass(frozen=True, slots=True)
class Beat:
    """Where a rank stood when it last gave a sign."""

    rank: int
    marks: int
    """Phases, steps and micro-steps so far: all ranks pass the same ones, so a rank with fewer lags."""
    phase: str
    step: int
    micro_step: int
    longest_step_seconds: float
    """Longest step after the warm-up; 0 before its end."""
    time: float
    """When it was written, in epoch seconds."""
    module: str
    """The module of the model that was entered last."""

    def where(self) -> str:
        """`training, step 12, micro-step 2, in language.layers.3`."""
        parts = [self.phase]
        if self.phase == STEPPING:
            parts += [f"step {self.step}", f"micro-step {self.micro_step}"]
        if self.module:
            parts.append(f"last in {self.module}")
        return ", ".join(parts)


def heartbeat_path(logs: Path, rank: int) -> Path:
    """`logs/rank_00.heartbeat`."""
    return logs / f"rank_{rank:02d}.heartbeat"


class Heartbeat:
    """Writes one rank's signs of life; all methods are called from the thread that trains. Never raises: a disk that
    refuses the file ends the signs, not the run."""

    def __init__(self, path: Path | None, rank: int = 0) -> None:
        """`path` is None for a heartbeat that nobody reads."""
        self._rank = rank
        self._file = -1
        self._marks = self._step = self._micro_step = self._steps_here = 0
        self._longest = 0.0
        self._step_began = 0.0
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        except OSError as error:
            log.warning("no heartbeat: %s", error)

    def phase(self, name: str) -> None:
        """A new phase begins, e.g. `loading the model`."""
        self._module(b"")
        self._mark(name)

    def begin_micro_step(self, step: int, number: int) -> None:
        """Micro-step `number` of step `step` begins, both counted from 1."""
        if number == 1:
            self._step_began = time.monotonic()
        self._step, self._micro_step = step, number
        self._mark(STEPPING)

    def end_step(self) -> None:
        """The weights are updated."""
        self._steps_here += 1
        if self._steps_here > WARM_UP_STEPS:
            self._longest = max(self._longest, time.monotonic() - self._step_began)
        self._mark(STEPPING)

    def enter(self, module: bytes) -> None:
        """The model enters a module; the name is padded by `module_label`."""
        self._module(module)

    def close(self) -> None:
        """Give the file back."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _mark(self, phase: str) -> None:
        self._marks += 1
        if self._file < 0:
            return
        record = {
            "rank": self._rank, "marks": self._marks, "phase": phase, "step": self._step, "micro_step": self._micro_step,
            "longest": round(self._longest, 3), "time": round(time.time(), 3),
        }  # fmt: skip
        self._write(json.dumps(record).encode()[:RECORD_BYTES].ljust(RECORD_BYTES), 0)

    def _module(self, label: bytes) -> None:
        if self._file >= 0:
            self._write(label.ljust(MODULE_BYTES), RECORD_BYTES)

    def _write(self, data: bytes, offset: int) -> None:
        try:
            os.pwrite(self._file, data, offset)
        except OSError as error:
            log.warning("no more heartbeats: %s", error)
            self.close()


def module_label(name: str) -> bytes:
    """A module's name as `Heartbeat.enter` takes it."""
    return name.encode()[-MODULE_BYTES:].ljust(MODULE_BYTES)


def read_beat(path: Path) -> Beat | None:
    """The last sign in `path`, or None where there is none yet or it is torn."""
    try:
        raw = path.read_bytes()
        record = json.loads(raw[:RECORD_BYTES])
        return Beat(
            rank=int(record["rank"]),
            marks=int(record["marks"]),
            phase=str(record["phase"]),
            step=int(record["step"]),
            micro_step=int(record["micro_step"]),
            longest_step_seconds=float(record["longest"]),
            time=float(record["time"]),
            module=raw[RECORD_BYTES:].decode(errors="replace").strip(" \0"),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
