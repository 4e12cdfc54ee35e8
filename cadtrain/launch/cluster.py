"""A launch over several hosts: one supervised launcher on each, started through a remote shell and ended together."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from cadtrain.checkpoint.layout import write_atomically
from cadtrain.launch.failure import RankFailure, read_failures, with_log, with_place
from cadtrain.launch.folder import LOGS_NAME
from cadtrain.launch.hang import HangLimit
from cadtrain.launch.hosts import Host, RemoteShell, passed_on, secrets
from cadtrain.launch.node import RESULT, TOKEN_NAME, NodeOrder
from cadtrain.launch.reasons import HANG, LOST_HOST
from cadtrain.launch.supervise import SIGNALS, GracePeriods, LaunchOutcome, count_of

LAST_SECONDS = 20.0
"""Time that hosts have to kill their ranks once their line was cut, before their shells are killed."""
POLL_SECONDS = 0.1


@dataclasses.dataclass(frozen=True, slots=True)
class Cluster:
    """The hosts of a run and how they are reached."""

    hosts: tuple[Host, ...]
    shell: RemoteShell
    kind: str
    master_addr: str
    master_port: int
    worker: tuple[str, ...]
    """The module that every rank runs, and its first arguments."""

    def orders(
        self,
        run_dir: Path,
        token: str,
        *,
        resume: bool,
        grace: GracePeriods = GracePeriods(),
        hang: HangLimit = HangLimit(),
    ) -> list[NodeOrder]:
        """What each host is to do."""
        hosts = [[host.name, host.slots] for host in self.hosts]
        return [
            NodeOrder(
                number, hosts, self.kind, self.master_addr, self.master_port, str(run_dir.absolute()), token, list(self.worker),
                resume, hang.seconds, grace.stop, grace.failure,
            )
            for number in range(len(self.hosts))
        ]  # fmt: skip

    def argv(self, order: NodeOrder, environment: Mapping[str, str]) -> list[str]:
        """What to execute here to start the launcher of `order` on its host."""
        variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
        python = shlex.quote(sys.executable)
        command = (
            f"cd {shlex.quote(os.getcwd())} && exec env {variables} {python} -m cadtrain.launch.node {order.dump()}"
        )
        return self.shell.argv(self.hosts[order.node_rank].name, command)


def supervise_cluster(
    cluster: Cluster,
    run_dir: Path,
    environment: Mapping[str, str],
    *,
    resume: bool,
    grace: GracePeriods = GracePeriods(),
    hang: HangLimit = HangLimit(),
    announce: Callable[[str], None] = lambda text: None,
) -> LaunchOutcome:
    """Start every host's launcher and return how the run ended, when all have.

    Must be called from the main thread: signals are taken and passed to all hosts; a second kills. When one host's part
    ends or its shell dies, the others get the grace period for failures and are then cut off, which kills their ranks.
    """
    token = uuid.uuid4().hex
    write_atomically(run_dir / TOKEN_NAME, token)
    orders = cluster.orders(run_dir, token, resume=resume, grace=grace, hang=hang)
    variables = {**passed_on(), **environment}
    parts = [_Part(cluster.hosts[order.node_rank].name, cluster.argv(order, variables)) for order in orders]
    return _Watch(parts, run_dir / LOGS_NAME, grace, announce).run()


class _Part:
    """One host's launcher, behind its remote shell."""

    def __init__(self, host: str, argv: Sequence[str]) -> None:
        self.host = host
        self.result: dict[str, Any] | None = None
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )  # fmt: skip
        self.send(f"environment {json.dumps(secrets())}")
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(RESULT):
                self.result = json.loads(line.removeprefix(RESULT))
            else:
                sys.stderr.write(line)

    def send(self, text: str) -> None:
        """Say a line to the host; one that is gone does not hear it."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.write(f"{text}\n")
            self.process.stdin.flush()

    def cut(self) -> None:
        """Close the line: the host kills its ranks."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def finish(self) -> None:
        """Kill the shell if it is still there, and take in its last words."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join(timeout=5)

    def failure(self) -> RankFailure | None:
        """How this host's part failed, if it did."""
        if self.result is not None:
            told = self.result["failure"]
            return None if told is None else RankFailure(**told, is_expected=told["type"].endswith("Fault"))
        code = self.process.returncode
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return RankFailure(
            -1, LOST_HOST, f"{self.host}: its remote shell {how} before its launcher said how the ranks fared.", 4, is_expected=False
        )  # fmt: skip


class _Watch:
    def __init__(
        self, parts: Sequence[_Part], logs: Path, grace: GracePeriods, announce: Callable[[str], None]
    ) -> None:
        self.parts, self.logs, self.grace, self.announce = list(parts), logs, grace, announce
        self.received: list[int] = []
        self.ended: list[_Part] = []  # in order
        self.deadline: float | None = None
        self.cut_at: float | None = None

    def run(self) -> LaunchOutcome:
        start = time.monotonic()
        previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            self._watch()
        finally:
            for part in self.parts:
                part.cut()
            for part in self.parts:
                part.finish()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self._judge(time.monotonic() - start)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)

    def _watch(self) -> None:
        passed = 0
        while len(self.ended) < len(self.parts):
            for part in self.parts:
                if part not in self.ended and part.has_ended():
                    self.ended.append(part)
                    if part.process.returncode:
                        self._allow(self.grace.failure + 5.0)
            if len(self.received) > passed:
                passed += 1
                self._pass_on(self.received[passed - 1], passed)
            if self.deadline is not None and time.monotonic() >= self.deadline and self.cut_at is None:
                self.cut_at = time.monotonic()
                for part in self.parts:
                    part.cut()
            if self.cut_at is not None and time.monotonic() >= self.cut_at + LAST_SECONDS:
                return
            time.sleep(POLL_SECONDS)

    def _pass_on(self, number: int, count: int) -> None:
        if count == 1:
            name = signal.Signals(number).name
            self.announce(
                f"{name}: asking {count_of(len(self.parts), 'host')} to save and leave. Once more kills them."
            )
            self._allow(self.grace.stop + 15.0)
        else:
            self._allow(0.0)
        for part in self.parts:
            part.send(f"signal {int(number)}")

    def _allow(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self.deadline = end if self.deadline is None else min(self.deadline, end)

    def _judge(self, seconds: float) -> LaunchOutcome:
        number = self.received[0] if self.received else None
        if all(part.result is not None and part.result["exit_code"] == 0 for part in self.parts):
            return LaunchOutcome(0, None, None, seconds)
        failures = [failure for part in self.ended if (failure := part.failure()) is not None]
        # A rank that was killed, or hangs, is the cause of what the ranks of other hosts then complain of.
        causes = [failure for failure in failures if failure.type.startswith("SIG") or failure.type == HANG]
        written = [item.failure for item in read_failures(self.logs) if not item.failure.is_interrupt]
        failure = next(iter([*causes, *written, *failures]), None)
        if number is not None and not written:
            return LaunchOutcome(128 + number, None, number, seconds)
        if failure is not None:
            return LaunchOutcome(
                failure.exit_code, with_place(self.logs, with_log(self.logs, failure)), number, seconds
            )
        codes = [
            part.result["exit_code"] for part in self.ended if part.result is not None and part.result["exit_code"]
        ]
        code = int(codes[0]) if codes else 0
        return LaunchOutcome(code, None, code - 128 if code > 128 else number, seconds)
