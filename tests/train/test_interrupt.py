"""Signals to a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

WAITS = """
import sys, time
from cadtrain.train.interrupt import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    while not stop.signal_number:
        time.sleep(0.01)
    print("noted", stop.signal_number, flush=True)
    for line in sys.stdin:
        print("alive", stop.signal_number, flush=True)
print("left", flush=True)
time.sleep(60)
"""
ORPHAN = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; from cadtrain.train.interrupt import die_with_parent; "
                          "die_with_parent(); print('ready', flush=True); time.sleep(60)"], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


class Child:
    """A Python process that is spoken to by lines."""

    def __init__(self, code: str, **environment: str) -> None:
        clean = {key: value for key, value in os.environ.items() if key != "CADTRAIN_LAUNCH_ID"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], env={**clean, **environment}, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def say(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def alone() -> Iterator[Child]:
    child = Child(WAITS)
    yield child
    child.close()


@pytest.fixture
def launched() -> Iterator[Child]:
    child = Child(WAITS, CADTRAIN_LAUNCH_ID="abc")
    yield child
    child.close()


@pytest.mark.parametrize(("first", "second"), [(signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGINT), (signal.SIGINT, signal.SIGTERM), (signal.SIGUSR1, signal.SIGTERM)])
def test_the_first_signal_is_noted_and_the_second_ends_the_process(alone: Child, first: int, second: int) -> None:
    assert alone.line() == "ready"
    alone.process.send_signal(first)
    assert alone.line() == f"noted {int(first)}"
    alone.say()
    assert alone.line() == f"alive {int(first)}", "the first one ends nothing"
    alone.process.send_signal(second)
    assert alone.process.wait(timeout=10) == 128 + second


def test_under_a_launcher_repeats_are_ignored(launched: Child) -> None:
    """A scheduler may signal the launcher and its ranks together; who is told twice still saves."""
    assert launched.line() == "ready"
    launched.process.send_signal(signal.SIGTERM)
    assert launched.line() == f"noted {int(signal.SIGTERM)}"
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        launched.process.send_signal(number)
        launched.say()
        assert launched.line() == f"alive {int(signal.SIGTERM)}"


def test_afterwards_a_signal_means_what_it_did_before(alone: Child) -> None:
    assert alone.line() == "ready"
    alone.process.send_signal(signal.SIGINT)
    alone.line()
    assert alone.process.stdin is not None
    alone.process.stdin.close()
    assert alone.line() == "left"
    alone.process.send_signal(signal.SIGTERM)
    assert alone.process.wait(timeout=10) == -signal.SIGTERM
    alone.process.stdin = None


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_a_rank_dies_with_its_launcher() -> None:
    parent = Child(ORPHAN)
    pid = int(parent.line())
    os.kill(pid, 0)
    parent.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not os.path.exists(f"/proc/{pid}") or open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] == "Z":  # noqa: SIM115
            return
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the rank outlived its launcher")
