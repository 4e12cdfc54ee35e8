"""Preparations that are killed, starved and cut off: what they leave, and that the next run comes to the same dataset."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cadtrain.data.manifest import FAILURES_NAME
from cadtrain.data.writing.costs import read_costs
from cadtrain.data.writing.pipeline import PrepareProgress, Summary
from cadtrain.errors import EnvironmentFault
from tests.data.cheap_job import cheap_job, files_of, make

ROOT = Path(__file__).resolve().parents[2]
COUNT = 320
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the dataset that nobody disturbed."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    make(out, cheap_job(out, COUNT))
    return files_of(out)


def _start(out: Path, *, workers: int = 2, limit: float = 20.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.data.cheap_job", str(out), str(COUNT), str(workers), str(limit)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def _begun(out: Path) -> list[tuple[int, int]]:
    """Number and worker of each part that was begun."""
    path = Path(f"{out}.log")
    lines = path.read_text().splitlines() if path.is_file() else []
    return [(int(line.split()[0]), int(line.split()[1])) for line in lines if len(line.split()) == 2]


def _wait_until(out: Path, number: int, process: subprocess.Popen[str]) -> list[tuple[int, int]]:
    deadline = time.monotonic() + 60
    while len(begun := _begun(out)) < number:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"only {len(begun)} parts begun"
        time.sleep(0.01)
    return begun


def _is_alive(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _ledger(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / FAILURES_NAME).read_text().splitlines()]


def test_kill_9_of_the_parent(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    process = _start(out)
    workers = {worker for _, worker in _wait_until(out, 150, process)}
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while any(map(_is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(_is_alive, workers)), "workers outlived their parent"
    assert not out.exists()
    summary = make(out, cheap_job(out, COUNT))
    assert isinstance(summary, Summary)
    begun = Counter(number for number, _ in _begun(out))
    assert set(begun) == set(range(COUNT))
    assert max(begun.values()) == 2
    redone = sum(count - 1 for count in begun.values())
    assert redone <= 64  # two chunks: the one under way, and the one that its last parts were the first of
    assert summary.resumed >= 150 - 64
    assert files_of(out) == undisturbed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.log"]


@pytest.mark.parametrize("stop_at", [40])
def test_an_end_between_two_steps_of_the_writing(
    tmp_path: Path, undisturbed: dict[str, bytes], stop_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ends before each of its writes in turn: nothing half-written is ever taken for whole."""
    out = tmp_path / "out"
    writes = [0]
    replace = os.replace

    def stop(*arguments: Any) -> None:
        writes[0] += 1
        if writes[0] % stop_at == 7:
            raise KeyboardInterrupt
        replace(*arguments)

    monkeypatch.setattr("os.replace", stop)
    for _ in range(40):
        try:
            make(out, cheap_job(out, COUNT))
            break
        except KeyboardInterrupt:
            continue
    assert files_of(out) == undisturbed


def test_kill_9_of_a_worker_costs_nothing(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    process = _start(out, workers=1)
    worker = _wait_until(out, 100, process)[-1][1]
    os.kill(worker, signal.SIGKILL)
    assert process.wait(60) == 0
    assert len({worker for _, worker in _begun(out)}) == 2
    assert files_of(out) == undisturbed


def test_a_part_that_kills_its_worker_is_tried_twice_and_counted(tmp_path: Path) -> None:
    out = tmp_path / "out"
    Path(f"{out}.trouble").write_text(json.dumps({"3": "die", "5": "die once", "8": "bad"}))
    summary = make(out, cheap_job(out, 40))
    assert isinstance(summary, Summary)
    assert summary.manifest.failures == {"crashed": 1, "schema": 1}
    assert summary.written == 38
    (entry,) = [entry for entry in _ledger(out) if entry["kind"] == "crashed"]
    assert entry["file"] == "3.json"
    assert entry["reason"] == "the worker process ended with signal 9, 2 times"
    assert Counter(number for number, _ in _begun(out))[3] == 2


def test_a_part_that_hangs_and_ignores_sigterm_ends_at_its_time_limit(tmp_path: Path) -> None:
    out = tmp_path / "out"
    Path(f"{out}.trouble").write_text(json.dumps({"3": "hang"}))
    begin = time.monotonic()
    summary = make(out, cheap_job(out, 80, time_limit=1.0))
    assert time.monotonic() - begin < 60
    assert isinstance(summary, Summary)
    assert summary.manifest.failures == {"time_limit": 1}
    hung = next(worker for number, worker in _begun(out) if number == 3)
    assert not _is_alive(hung)
    costs = read_costs(out)
    assert costs is not None
    assert costs.num_rows == 80
    (cost,) = [row for row in costs.to_pylist() if row["kind"]]
    assert cost["id"] == "doc/00000003"
    assert 1.0 <= cost["seconds"] < 10
    assert 5 < cost["peak_memory_mib"] < 2000
    assert summary.costs is not None
    assert summary.costs.slowest[0][0] == "doc/00000003"


@pytest.mark.slow
def test_a_slow_part_holds_up_no_other(tmp_path: Path) -> None:
    """What comes after a hanging part is on disk before that part is given up."""
    out = tmp_path / "out"
    Path(f"{out}.trouble").write_text(json.dumps({"0": "hang"}))
    process = _start(out, workers=2, limit=30.0)
    _wait_until(out, 250, process)
    chunks = {int(path.stem) for path in tmp_path.glob("out.tmp-*/chunks/*.json")}
    journal = {int(path.stem) for path in tmp_path.glob("out.tmp-*/journal/*.json")}
    process.kill()
    process.wait()
    assert 0 not in chunks
    assert len(journal) * 2 + len(chunks) >= 5


class _FullDisk:
    """A disk that takes a number of files and then is full until it is mended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room = room
        self._fsync = os.fsync
        monkeypatch.setattr("os.fsync", self.fsync)

    def fsync(self, descriptor: int) -> None:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= 1
        self._fsync(descriptor)


@pytest.mark.parametrize("room", [1, 30])
def test_a_full_disk(tmp_path: Path, undisturbed: dict[str, bytes], room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    disk = _FullDisk(monkeypatch, room)
    with pytest.raises(EnvironmentFault, match=r"cannot be written: No space left on device.*goes on where it stopped"):
        make(out, cheap_job(out, COUNT))
    assert not out.exists()
    disk.room = 10**6
    make(out, cheap_job(out, COUNT))
    assert files_of(out) == undisturbed


SMALL_DISK = """
mount -t tmpfs -o size=4m tmpfs "$1" || exit 77
{python} -m tests.data.cheap_job "$1/out" {count} 1 20 2> "$2/first" &
while [ -z "$(ls "$1"/out.tmp-*/chunks 2> /dev/null)" ]; do sleep 0.02; done
dd if=/dev/zero of="$1/filler" bs=4k 2> /dev/null
wait $! ; echo $? > "$2/code"
rm "$1/filler"
ls "$1" > "$2/left"
{python} -m tests.data.cheap_job "$1/out" {count} 1 20 && cp -r "$1/out" "$2/out"
"""


@pytest.mark.slow
def test_a_disk_that_really_is_full(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    """Another process fills the disk in the middle of the work."""
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("mounting a small disk takes root")
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    kept.mkdir()
    script = SMALL_DISK.format(python=sys.executable, count=COUNT)
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", disk, kept], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert (kept / "code").read_text().strip() == "1"
    assert "No space left on device" in (kept / "first").read_text()
    assert [name for name in (kept / "left").read_text().split() if name.startswith("out.tmp-")]
    assert files_of(kept / "out") == undisturbed


def test_sigterm_says_that_the_work_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "parts"
    command = [sys.executable, "-m", "cadtrain", "data", "synth", "--out", str(out), "--count", "4096", "--views", "0"]
    process = subprocess.Popen([*command, "--workers", "1"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("parts.tmp-*/chunks")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    _, talk = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "Start the same command again" in " ".join(talk.replace("│", " ").split())
    assert "Traceback" not in talk


def test_a_resumed_run_counts_what_was_there(tmp_path: Path) -> None:
    told: list[PrepareProgress] = []
    out = tmp_path / "out"
    Path(f"{out}.trouble").write_text(json.dumps({"1": "bad"}))

    def stop(state: PrepareProgress) -> None:
        if state.done - state.resumed >= 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(out, cheap_job(out, COUNT, seconds=0.002), progress=stop)
    summary = make(out, cheap_job(out, COUNT, seconds=0.002), progress=told.append)
    assert isinstance(summary, Summary)
    assert told[0].done == told[0].resumed == summary.resumed >= 64
    assert told[0].failures == {"schema": 1}
    assert told[0].written == summary.resumed - 1
    assert told[-1].done == told[-1].total == COUNT
    assert told[-1].written == summary.written == COUNT - 1
