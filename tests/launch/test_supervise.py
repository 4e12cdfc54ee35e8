"""The supervisor against a stub of DeepSpeed's launcher: exit codes, signals, orphans, the error that is shown."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from cadtrain.launch.guard import MARK_VARIABLE, processes_with_mark
from cadtrain.launch.supervise import GracePeriods, LaunchOutcome, supervise

# Starts ranks and waits as deepspeed.launcher.launch does: looks once a second, and at the first failure stops
# the others one after another with a long time limit each.
LAUNCHER = """
import os, signal, subprocess, sys, time
ranks = []
for rank in range(int(sys.argv[1])):
    ranks.append(subprocess.Popen([sys.executable, "-u", sys.argv[2]], env={**os.environ, "RANK": str(rank)}))
alive = set(ranks)
while alive:
    for process in list(alive):
        code = process.poll()
        if code is None:
            continue
        alive.discard(process)
        if code:
            for other in ranks:
                other.terminate()
                try:
                    other.wait(30)
                except subprocess.TimeoutExpired:
                    other.kill()
            sys.exit(code)
    time.sleep(1)
"""

WORKER_HEAD = """
import json, os, signal, subprocess, sys, time
rank = int(os.environ["RANK"])
logs = os.environ["TEST_LOGS"]
def fail(kind, code, message="broken"):
    record = {"rank": rank, "time": time.time(), "type": kind, "message": message, "exit_code": code, "traceback": ""}
    with open(f"{logs}/rank_{rank:02d}.error.json", "w") as file:
        json.dump(record, file)
    sys.exit(code)
open(f"{logs}/started_{rank}", "w").write(str(os.getpid()))
"""

DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    folder = tmp_path / "logs"
    folder.mkdir()
    return folder


def prepare(logs: Path, worker: str, num_ranks: int) -> tuple[list[str], dict[str, str]]:
    launcher_path, worker_path = logs.parent / "launcher.py", logs.parent / "worker.py"
    launcher_path.write_text(LAUNCHER)
    worker_path.write_text(WORKER_HEAD + textwrap.dedent(worker))
    argv = [sys.executable, str(launcher_path), str(num_ranks), str(worker_path)]
    return argv, {**os.environ, "TEST_LOGS": str(logs)}


def run(logs: Path, worker: str, num_ranks: int = 2, **grace: float) -> LaunchOutcome:
    argv, environment = prepare(logs, worker, num_ranks)
    return supervise(argv, environment, logs, num_ranks, grace=GracePeriods(**grace))


def wait_for_ranks(logs: Path, num_ranks: int = 2, seconds: float = 20) -> list[int]:
    """Process ids of the ranks once all have started."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        texts = [path.read_text() for path in logs.glob("started_*")]
        if len(texts) == num_ranks and all(texts):
            return [int(text) for text in texts]
        time.sleep(0.02)
    raise AssertionError("the ranks did not start")


def send_when_started(logs: Path, *numbers: int, pause: float = 0.5) -> threading.Thread:
    def send() -> None:
        wait_for_ranks(logs)
        for number in numbers:
            time.sleep(pause)
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_all_ranks_done(logs: Path) -> None:
    outcome = run(logs, "time.sleep(0.2)")
    assert (outcome.exit_code, outcome.failure, outcome.signal_number) == (0, None, None)


def test_ranks_that_leave_by_themselves_after_a_save_have_not_failed(logs: Path) -> None:
    """A stop file, or the end of the allotted time: rank 0 saw it, all save and leave with 143."""
    outcome = run(logs, "fail('Interrupted', 143, 'stopped by the time limit after step 7; the state is saved')")
    assert (outcome.exit_code, outcome.failure, outcome.signal_number) == (143, None, signal.SIGTERM)


def test_sigusr1_reaches_the_ranks_and_not_the_launcher(logs: Path) -> None:
    """Schedulers send it some time before the end, some to every process: those that load yet live through it."""
    thread = send_when_started(logs, signal.SIGUSR1)
    outcome = run(
        logs, "signal.signal(signal.SIGUSR1, lambda *_: fail('Interrupted', 138))\nos.kill(os.getppid(), signal.SIGUSR1)\ntime.sleep(20)"
    )
    thread.join()
    assert (outcome.exit_code, outcome.failure, outcome.signal_number) == (138, None, signal.SIGUSR1)


def test_exit_code_is_the_failing_ranks(logs: Path) -> None:
    outcome = run(logs, "sys.exit(3 if rank == 1 else 0)")
    assert outcome.exit_code == 3
    assert outcome.failure is not None


def test_earliest_error_is_shown_and_the_others_do_not_delay_it(logs: Path) -> None:
    worker = f"""
    if rank == 1:
        fail("TrainingError", 4, "loss is not finite")
    {DEAF.splitlines()[0]}
    time.sleep(0.5)
    if rank == 0:
        fail("RuntimeError", 1, "connection closed by peer")
    time.sleep(60)
    """
    start = time.monotonic()
    outcome = run(logs, worker, num_ranks=3, failure=2.0)
    assert outcome.failure is not None
    assert (outcome.failure.rank, outcome.failure.type, outcome.failure.message) == (1, "TrainingError", "loss is not finite")
    assert outcome.exit_code == 4
    assert time.monotonic() - start < 20, "the launcher's 30 s a rank must not be waited for"


def test_killed_rank_is_named_before_its_peers_complaints(logs: Path) -> None:
    worker = """
    if rank == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.7)
    fail("RuntimeError", 1, "connection closed by peer")
    """
    outcome = run(logs, worker)
    assert outcome.failure is not None
    assert outcome.exit_code == 128 + signal.SIGKILL
    assert outcome.failure.message == "was killed (SIGKILL)."
    assert outcome.failure.rank in (1, -1)


def test_signal_reaches_all_ranks_and_lets_them_finish(logs: Path) -> None:
    worker = """
    def leave(number, frame):
        time.sleep(0.5)
        open(f"{logs}/saved_{rank}", "w").close()
        fail("Interrupted", 128 + number)
    signal.signal(signal.SIGTERM, leave)
    while True:
        time.sleep(0.1)
    """
    thread = send_when_started(logs, signal.SIGTERM)
    outcome = run(logs, worker)
    thread.join()
    assert (outcome.exit_code, outcome.failure, outcome.signal_number) == (143, None, signal.SIGTERM)
    assert {path.name for path in logs.glob("saved_*")} == {"saved_0", "saved_1"}


def test_second_signal_kills(logs: Path) -> None:
    thread = send_when_started(logs, signal.SIGINT, signal.SIGINT)
    start = time.monotonic()
    outcome = run(logs, DEAF + "time.sleep(60)")
    thread.join()
    assert outcome.exit_code == 130
    assert time.monotonic() - start < 20
    wait_until_gone(wait_for_ranks(logs))


def test_ranks_that_do_not_leave_are_killed_after_the_grace_period(logs: Path) -> None:
    thread = send_when_started(logs, signal.SIGHUP)
    outcome = run(logs, DEAF + "time.sleep(60)", stop=0.5)
    thread.join()
    assert outcome.exit_code == 128 + signal.SIGHUP


def test_a_rank_that_broke_while_leaving_is_a_failure(logs: Path) -> None:
    worker = """
    signal.signal(signal.SIGTERM, lambda number, frame: fail("CheckpointError", 4, "disk full"))
    while True:
        time.sleep(0.1)
    """
    thread = send_when_started(logs, signal.SIGTERM)
    outcome = run(logs, worker)
    thread.join()
    assert outcome.failure is not None
    assert (outcome.failure.message, outcome.exit_code) == ("disk full", 4)


def test_handlers_are_given_back(logs: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run(logs, "pass")
    assert signal.getsignal(signal.SIGTERM) is before


def test_nothing_outlives_a_finished_launch(logs: Path) -> None:
    worker = """
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    child = subprocess.Popen(command, start_new_session=True)
    open(f"{logs}/child_{rank}", "w").write(str(child.pid))
    """
    run(logs, worker)
    children = [int(path.read_text()) for path in logs.glob("child_*")]
    assert len(children) == 2
    wait_until_gone(children)


def test_killing_the_supervisor_leaves_no_orphans(logs: Path, tmp_path: Path) -> None:
    worker = DEAF + "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)\ntime.sleep(60)"
    argv, environment = prepare(logs, worker, 2)
    code = f"""
from pathlib import Path
from cadtrain.launch.supervise import supervise
import os
supervise({argv!r}, dict(os.environ), Path({str(logs)!r}), 2)
"""
    supervisor = subprocess.Popen([sys.executable, "-c", code], env=environment, start_new_session=True)
    ranks = wait_for_ranks(logs)
    mark = psutil.Process(ranks[0]).environ()[MARK_VARIABLE]
    assert len(processes_with_mark(mark)) >= 3
    supervisor.kill()
    supervisor.wait()
    wait_until_gone(ranks)
    # The guard kills the process group first and then what left it, so the ranks' own children may go a moment later.
    wait_until_none_is_marked(mark)


def wait_until_none_is_marked(mark: str, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while left := processes_with_mark(mark):
        assert time.monotonic() < end, f"still alive: {left}"
        time.sleep(0.05)


def wait_until_gone(pids: list[int], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        left = [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
        if not left:
            return
        time.sleep(0.05)
    raise AssertionError(f"still alive: {left}")


def test_torn_error_file_is_passed_over(logs: Path) -> None:
    (logs / "rank_00.error.json").write_text('{"rank": 0, "ti')
    (logs / "rank_01.error.json").write_text(json.dumps({"rank": 1}))
    assert run(logs, "sys.exit(5 if rank == 0 else 0)").exit_code == 5
