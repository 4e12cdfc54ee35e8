"""A preparation whose parts cost nothing and do as they are told, for tests that kill it.

    python -m tests.data.cheap_job OUT NUM_PARTS WORKERS TIME_LIMIT [I/N]

Each part that is begun leaves a line (its number and the worker's process id) in OUT.log. `trouble` in `OUT.trouble` (JSON: number ->
word) says which parts misbehave, and how.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cadtrain.cad.codec import get_codec
from cadtrain.data.splits import split_documents
from cadtrain.data.writing.columns import Row
from cadtrain.data.writing.duplicates import Duplicates
from cadtrain.data.writing.pipeline import (
    Built,
    Dropped,
    Job,
    Progress,
    ShardSummary,
    Summary,
    Workers,
    no_progress,
    run,
    run_shard,
)
from cadtrain.data.writing.share import Shard
from cadtrain.data.writing.writer import LedgerEntry, Plan


@dataclass(frozen=True)
class CheapTask:
    """One part; `seconds` is how long it takes."""

    number: int
    out: str
    seconds: float = 0.0

    @property
    def id(self) -> str:
        """Its document too."""
        return f"doc/{self.number:08d}"

    document = id

    @property
    def file(self) -> str:
        """The ledger's name for it."""
        return f"{self.number}.json"


def build_cheap(task: CheapTask) -> Built | Dropped:
    """The row, or the trouble."""
    with Path(f"{task.out}.log").open("a") as log:
        log.write(f"{task.number} {os.getpid()}\n")
    trouble = Path(f"{task.out}.trouble")
    word = json.loads(trouble.read_text()).get(str(task.number)) if trouble.is_file() else None
    match word:
        case "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(3600)
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "die once":
            marker = Path(f"{task.out}.died")
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGSEGV)
        case "bad":
            return Dropped("schema", "no sequence")
    time.sleep(task.seconds)
    points = np.random.default_rng(task.number).normal(size=(64, 6)).astype(np.float32)
    row = Row(
        id=task.id, document=task.id, caption=f"part {task.number}", caption_source="file", sequence=f"S{task.number}.",
        num_steps=1, points=points, images=(bytes(task.number % 7),),
    )  # fmt: skip
    return Built(row)


def cheap_job(
    out: Path, count: int, workers: int = 1, time_limit: float = 20.0, *, seconds: float = 0.0, **settings: object
) -> Job[CheapTask]:
    """The preparation of `count` parts."""
    tasks = [CheapTask(number, str(out), seconds) for number in range(count)]
    splits = split_documents(task.document for task in tasks)
    plan = Plan(
        source="cheap", seed=0, codec=get_codec("compact"), num_points=64, num_views=1, image_size=8,
        settings={"count": count, **settings}, duplicates=Duplicates.OUT_OF_TEST,
    )  # fmt: skip
    split_of: Callable[[CheapTask], str] = lambda task: splits[task.document]  # noqa: E731
    skipped = [LedgerEntry("", "txt/0.json", "bad_caption_file", "no JSON", dropped=False)]
    return Job(plan, tasks, build_cheap, split_of, Workers(workers, time_limit), skipped=skipped, preload=())


def make(
    out: Path, job: Job[CheapTask], shard: str | None = None, progress: Progress = no_progress
) -> Summary | ShardSummary:
    """Run it, or a shard of it."""
    if shard is None:
        return run(job, out, progress=progress)
    return run_shard(job, out, Shard.parse(shard), progress=progress)


def files_of(dataset: Path) -> dict[str, bytes]:
    """Everything in a dataset but what its parts took, which is never the same twice."""
    return {
        path.relative_to(dataset).as_posix(): path.read_bytes()
        for path in dataset.rglob("*")
        if path.is_file() and path.name != "costs.parquet"
    }


if __name__ == "__main__":
    where, number_of, processes, limit, *share = sys.argv[1:]
    make(Path(where), cheap_job(Path(where), int(number_of), int(processes), float(limit), seconds=0.01), *share)
