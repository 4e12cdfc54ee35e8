"""Work in processes that may be killed: for code that can hang or crash and cannot be interrupted.

The kernel does not look at signals while it computes, so that a time limit inside a process comes seconds or minutes
late. Here every item runs in a worker process that is killed when its time is up; a worker that dies costs its own item
and is replaced.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any, Generic, TypeVar

from cadtrain.errors import CadtrainError, EnvironmentFault
from cadtrain.geometry.worker import Begun, Ready, Reply, memory_mib, serve

T = TypeVar("T")
R = TypeVar("R")

KERNEL_MODULE = "cadtrain.geometry.kernel"
_START_LIMIT_SECONDS = 120.0
"""How long a worker may take to start and load the kernel: a second as a rule, far more on a busy network disk."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an item has no value.

    `kind` is what failures are counted by: `time_limit`, `crashed` (the worker died), `schema`, `grammar`, `data`,
    `geometry`, or `error` (any other exception: a fault of the function, `detail` holds its traceback).
    """

    kind: str
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Outcome(Generic[R]):
    """What became of the item at `index`: a value or a failure, and what it cost.

    `peak_mib` is the worker's largest resident memory meanwhile, the loaded kernel included; None where it is not known, as for
    a worker that died.
    """

    index: int
    value: R | None
    failure: Failure | None
    seconds: float = 0.0
    peak_mib: float | None = None

    @property
    def is_ok(self) -> bool:
        """Whether there is a value."""
        return self.failure is None


@dataclass(slots=True)
class _Item:
    """An item under way."""

    index: int
    item: Any
    crashes: int = 0


class _Worker:
    """The parent's side of one worker process."""

    def __init__(self, context: Any, preload: tuple[str, ...]) -> None:
        self.connection, child = context.Pipe()
        self.process = context.Process(target=serve, args=(child, os.getpid(), preload), daemon=True)
        # A worker ignores Ctrl-C, which goes to the whole group; held back here, it cannot hit one that still loads Python.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        child.close()  # so that the worker's death ends the connection
        self.is_ready = False
        self.has_begun = False
        self.work: _Item | None = None
        self.begin = time.monotonic()
        self.deadline = self.begin + _START_LIMIT_SECONDS

    def give(self, work: _Item, function: Callable[[Any], Any], limit_seconds: float) -> None:
        self.work = work
        # The first item brings the function, and with it whatever that imports; its own clock starts at `Begun`.
        self.start_clock(limit_seconds if self.has_begun else _START_LIMIT_SECONDS)
        self.connection.send((function, work.item))

    def start_clock(self, limit_seconds: float) -> None:
        self.begin = time.monotonic()
        self.deadline = self.begin + limit_seconds

    def kill(self) -> None:
        self.process.kill()  # SIGKILL: the kernel cannot be asked, and a SIGTERM may be ignored
        self.process.join()
        self.connection.close()
        self.process.close()


class KernelPool:
    """`workers` processes, each of which spends at most `time_limit_seconds` on an item.

        with KernelPool(workers=2, time_limit_seconds=30) as pool:
            for outcome in pool.map(make, requests):
                ...

    Workers start afresh (`spawn`), so that a script that makes a pool needs the `if __name__ == "__main__":` guard, and
    functions and items must be picklable. They run on one thread each, load `preload` before their first clock starts,
    ignore Ctrl-C (the parent ends them) and die with their parent, killed or not.

    An item whose worker dies is tried again `crash_retries` times: a worker may also be killed from outside, as by a system
    that is out of memory. A worker that holds more than `recycle_mib` after an item is replaced.
    """

    def __init__(
        self,
        workers: int,
        time_limit_seconds: float,
        *,
        preload: tuple[str, ...] = (KERNEL_MODULE,),
        crash_retries: int = 0,
        recycle_mib: float | None = None,
    ) -> None:
        if workers < 1 or not time_limit_seconds > 0:
            raise ValueError(f"a pool needs workers and time, not {workers} and {time_limit_seconds} s")
        self.num_workers = workers
        self.time_limit_seconds = time_limit_seconds
        self._preload = preload
        self._crash_retries = crash_retries
        self._recycle_mib = recycle_mib
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []
        self._again: deque[_Item] = deque()

    def __enter__(self) -> KernelPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all workers at once; the pool can be used again and then starts new ones."""
        while self._workers:
            self._workers.pop().kill()

    def map(self, function: Callable[[T], R], items: Iterable[T], *, window: int | None = None) -> Iterator[Outcome[R]]:
        """The items' outcomes in the items' order, one for each.

        At most `window` items (4 per worker by default) are taken from `items` ahead of the outcome that is due, which
        bounds memory however slow one of them is. Raises `EnvironmentFault` where workers cannot load the kernel or a
        function says that the machine lacks something. One `map` at a time.
        """
        ahead = max(window or 4 * self.num_workers, 1)
        done: dict[int, Outcome[R]] = {}
        due = 0

        def has_room(taken: int) -> bool:
            return taken - due < ahead

        for outcome in self._run(function, items, has_room):
            done[outcome.index] = outcome
            while due in done:
                yield done.pop(due)
                due += 1

    def map_unordered(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[Outcome[R]]:
        """As `map`, but each outcome as soon as it is there: a slow item holds up no other, and none is kept waiting."""
        return self._run(function, items, lambda taken: True)

    # -------------------------------------------------------------------------------------------- internals

    def _run(
        self, function: Callable[[T], R], items: Iterable[T], may_take: Callable[[int], bool]
    ) -> Iterator[Outcome[R]]:
        source = iter(items)
        news: deque[Outcome[R]] = deque()
        taken = told = 0
        exhausted = False
        self._again.clear()
        try:
            while True:
                # Workers get their next item before the outcome at hand is told, so that they work while it is dealt with.
                while (self._again or (not exhausted and may_take(taken))) and (
                    worker := self._idle_worker()
                ) is not None:
                    if self._again:
                        work = self._again.popleft()
                    else:
                        try:
                            work = _Item(taken, next(source))
                        except StopIteration:
                            exhausted = True
                            continue
                        taken += 1
                    news.extend(self._give(worker, function, work))
                if news:
                    told += 1
                    yield news.popleft()
                elif exhausted and told == taken:
                    return
                else:
                    news.extend(self._collect())
        finally:
            # An abandoned map leaves items running; their workers cannot be told to stop.
            for worker in [w for w in self._workers if w.work is not None]:
                self._discard(worker)

    def _idle_worker(self) -> _Worker | None:
        for worker in self._workers:
            if worker.is_ready and worker.work is None:
                return worker
        if len(self._workers) < self.num_workers:
            self._workers.append(_Worker(self._context, self._preload))
        return None

    def _give(self, worker: _Worker, function: Callable[[T], R], work: _Item) -> Iterator[Outcome[R]]:
        try:
            worker.give(work, function, self.time_limit_seconds)
        except (BrokenPipeError, ConnectionResetError):
            # It died idle, between two items; the item was not to blame, but it is the one that has no worker.
            yield from self._crashed(worker, work)

    def _collect(self) -> Iterator[Outcome[Any]]:
        """Wait until a worker has news or is out of time, and say what became of the items concerned."""
        now = time.monotonic()
        busy = [worker for worker in self._workers if worker.work is not None or not worker.is_ready]
        timeout = max(0.0, min(worker.deadline for worker in busy) - now)
        news = set(wait([worker.connection for worker in busy], timeout))
        for worker in busy:
            if worker.connection in news:
                yield from self._heard(worker)
            elif time.monotonic() >= worker.deadline:
                yield from self._out_of_time(worker)

    def _heard(self, worker: _Worker) -> Iterator[Outcome[Any]]:
        work = worker.work
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):  # OSError: it died in the middle of its answer
            if work is None:
                raise EnvironmentFault(f"a kernel worker died while it started: {self._buried(worker)}.") from None
            yield from self._crashed(worker, work)
            return
        if isinstance(message, Ready):
            if message.error is not None:
                raise message.error
            worker.is_ready = True
        elif isinstance(message, Begun):
            worker.has_begun = True
            worker.start_clock(self.time_limit_seconds)
        elif isinstance(message, Reply) and work is not None:
            worker.work = None
            if self._recycle_mib is not None and (message.rss_mib or 0.0) > self._recycle_mib:
                self._discard(worker)
            yield _outcome(work.index, message)

    def _out_of_time(self, worker: _Worker) -> Iterator[Outcome[Any]]:
        work, seconds = worker.work, time.monotonic() - worker.begin
        peak, _ = memory_mib(worker.process.pid or 0)
        self._discard(worker)
        if work is None:
            raise EnvironmentFault(f"a kernel worker did not start within {_START_LIMIT_SECONDS:.0f} s.")
        limit = self.time_limit_seconds if worker.has_begun else _START_LIMIT_SECONDS
        failure = Failure("time_limit", f"not done after {limit:g} s")
        yield Outcome(work.index, None, failure, seconds, peak)

    def _crashed(self, worker: _Worker, work: _Item) -> Iterator[Outcome[Any]]:
        seconds = time.monotonic() - worker.begin
        how = self._buried(worker)
        work.crashes += 1
        if work.crashes <= self._crash_retries:
            self._again.append(work)
            return
        times = f", {work.crashes} times" if work.crashes > 1 else ""
        yield Outcome(work.index, None, Failure("crashed", f"the worker process ended with {how}{times}"), seconds)

    def _buried(self, worker: _Worker) -> str:
        worker.process.join(timeout=10)
        code = worker.process.exitcode
        self._discard(worker)
        return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"

    def _discard(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.kill()


def _outcome(index: int, reply: Reply) -> Outcome[Any]:
    if isinstance(reply.error, EnvironmentFault):
        raise reply.error
    if reply.kind is None:
        return Outcome(index, reply.value, None, reply.seconds, reply.peak_mib)
    reason = str(reply.error) if isinstance(reply.error, CadtrainError) else reply.reason
    return Outcome(index, None, Failure(reply.kind, reason, reply.detail), reply.seconds, reply.peak_mib)
