"""Whole training runs with real ranks that can be killed at any moment, started in about a second.

A process of its own imports torch, DeepSpeed and cadtrain once and forks the ranks of each run. A rank counts what it does to
its checkpoints: files opened, written to, renamed, removed, folders made. At the count that it was given it kills itself with
SIGKILL, or fails a write as a full disk does; a rank's peers are killed as `cadtrain launch` kills them.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PEERS_SECONDS = 20.0
"""How long the other ranks have after one has ended badly."""
EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


@dataclass(frozen=True)
class Fault:
    """What happens to the ranks in `ranks` (empty: all) at their `at`-th act on checkpoints: `kill`, or `full` for a full disk."""

    at: int
    ranks: tuple[int, ...] = ()
    kind: str = "kill"
    only: str = ""
    """Count only acts in whose description, `event path` with the path below `checkpoints`, this pattern is found."""


@dataclass(frozen=True)
class Ended:
    """How a run ended: each rank's exit code (-9 killed), and what rank 0 did to the checkpoints if it came to its end."""

    codes: tuple[int, ...]
    acts: tuple[str, ...]

    @property
    def is_done(self) -> bool:
        return set(self.codes) == {0}


class ForkServer:
    """Runs `cadtrain.train.run` on forked ranks."""

    def __init__(self) -> None:
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.train.forked"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, run_dir: Path, config: Path, *, ranks: int = 2, resume: bool = False, fault: Fault | None = None) -> Ended:
        """Train `config` in `run_dir` until it ends or is killed. What the ranks write goes to `run_dir/rank_N.txt`."""
        order = {
            "run_dir": str(run_dir), "config": str(config), "ranks": ranks, "resume": resume,
            "fault": None if fault is None else asdict(fault),
        }  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return Ended(tuple(answer["codes"]), tuple(answer["acts"]))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def _serve() -> None:
    import deepspeed  # noqa: F401 - so that every fork has it

    import cadtrain.train.run  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(_run_ranks(order)), flush=True)


def _run_ranks(order: dict[str, Any]) -> dict[str, Any]:
    run_dir = Path(order["run_dir"])
    run_dir.mkdir(parents=True, exist_ok=True)
    acts = run_dir / "acts.json"
    acts.unlink(missing_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(order["ranks"]):
        pid = os.fork()
        if pid == 0:
            _rank(order, rank, port)
        pids.append(pid)
    codes = _wait(pids)
    return {"codes": codes, "acts": json.loads(acts.read_text()) if acts.exists() else []}


def _wait(pids: list[int]) -> list[int]:
    codes: dict[int, int] = {}
    deadline = None
    while len(codes) < len(pids):
        for pid in pids:
            if pid in codes:
                continue
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid] and deadline is None:
                    deadline = time.monotonic() + PEERS_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
            deadline = None
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def _rank(order: dict[str, Any], rank: int, port: int) -> None:
    """One rank, from fork to its end."""
    import traceback

    log = os.open(f"{order['run_dir']}/rank_{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(order["ranks"]), LOCAL_WORLD_SIZE=str(order["ranks"]),
        LOCAL_SIZE=str(order["ranks"]), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    code = 1
    try:
        import torch

        from cadtrain.config.load import load_run_config
        from cadtrain.errors import CadtrainError
        from cadtrain.train.run import run

        torch.set_num_threads(1)
        watch = _Watch(Path(order["run_dir"]) / "checkpoints", order["fault"], rank)
        try:
            run(load_run_config(order["config"]).config, Path(order["run_dir"]), resume=order["resume"])
            code = 0
        except CadtrainError as error:
            traceback.print_exc()
            code = error.exit_code
        watch.is_on = False
        if rank == 0 and code == 0:
            Path(order["run_dir"], "acts.json").write_text(json.dumps(watch.acts))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


class _Watch:
    """Counts a rank's acts on checkpoints and does to it what the fault says."""

    def __init__(self, root: Path, fault: dict[str, Any] | None, rank: int) -> None:
        self.acts: list[str] = []
        self.is_on = True
        self._root = str(root)
        self._fault = fault if fault is not None and (not fault["ranks"] or rank in fault["ranks"]) else None
        self._count = 0
        sys.addaudithook(self._hook)
        self._watch_writes()

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on or event not in EVENTS or not arguments or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        path = os.fsdecode(arguments[0])
        if path.startswith(self._root) and not (event == "open" and arguments[1] in ("r", "rb")):
            self._act(f"{event} {path[len(self._root) + 1 :]}")

    def _watch_writes(self) -> None:
        """The middle of a shard: half of a write has reached the file."""
        from cadtrain.checkpoint.shard_writer import HashingFile

        begin, write, watch = HashingFile.__init__, HashingFile.write, self
        paths: dict[HashingFile, str] = {}

        def begun(file: HashingFile, path: Path | None) -> None:
            begin(file, path)
            paths[file] = str(path)[len(watch._root) + 1 :]

        def watched(file: HashingFile, data: bytes | memoryview) -> int:
            if file._descriptor is None:
                return write(file, data)
            view = memoryview(data).cast("B")
            half = len(view) // 2
            write(file, view[:half])
            watch._act(f"write to {paths[file]}")
            write(file, view[half:])
            return len(view)

        HashingFile.__init__ = begun  # type: ignore[method-assign]
        HashingFile.write = watched  # type: ignore[method-assign]

    def _fill_disk(self) -> None:
        """The next write of a shard fails, and only that."""
        from cadtrain.checkpoint import shard_writer

        real = os.write

        def full(descriptor: int, data: bytes | memoryview) -> int:
            shard_writer.os.write = real
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        shard_writer.os.write = full  # type: ignore[assignment]

    def _act(self, text: str) -> None:
        self.acts.append(text)
        if self._fault is None or not re.search(self._fault["only"], text):
            return
        self._count += 1
        if self._count != self._fault["at"]:
            return
        if self._fault["kind"] == "full":
            self._fill_disk()
            return
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    _serve()
