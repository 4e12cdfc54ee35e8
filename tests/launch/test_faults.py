"""Real launches that go wrong on purpose: DeepSpeed's launcher, real ranks, real kills. Nothing may be left, whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cadtrain.launch.guard import MARK_VARIABLE, processes_with_mark

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 150.0

pytestmark = pytest.mark.slow


class Launch:
    """A launch in a process of its own, and what it said."""

    def __init__(self, run: Path, fault: dict[str, Any], *, prefix: list[str] | None = None, **options: Any) -> None:
        self.run = run
        (run.parent / "fault.json").write_text(json.dumps(fault))
        environment = {
            **os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "160",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }  # fmt: skip
        command = [*(prefix or []), sys.executable, "-m", "tests.launch.drive", str(run), json.dumps(options)]
        self.output = open(run.parent / "output", "w+")  # noqa: SIM115, `close` closes it
        self.process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=self.output, text=True, start_new_session=True
        )

    def pids(self, starts: int = 1) -> list[int]:
        """Process ids of both ranks once they have started for the `starts`-th time."""
        end = time.monotonic() + LIMIT
        while time.monotonic() < end:
            counts = [path.read_text() for path in self.run.glob("starts_*")]
            if len(counts) == 2 and all(len(text) >= starts for text in counts):
                found = [(self.run / f"pid_{rank}").read_text() for rank in range(2)]
                if all(found):
                    return [int(pid) for pid in found]
            assert self.process.poll() is None, self.said()
            time.sleep(0.05)
        raise AssertionError(f"the ranks did not start: {self.said()}")

    def mark(self) -> str:
        """What every process of this launch carries in its environment."""
        return psutil.Process(self.pids()[0]).environ()[MARK_VARIABLE]

    def end(self) -> dict[str, Any]:
        """What the launch printed at its end."""
        stdout, _ = self.process.communicate(timeout=LIMIT)
        return dict(json.loads(stdout)) if stdout else {}

    def said(self) -> str:
        """What it has told people so far."""
        return Path(self.output.name).read_text()

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        self.output.close()


@pytest.fixture
def launches() -> Iterator[list[Launch]]:
    made: list[Launch] = []
    yield made
    for launch in made:
        launch.close()


def go(launches: list[Launch], tmp_path: Path, fault: dict[str, Any], **options: Any) -> Launch:
    launches.append(Launch(tmp_path / "run", fault, **options))
    return launches[-1]


def wait_until(holds: Callable[[], bool], seconds: float = LIMIT) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def assert_nothing_is_left(mark: str) -> None:
    end = time.monotonic() + 30
    while left := processes_with_mark(mark):
        assert time.monotonic() < end, f"still alive: {[psutil.Process(pid).cmdline() for pid in left if psutil.pid_exists(pid)]}"
        time.sleep(0.1)


def test_kill_of_a_rank(launches: list[Launch], tmp_path: Path) -> None:
    launch = go(launches, tmp_path, {"kind": "wait"})
    mark, (_, second) = launch.mark(), launch.pids()
    os.kill(second, signal.SIGKILL)
    outcome = launch.end()
    assert launch.process.returncode == 137
    assert (outcome["failure"]["rank"], outcome["failure"]["type"]) == (1, "SIGKILL")
    assert outcome["failure"]["kind"] in ("killed", "host memory")
    assert "training, step" in outcome["failure"]["stood_at"]
    assert "rank 1: was killed (SIGKILL)." in launch.said()
    assert_nothing_is_left(mark)


def test_kill_of_deepspeeds_launcher(launches: list[Launch], tmp_path: Path) -> None:
    launch = go(launches, tmp_path, {"kind": "wait"})
    mark, (first, _) = launch.mark(), launch.pids()
    launcher = psutil.Process(first).parent()
    assert launcher is not None
    assert "deepspeed.launcher.launch" in launcher.cmdline()
    launcher.kill()
    outcome = launch.end()
    assert launch.process.returncode == 137
    assert outcome["failure"]["rank"] == -1
    assert "DeepSpeed's launcher was killed (SIGKILL); its ranks were ended with it." in launch.said()
    assert_nothing_is_left(mark)


def test_kill_of_cadtrain_itself(launches: list[Launch], tmp_path: Path) -> None:
    launch = go(launches, tmp_path, {"kind": "wait"})
    mark = launch.mark()
    launch.process.kill()
    assert launch.process.wait(timeout=LIMIT) == -signal.SIGKILL
    assert_nothing_is_left(mark)
    # The guard says it after it has looked twice.
    wait_until(lambda: "cadtrain launch was killed; its ranks were killed as well." in launch.said())


def test_a_rank_that_hangs_in_a_collective(launches: list[Launch], tmp_path: Path) -> None:
    launch = go(launches, tmp_path, {"kind": "hang", "rank": 1}, hang=20.0)
    mark = launch.mark()
    outcome = launch.end()
    failure = outcome["failure"]
    assert launch.process.returncode == 4
    assert (failure["kind"], failure["rank"]) == ("hang", 1)
    rows = {line.split(":")[0]: line for line in failure["message"].splitlines()[1:]}
    assert "step 4, micro-step 1, last in language.layers.3; waits in all_reduce" in rows["rank 0"]
    assert rows["rank 1"].endswith("<- lags")
    assert "lose_the_way" in rows["rank 1"]
    assert "in lose_the_way" in (launch.run / "logs" / "rank_01.stacks.txt").read_text()
    assert "in all_reduce" in (launch.run / "logs" / "rank_00.stacks.txt").read_text()
    assert_nothing_is_left(mark)


def test_a_rank_that_raises_at_import(launches: list[Launch], tmp_path: Path) -> None:
    launch = go(launches, tmp_path, {"kind": "import", "rank": 1})
    outcome = launch.end()
    assert launch.process.returncode == 4
    assert outcome["failure"]["rank"] == 1
    assert "No module named 'no_such_library'" in launch.said()
    assert "ended with exit code 1 and no message" in launch.said()
    assert not any(psutil.pid_exists(int(path.read_text())) for path in launch.run.glob("pid_*"))


def test_sigterm_during_the_start(launches: list[Launch], tmp_path: Path) -> None:
    launch = go(launches, tmp_path, {"kind": "wait"})
    supervisor = psutil.Process(launch.process.pid)
    wait_until(lambda: any("deepspeed.launcher.launch" in child.cmdline() for child in supervisor.children()))
    children = supervisor.children(recursive=True)
    launch.process.terminate()
    outcome = launch.end()
    assert launch.process.returncode == 143
    assert (outcome["signal"], outcome["failure"]) == (signal.SIGTERM, None)
    assert "SIGTERM" in launch.said()
    assert "To go on: cadtrain launch --run-dir" in launch.said()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []


def test_a_killed_rank_is_started_again(launches: list[Launch], tmp_path: Path) -> None:
    launch = go(launches, tmp_path, {"kind": "wait", "then": "done"}, restarts=2)
    mark, (first, _) = launch.mark(), launch.pids()
    os.kill(first, signal.SIGKILL)
    outcome = launch.end()
    assert (launch.process.returncode, outcome["num_restarts"]) == (0, 1)
    (row,) = [json.loads(line) for line in (launch.run / "restarts.jsonl").read_text().splitlines()]
    assert (row["restart"], row["rank"], row["from_step"], row["logs"]) == (1, 0, 0, "logs/start_01")
    assert "Restart 1 of 2" in launch.said()
    assert "and 1 restart" in launch.said()
    assert_nothing_is_left(mark)


def test_a_hang_is_started_again(launches: list[Launch], tmp_path: Path) -> None:
    launch = go(launches, tmp_path, {"kind": "hang", "rank": 0, "then": "done"}, hang=20.0, restarts=1)
    outcome = launch.end()
    assert (launch.process.returncode, outcome["num_restarts"]) == (0, 1), launch.said()
    assert "rank 0 failed (hang): no rank has moved for" in launch.said()
    assert "in lose_the_way" in (launch.run / "logs" / "start_01" / "rank_00.stacks.txt").read_text()


def test_an_error_is_started_again_only_after_progress(launches: list[Launch], tmp_path: Path) -> None:
    fault = {"kind": "error", "rank": 1, "message": "CUDA out of memory. Tried to allocate 2.00 GiB.", "progress": True}
    launch = go(launches, tmp_path, fault, restarts=5)
    outcome = launch.end()
    # The first start wrote a checkpoint, the second none.
    assert (launch.process.returncode, outcome["num_restarts"], outcome["failure"]["kind"]) == (4, 1, "GPU memory")
    assert len(outcome["failure"]["remedies"]) == 3
    assert "in error" in launch.said(), "the traceback is shown"
    assert "Not started again: no checkpoint was written since the last start" in launch.said()


def test_sigterm_between_two_starts(launches: list[Launch], tmp_path: Path) -> None:
    launch = go(launches, tmp_path, {"kind": "wait"}, restarts=2, wait=120.0)
    os.kill(launch.pids()[0], signal.SIGKILL)
    wait_until(lambda: "Restart 1 of 2" in launch.said())
    launch.process.terminate()
    outcome = launch.end()
    assert (launch.process.returncode, outcome["failure"]) == (143, None)


def test_what_native_code_wrote_explains_its_end(launches: list[Launch], tmp_path: Path) -> None:
    words = (
        "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=52, OpType=_ALLGATHER_BASE, NumelIn=8, "
        "NumelOut=16, Timeout(ms)=1800000) ran for 1800066 milliseconds before timing out."
    )
    launch = go(launches, tmp_path, {"kind": "native", "rank": 1, "message": words, "signal": "SIGABRT"})
    outcome = launch.end()
    assert launch.process.returncode == 128 + signal.SIGABRT
    assert (outcome["failure"]["kind"], outcome["failure"]["rank"]) == ("collective time-out", 1)
    assert "in _ALLGATHER_BASE for 1800 s" in outcome["failure"]["reason"]
    assert "Fatal Python error" in (launch.run / "logs" / "rank_01.stacks.txt").read_text()


@pytest.fixture
def small_memory() -> Iterator[list[str]]:
    """Words that run a command in a control group with 1 GiB of memory."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, inner = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup") / ("memory" if controllers else "")
        group = root / inner.lstrip("/") / f"cadtrain_test_{os.getpid()}"
        limit = "memory.limit_in_bytes" if controllers else "memory.max"
        try:
            group.mkdir()
            (group / limit).write_text(str(2**30))
        except OSError:
            if group.is_dir():
                group.rmdir()
            continue
        yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
        end = time.monotonic() + 30
        while (group / "cgroup.procs").read_text() and time.monotonic() < end:
            time.sleep(0.05)
        group.rmdir()
        return
    pytest.skip("no control group for memory can be made here")


def test_a_rank_that_the_kernel_kills_for_memory(launches: list[Launch], tmp_path: Path, small_memory: list[str]) -> None:
    launch = go(launches, tmp_path, {"kind": "memory", "rank": 1}, prefix=small_memory)
    outcome = launch.end()
    failure = outcome["failure"]
    assert (launch.process.returncode, failure["type"], failure["rank"]) == (137, "SIGKILL", 1), launch.said()
    assert failure["kind"] == "host memory", launch.said()
    assert "because memory was used up (this job may use 1.0 GiB)" in failure["reason"]
    assert "more memory" in failure["remedies"][0]


SHORT = [
    f"--set=curriculum.{number}.{name}" for number, name in [(0, "duration=40"), (1, "duration=3"), (2, "duration=3"), (0, "warmup=1"), (1, "warmup=1"), (2, "warmup=1")]
]  # fmt: skip


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], Path]]]:
    """The demo, shortened, through the command line."""
    processes = []

    def begin(*options: str) -> tuple[subprocess.Popen[str], Path]:
        run = tmp_path / "demo"
        command = [sys.executable, "-m", "cadtrain", "launch", "--gpus", "2", "--run-dir", str(run), "--json", *SHORT, "--set=checkpoint.every=10"]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "160"}
        processes.append(
            subprocess.Popen([*command, *options], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        )  # fmt: skip
        return processes[-1], run

    yield begin
    for process in processes:
        process.kill()
        process.wait()


def rank_of(run: Path, number: int) -> psutil.Process:
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        is_rank = str(run) in words and "train" in words and not {"launch", "deepspeed.launcher.launch"} & set(words)
        if is_rank and process.environ().get("RANK") == str(number):
            return process
    raise AssertionError(f"rank {number} does not run")


@pytest.mark.timeout(900)
def test_a_training_run_survives_the_kill_of_a_rank(training: Callable[..., tuple[subprocess.Popen[str], Path]]) -> None:
    process, run = training("--max-restarts", "2")
    wait_until(lambda: (run / "checkpoints" / "step-00000010").is_dir() or process.poll() is not None)
    mark = rank_of(run, 1).environ()[MARK_VARIABLE]
    rank_of(run, 1).kill()
    stdout, said = process.communicate(timeout=2 * LIMIT)
    assert process.returncode == 0, said
    assert json.loads(stdout)["num_restarts"] == 1
    assert "resumed after step" in said
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines() if "validation" not in line]
    assert steps == list(range(1, 47)), "every step stands once"
    assert_nothing_is_left(mark)


@pytest.mark.timeout(900)
def test_a_training_run_that_hangs_says_where(training: Callable[..., tuple[subprocess.Popen[str], Path]]) -> None:
    process, run = training("--hang-timeout", "40s")
    wait_until(lambda: (run / "checkpoints" / "step-00000010").is_dir() or process.poll() is not None)
    stopped = rank_of(run, 1)
    mark = stopped.environ()[MARK_VARIABLE]
    stopped.suspend()
    stdout, said = process.communicate(timeout=2 * LIMIT)
    failure = json.loads(stdout)["failure"]
    assert (process.returncode, failure["kind"], failure["rank"]) == (4, "hang", 1), said
    assert "gave no stack: stopped, or stuck in a driver  <- lags" in failure["message"]
    assert "rank 0: training, step" in failure["message"]
    assert "; waits in " in failure["message"]
    assert_nothing_is_left(mark)
