"""The way from a list of inputs to a prepared dataset: kernel workers in, rows and ledger entries out, progress told."""

from __future__ import annotations

import shutil
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from cadtrain.data.manifest import Manifest
from cadtrain.data.writing import writer as writer_module
from cadtrain.data.writing.blocks import ChunkWriter, Cost
from cadtrain.data.writing.columns import Row
from cadtrain.data.writing.costs import CostSummary, summarize_costs
from cadtrain.data.writing.progress import PrepareProgress, Progress, Tally, no_progress
from cadtrain.data.writing.share import WHOLE, Shard
from cadtrain.data.writing.target import Leftover, leftovers, resolve_target
from cadtrain.data.writing.writer import DatasetWriter, LedgerEntry, Plan, finished_dataset
from cadtrain.errors import EnvironmentFault, UsageError
from cadtrain.geometry.sandbox import KERNEL_MODULE, KernelPool, Outcome
from cadtrain.units import format_bytes

__all__ = [
    "CAMERA_ORDER", "Built", "Dropped", "Job", "Note", "PrepareProgress", "Progress", "Result", "ShardSummary", "Summary", "Task",
    "Workers", "no_progress", "run", "run_shard", "writing",
]  # fmt: skip

CAMERA_ORDER = (0, 6, 3, 5, 2, 4, 1, 7)
"""Which of the eight cameras are used first: the first two look from opposite corners and so see every side of a part."""

_CRASH_RETRIES = 1
"""A part whose worker died is tried once more: the worker may have been killed from outside."""
_RECYCLE_MIB = 1024.0
"""A worker that holds more than this after a part is replaced: what the kernel's heap has taken it keeps."""


@dataclass(frozen=True, slots=True)
class Note:
    """Something wrong with an input that the part was made in spite of: `file`, `kind` to count it under, `reason`."""

    file: str
    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class Built:
    """What a worker gives back for one input, or for one of the states on the way to it."""

    row: Row
    notes: tuple[Note, ...] = ()
    is_whole: bool = True
    """False for a state on the way to a design."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """What a worker gives back for an input of which no part can be made: `kind` to count it under, `reason`."""

    kind: str
    reason: str
    file: str | None = None
    id: str | None = None
    """Set where it is not the task's own."""


Result = Built | Dropped


class Task(Protocol):
    """One input: the part's id, its document, and the file by which the ledger names it."""

    @property
    def id(self) -> str:
        """The part's id."""

    @property
    def document(self) -> str:
        """The document that decides its split."""

    @property
    def file(self) -> str:
        """The input's name in the ledger."""


T = TypeVar("T", bound=Task)


@dataclass(frozen=True, slots=True)
class Summary:
    """What a preparation did. `is_reused` says that the dataset was there already."""

    out: Path
    manifest: Manifest
    seconds: float = 0.0
    inputs: int = 0
    resumed: int = 0
    notes: dict[str, int] = field(init=False)
    """The manifest's: faults by kind, of all runs that made the dataset, that cost no part."""
    is_reused: bool = False
    costs: CostSummary | None = None
    was_compared: bool = True
    """False where `merge` found a dataset and nothing to merge: nobody said what it should have been made from."""
    leftovers: tuple[Leftover, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "notes", self.manifest.notes)

    @property
    def written(self) -> int:
        """Parts in the dataset."""
        return sum(self.manifest.counts.values())

    @property
    def parts_per_second(self) -> float:
        """Inputs worked through a second in this run."""
        return (self.inputs - self.resumed) / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class ShardSummary:
    """What one process of an array job did: `inputs` is the share's, `written` counts rows, `failures` dropped inputs by kind.

    `blocks_left` are those of the whole dataset that no process has finished yet; with none left it can be merged.
    """

    out: Path
    shard: Shard
    seconds: float
    inputs: int
    resumed: int
    written: int
    failures: dict[str, int]
    notes: dict[str, int]
    blocks_left: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Workers:
    """How the kernel work is run: processes, and the seconds after which one part is given up."""

    count: int
    time_limit_seconds: float

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"{self.count} workers.", where="--workers", hint="Use 1 or more.")
        if not self.time_limit_seconds > 0:
            raise UsageError(
                f"a time limit of {self.time_limit_seconds:g} s.", where="--time-limit", hint="Use more than 0."
            )


@dataclass(frozen=True)
class Job(Generic[T]):
    """A preparation to run: `build` (a module-level function) makes one part, or several; `split_of` names a task's split.

    `tasks` may make its items when they are asked for, so that a long list of them takes no memory.
    """

    plan: Plan
    tasks: Sequence[T]
    build: Callable[[T], Result | list[Result]]
    split_of: Callable[[T], str]
    workers: Workers
    skipped: Iterable[LedgerEntry] = ()
    """Inputs that were left out before any work; they go into the ledger."""
    preload: tuple[str, ...] = (KERNEL_MODULE,)
    """Modules that a worker loads before the clock of its first part starts."""


def run(job: Job[T], out: Path, *, overwrite: bool = False, progress: Progress = no_progress) -> Summary:
    """Make the dataset `out`, going on where an interrupted run of the same plan stopped, in whatever shards that was.

    A finished dataset of the same plan is left as it is. Raises `UsageError` where something else is in the way, `DataError`
    when no part at all was usable, `EnvironmentFault` where the disk is too small or cannot be written.
    """
    target = resolve_target(out)
    if not overwrite and (manifest := finished_dataset(target, job.plan)) is not None:
        return Summary(out, manifest, inputs=len(job.tasks), is_reused=True, leftovers=leftovers(target))
    with writing(target):
        start = time.monotonic()
        with _writer(job, target, WHOLE, overwrite) as writer:
            tally = Tally(len(job.tasks), progress)
            if not writer.is_finished:
                _work(job, writer, tally)
            manifest = writer.finish()
        seconds = time.monotonic() - start
        costs = summarize_costs(target)
        return Summary(
            out,
            manifest,
            seconds,
            len(job.tasks),
            tally.resumed,
            costs=costs,
            leftovers=leftovers(target),
        )


def run_shard(
    job: Job[T], out: Path, shard: Shard, *, overwrite: bool = False, progress: Progress = no_progress
) -> ShardSummary | Summary:
    """Do one share of the dataset `out`, going on where an interrupted run of that share stopped; `merge` makes one of all.

    Blocks of inputs are dealt out in turn, so that every share sees the whole range. Returns a `Summary` where the dataset is
    there already. Raises as `run` does, but not for a share without any usable part.
    """
    target = resolve_target(out)
    if not overwrite and (manifest := finished_dataset(target, job.plan)) is not None:
        return Summary(out, manifest, inputs=len(job.tasks), is_reused=True, leftovers=leftovers(target))
    with writing(target):
        start = time.monotonic()
        with _writer(job, target, shard, overwrite) as writer:
            inputs = sum(_chunk_size(number, len(job.tasks)) for number in writer.own_chunks())
            tally = Tally(inputs, progress)
            if not writer.is_finished:
                _work(job, writer, tally)
            left = len(writer.missing_blocks)
        seconds = time.monotonic() - start
        return ShardSummary(
            out, shard, seconds, inputs, tally.resumed, tally.written, dict(tally.failures), dict(tally.notes), left,
            writer.num_blocks,
        )  # fmt: skip


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turns what goes wrong while `out` is written into an `EnvironmentFault` that says how to go on."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise EnvironmentFault(
            f"cannot be written: {error.strerror or error}.",
            where=str(out),
            hint="Mend that and start the same command again: it goes on where it stopped.",
        ) from error


def _writer(job: Job[T], out: Path, shard: Shard, overwrite: bool) -> DatasetWriter:
    num_chunks = -(-len(job.tasks) // writer_module.CHUNK_ITEMS)
    return DatasetWriter(out, job.plan, num_chunks, shard=shard, overwrite=overwrite)


def _chunk_size(number: int, total: int) -> int:
    size = writer_module.CHUNK_ITEMS
    return min(size, total - number * size)


def _work(job: Job[T], writer: DatasetWriter, tally: Tally) -> None:
    """Write all chunks that this process's share still lacks."""
    writer.begin(len(job.tasks), job.skipped)
    counts = writer.resume()
    todo = writer.missing_chunks
    left = sum(_chunk_size(number, len(job.tasks)) for number in todo)
    tally.resume(tally.total - left, counts)
    _check_space(writer.folder, job.plan, left)
    tally.tell()
    if not todo:
        return
    workers = job.workers
    with KernelPool(
        workers.count,
        workers.time_limit_seconds,
        preload=job.preload,
        crash_retries=_CRASH_RETRIES,
        recycle_mib=_RECYCLE_MIB,
    ) as pool:
        _write_chunks(job, pool, todo, writer, tally)


def _check_space(folder: Path, plan: Plan, num_parts: int) -> None:
    needed, free = num_parts * plan.bytes_per_part, shutil.disk_usage(folder).free
    if needed > free:
        raise EnvironmentFault(
            f"{num_parts} parts need about {format_bytes(needed)} and {format_bytes(free)} are free.",
            where=str(folder.parent),
            hint="Write to another disk, or store less of each part: --num-points, --views, --image-size, --limit.",
        )


def _write_chunks(job: Job[T], pool: KernelPool, todo: Sequence[int], writer: DatasetWriter, tally: Tally) -> None:
    """Build the parts of these chunks; each chunk is written when its last part is there.

    Outcomes come as they are ready: a part that takes a minute holds up its own chunk and no other, so that at most as many chunks
    wait in memory as there are workers, and one more.
    """
    size, total = writer_module.CHUNK_ITEMS, len(job.tasks)
    order = array("Q", (k for number in todo for k in range(number * size, number * size + _chunk_size(number, total))))
    waiting: dict[int, dict[int, Outcome[Result | list[Result]]]] = {}
    for outcome in pool.map_unordered(job.build, (job.tasks[k] for k in order)):
        k = order[outcome.index]
        tally.take(*_told(outcome))
        number = k // size
        there = waiting.setdefault(number, {})
        there[k] = outcome
        if len(there) == _chunk_size(number, total):
            with writer.chunk(number) as chunk:
                for index in sorted(there):
                    _take(job, job.tasks[index], there[index], chunk)
            del waiting[number]


def _results(outcome: Outcome[Result | list[Result]]) -> list[Result]:
    if (failure := outcome.failure) is not None:
        # A worker that was stopped or died, or an exception that nobody foresaw: then the traceback goes into the ledger too.
        return [Dropped(failure.kind, "\n".join(filter(None, (failure.reason, failure.detail))))]
    value = outcome.value
    assert value is not None, "an outcome without a failure has a value"
    return value if isinstance(value, list) else [value]


def _told(outcome: Outcome[Result | list[Result]]) -> tuple[int, list[str], list[str]]:
    """Rows, kinds of what was dropped, and kinds of notes."""
    results = _results(outcome)
    built = [result for result in results if isinstance(result, Built)]
    dropped = [result.kind for result in results if isinstance(result, Dropped)]
    return len(built), dropped, [note.kind for result in built for note in result.notes]


def _take(job: Job[T], task: T, outcome: Outcome[Result | list[Result]], chunk: ChunkWriter) -> None:
    kind: str | None = None
    for result in _results(outcome):
        if isinstance(result, Dropped):
            part, file = result.id or task.id, result.file or task.file
            chunk.note(asdict(LedgerEntry(part, file, result.kind, result.reason, dropped=True)))
            kind = kind or result.kind
            continue
        for note in result.notes:
            chunk.note(asdict(LedgerEntry(result.row.id, note.file, note.kind, note.reason, dropped=False)))
        chunk.add(result.row, job.split_of(task), file=task.file, is_whole=result.is_whole)
    chunk.cost(Cost(task.id, kind, outcome.seconds, outcome.peak_mib))
