"""Look after DeepSpeed's launcher and the ranks it starts, from start to the last process.

The launcher alone would stop ranks one after another, 30 s each; survive its parent; and fold exit codes. Here
it runs in a session of its own, signals go to all ranks at once, and nothing it started outlives the supervisor:
what is left at the end is killed, and `guard.py` does the same when the supervisor itself is killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from cadtrain.launch import guard
from cadtrain.launch.failure import RankExit, RankFailure, first_failure, launcher_killed, read_failures, with_place
from cadtrain.launch.hang import HangLimit, HangWatch, ask_for_stacks
from cadtrain.launch.reasons import HANG, Explanation

POLL_SECONDS = 0.1
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@dataclass(frozen=True, slots=True)
class GracePeriods:
    """Time limits in seconds before what is left is killed."""

    stop: float = 900.0
    """After a signal: the ranks finish a step and write a checkpoint, which for a large model takes minutes."""
    failure: float = 15.0
    """After the first rank failed: the others wait in a collective for it and have nothing to save."""


@dataclass(frozen=True, slots=True)
class LaunchOutcome:
    """How a launch ended. `signal_number` is the signal that asked it to stop, if one did."""

    exit_code: int
    failure: RankFailure | None
    signal_number: int | None
    seconds: float
    pids: tuple[int, ...] = ()
    """Process ids of the ranks that were found."""
    explanation: Explanation | None = None
    """The failure in plain words; `start` adds it."""
    num_restarts: int = 0
    """Starts after the first one."""


def supervise(
    argv: Sequence[str],
    environment: Mapping[str, str],
    logs: Path,
    num_ranks: int,
    *,
    first_rank: int = 0,
    grace: GracePeriods = GracePeriods(),
    hang: HangLimit = HangLimit(),
    announce: Callable[[str], None] = lambda text: None,
    stdout: int | None = None,
) -> LaunchOutcome:
    """Run the launcher `argv` of ranks `first_rank` and following with `environment` until every process it started has ended.

    Must be called from the main thread: it takes SIGINT, SIGTERM, SIGHUP and SIGUSR1 for as long as it runs. A first signal is
    passed to all ranks, a second kills them. Where no rank moves for longer than `hang` allows, all write their stacks and are
    killed. `announce` gets lines for people. `stdout` redirects the ranks' output.
    """
    return _Supervisor(argv, environment, logs, num_ranks, first_rank, grace, hang, announce, stdout).run()


class _Supervisor:
    def __init__(
        self, argv: Sequence[str], environment: Mapping[str, str], logs: Path, num_ranks: int, first_rank: int,
        grace: GracePeriods, hang: HangLimit, announce: Callable[[str], None], stdout: int | None,
    ) -> None:  # fmt: skip
        self.argv, self.logs, self.num_ranks, self.first_rank = list(argv), logs, num_ranks, first_rank
        self.grace, self.announce, self.stdout = grace, announce, stdout
        self.mark = uuid.uuid4().hex
        self.environment = {**environment, guard.MARK_VARIABLE: self.mark}
        self.received: list[int] = []
        self.passed_to: set[int] = set()
        self.ranks: dict[int, psutil.Process] = {}  # by rank
        self.exit_events = _ExitEvents()
        self.exits: list[RankExit] = []
        self.deadline: float | None = None
        self.failed = False
        self.hang_watch = HangWatch(logs, hang)
        self.own_failure: RankFailure | None = None  # one that the ranks cannot tell of

    def run(self) -> LaunchOutcome:
        start = time.monotonic()
        previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            with self._guarded() as write:
                launcher = subprocess.Popen(
                    self.argv, env=self.environment, stdout=self.stdout, stdin=subprocess.DEVNULL, start_new_session=True,
                    preexec_fn=_ignore_usr1,
                )  # fmt: skip
                write(f"{launcher.pid}\n")
                try:
                    self._watch(launcher.pid)
                finally:
                    # The launcher is not reaped yet, so its process group's id cannot belong to anyone else.
                    self.exit_events.close()
                    guard.kill_marked(launcher.pid, self.mark)
                    status = launcher.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self._outcome(status, time.monotonic() - start)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[Callable[[str], None]]:
        """Run the guard beside the block; gives a function that writes to it."""
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, self.mark],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True, text=True,
        )  # fmt: skip
        pipe = process.stdin
        assert pipe is not None

        def write(text: str) -> None:
            with contextlib.suppress(BrokenPipeError):
                pipe.write(text)
                pipe.flush()

        try:
            yield write
        finally:
            write("done\n")
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
            process.wait()

    def _watch(self, launcher: int) -> None:
        """Until the launcher has ended or a grace period is over."""
        while (status := _status_of(launcher)) is None:
            self._find_ranks(launcher)
            self._note_exits()
            self._handle_signals()
            if not self.failed and self._has_failed():
                self.failed = True
                self._allow(self.grace.failure)
            if self.deadline is not None and time.monotonic() >= self.deadline:
                if alive := self._alive():
                    self.announce(f"{count_of(len(alive), 'rank')} did not leave and must be killed.")
                return
            if not self.failed and not self.received and self.hang_watch.is_hung(self.ranks):
                self._note_hang()
                return
            self.exit_events.wait(POLL_SECONDS if len(self.ranks) == self.num_ranks else POLL_SECONDS / 5)
        self._note_exits()
        # A rank that is killed makes the launcher exit with a code; it is killed itself only from outside.
        if status < 0 and not self.received:
            self.own_failure = launcher_killed(-status)

    def _note_hang(self) -> None:
        """Let the ranks say where they stand, and make that the failure."""
        self.announce("No rank moves any more: their stacks are written, then they are killed.")
        ask_for_stacks(self.logs, self.ranks)
        rank, text = self.hang_watch.describe()
        self.own_failure = with_place(self.logs, RankFailure(rank, HANG, text, 4))

    def _allow(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self.deadline = end if self.deadline is None else min(self.deadline, end)

    def _find_ranks(self, launcher: int) -> None:
        if len(self.ranks) == self.num_ranks:
            return
        with contextlib.suppress(psutil.Error):
            children = sorted(psutil.Process(launcher).children(), key=lambda child: (child.create_time(), child.pid))
            known = {rank: child for child in children if (rank := _rank_of(child)) is not None}
            if len(known) < len(children) == self.num_ranks:
                # One that ended at once shows no environment any more; the launcher starts ranks in order.
                known = {self.first_rank + number: child for number, child in enumerate(children)}
            for rank, child in known.items():
                if rank not in self.ranks:
                    self.ranks[rank] = child
                    self.exit_events.add(child.pid)

    def _note_exits(self) -> None:
        """Record ranks that ended. A status is read while the launcher, which looks once a second, has not collected it."""
        seen = {item.rank for item in self.exits}
        for rank, process in self.ranks.items():
            if rank in seen:
                continue
            status = _zombie_status(process.pid)
            if status is not None or not process.is_running():
                self.exits.append(RankExit(rank, status, time.time()))

    def _has_failed(self) -> bool:
        # A rank whose status was missed counts once the launcher, which ends after the first failure, stops the others.
        return any(item.status for item in self.exits) or (not self.received and bool(read_failures(self.logs)))

    def _alive(self) -> list[psutil.Process]:
        return [
            process for process in self.ranks.values() if _zombie_status(process.pid) is None and process.is_running()
        ]

    def _handle_signals(self) -> None:
        """Pass a first signal to all ranks at once; a second ends the grace period."""
        if not self.received:
            return
        if len(self.received) > 1:
            self.deadline = time.monotonic()
            return
        number = self.received[0]
        alive = self._alive()
        if not self.passed_to:
            name = signal.Signals(number).name
            if not alive:
                self.announce(f"{name}: stopped before the ranks had started.")
                self.deadline = time.monotonic()
                return
            self.announce(f"{name}: asking {count_of(self.num_ranks, 'rank')} to save and leave. Once more kills them.")
            self._allow(self.grace.stop)
        passed = signal.SIGTERM if number == signal.SIGHUP else signal.Signals(number)
        for process in alive:
            if process.pid not in self.passed_to:
                self.passed_to.add(process.pid)
                with contextlib.suppress(psutil.Error):
                    process.send_signal(passed)

    def _outcome(self, status: int, seconds: float) -> LaunchOutcome:
        outcome = self._judge(status, seconds)
        return dataclasses.replace(outcome, pids=tuple(process.pid for process in self.ranks.values()))

    def _judge(self, status: int, seconds: float) -> LaunchOutcome:
        number = self.received[0] if self.received else None
        if self.own_failure is not None:
            return LaunchOutcome(self.own_failure.exit_code, self.own_failure, None, seconds)
        failure = first_failure(self.logs, self.exits, status if status >= 0 else 256 + status)
        if failure is None and status == 0 and self.exits and all(exit.status == 0 for exit in self.exits):
            # A signal that came too late: the run was done before its ranks could heed it.
            return LaunchOutcome(0, None, None, seconds)
        if number is not None and (failure is None or failure.is_interrupt or not read_failures(self.logs)):
            return LaunchOutcome(128 + number, None, number, seconds)
        if failure is not None and failure.is_interrupt:
            # The ranks left by themselves after a save: a stop file, or the end of the allotted time.
            return LaunchOutcome(failure.exit_code, None, failure.exit_code - 128, seconds)
        if failure is not None:
            return LaunchOutcome(failure.exit_code, failure, number, seconds)
        return LaunchOutcome(0, None, number, seconds)


def count_of(number: int, noun: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _ignore_usr1() -> None:
    """Schedulers send SIGUSR1 to every process of a job; DeepSpeed's launcher, and ranks that still load, would die of it."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


class _ExitEvents:
    """Waits that end at once when a rank ends, where the kernel can tell (pidfd); plain waits elsewhere."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._open: set[int] = set()

    def add(self, pid: int) -> None:
        """Watch the process `pid`."""
        with contextlib.suppress(OSError, AttributeError):
            descriptor = os.pidfd_open(pid)
            self._open.add(descriptor)
            self._poll.register(descriptor, select.POLLIN)

    def wait(self, seconds: float) -> None:
        """Return when a watched process has ended, or after `seconds`."""
        if not self._open:
            time.sleep(seconds)
            return
        for descriptor, _ in self._poll.poll(seconds * 1000):
            self._poll.unregister(descriptor)
            self._open.discard(descriptor)
            os.close(descriptor)

    def close(self) -> None:
        """Give the descriptors back."""
        for descriptor in self._open:
            os.close(descriptor)
        self._open.clear()


def _status_of(pid: int) -> int | None:
    """Exit code of this process's child `pid`, -n for a signal n, None while it runs; it is left to be collected."""
    result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if result is None:
        return None
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


def _rank_of(process: psutil.Process) -> int | None:
    try:
        value = process.environ().get("RANK", "")
    except psutil.Error:
        return None
    return int(value) if value.isdecimal() else None


def _zombie_status(pid: int) -> int | None:
    """Exit status of a process that has ended and is not collected yet, else None; -n for a signal n."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    if not fields or fields[0] not in ("Z", "X"):
        return None
    return os.waitstatus_to_exitcode(int(fields[49]))
