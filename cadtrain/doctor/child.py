"""Child processes that may crash or hang without taking the doctor along."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_ERROR_LINE = re.compile(r"(\[rank\d+\]: )?[\w.]*(Error|Exception|Fault): ")


@dataclass(frozen=True, slots=True)
class ChildResult:
    """How a child ended. `status` is None where it ran past its time limit and was killed."""

    status: int | None
    stdout: str
    stderr: str
    seconds: float

    @property
    def is_good(self) -> bool:
        """Whether it ended by itself with 0."""
        return self.status == 0

    def reason(self) -> str:
        """Why it is not good, in a few words: its error, or the last line it wrote, or the signal, or the time limit."""
        if self.status is None:
            return f"did not answer within {self.seconds:.0f} s"
        lines = [line.strip() for line in self.stderr.splitlines() if line.strip()]
        lines = [line for line in lines if _ERROR_LINE.match(line)] or lines
        if self.status < 0:
            return f"was killed by {signal.Signals(-self.status).name}" + (f": {lines[-1]}" if lines else "")
        return lines[-1] if lines else f"ended with exit code {self.status}"


def run_python(code: str, *, seconds: float, environment: Mapping[str, str] | None = None) -> ChildResult:
    """Run Python `code` in a child for at most `seconds`."""
    return run_all([[sys.executable, "-c", code]], [dict(environment or {})], seconds=seconds)[0]


def run_all(
    commands: Sequence[Sequence[str]],
    environments: Sequence[Mapping[str, str]],
    *,
    seconds: float,
    stop_early: bool = True,
) -> list[ChildResult]:
    """Run `commands` side by side, each with its additions to the environment.

    When the time is over, or (with `stop_early`) one has failed and the others have had a few seconds more, what is left
    is killed together with everything it started.
    """
    start = time.monotonic()
    children: list[_Child] = []
    try:
        for command, extra in zip(commands, environments, strict=True):
            children.append(_Child(command, {**os.environ, **extra}))
        _wait(children, start + seconds, stop_early=stop_early)
        return [child.collect(start) for child in children]
    finally:
        for child in children:
            child.kill()


class _Child:
    """One child; it writes into files, since a full pipe would stop it."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._stdout = tempfile.TemporaryFile(mode="w+", errors="replace")  # noqa: SIM115, `collect` closes it
        self._stderr = tempfile.TemporaryFile(mode="w+", errors="replace")  # noqa: SIM115, `collect` closes it
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=self._stdout, stderr=self._stderr,
            start_new_session=True,
        )  # fmt: skip

    def poll(self) -> int | None:
        return self._process.poll()

    def kill(self) -> None:
        """End it and what it started; one in an uninterruptible driver call stays, and is not waited for."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)

    def collect(self, start: float) -> ChildResult:
        status = self.poll()
        self.kill()
        texts = []
        for file in (self._stdout, self._stderr):
            file.seek(0)
            texts.append(file.read())
            file.close()
        return ChildResult(status, texts[0], texts[1], time.monotonic() - start)


def _wait(children: Sequence[_Child], deadline: float, *, stop_early: bool) -> None:
    while time.monotonic() < deadline:
        codes = [child.poll() for child in children]
        if all(code is not None for code in codes):
            return
        if stop_early and any(code not in (None, 0) for code in codes):
            deadline = min(deadline, time.monotonic() + 5)
        time.sleep(0.05)
