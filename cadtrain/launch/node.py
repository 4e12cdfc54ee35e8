"""One host's part of a launch over several: `python -m cadtrain.launch.node`, started by `cluster.py` through a remote shell.

It supervises DeepSpeed's launcher here as a launch on one host does. Its stdin is the line to the first host: `environment {…}`
comes first, with variables that no process list may show; `signal N` passes a signal on, and its end means that nobody looks after this host any more, so the ranks are killed. The last line
of its stdout says how it ended; everything else goes to stderr.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cadtrain.errors import CadtrainError, EnvironmentFault
from cadtrain.launch.devices import RankDevices, find_gpus
from cadtrain.launch.environment import environment_changes
from cadtrain.launch.failure import RankFailure
from cadtrain.launch.folder import LOGS_NAME
from cadtrain.launch.hang import HangLimit
from cadtrain.launch.supervise import GracePeriods, LaunchOutcome, supervise

TOKEN_NAME = ".launch.token"
RESULT = "cadtrain-node-result "
"""What the line with the result begins with."""


@dataclass(frozen=True, slots=True)
class NodeOrder:
    """What one host is to do; it travels as one JSON argument."""

    node_rank: int
    hosts: list[list[Any]]
    """(name, slots) of every host, in order."""
    kind: str
    master_addr: str
    master_port: int
    run_dir: str
    token: str
    worker: list[str]
    resume: bool
    hang_seconds: float | None
    stop_seconds: float
    failure_seconds: float

    @property
    def slots(self) -> int:
        """Ranks here."""
        return int(self.hosts[self.node_rank][1])

    @property
    def first_rank(self) -> int:
        """The first rank here."""
        return sum(int(slots) for _, slots in self.hosts[: self.node_rank])

    def dump(self) -> str:
        """One word for a command line."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return base64.urlsafe_b64encode(json.dumps(fields).encode()).decode()

    @classmethod
    def load(cls, text: str) -> NodeOrder:
        """From `dump`."""
        return cls(**json.loads(base64.urlsafe_b64decode(text)))


def launcher_argv(order: NodeOrder) -> list[str]:
    """DeepSpeed's launcher for this host's ranks."""
    ids = {
        name: ["-1"] * slots if order.kind == "cpu" else [str(i) for i in range(slots)] for name, slots in order.hosts
    }
    world = base64.urlsafe_b64encode(json.dumps(ids).encode()).decode()
    argv = [
        sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}", f"--node_rank={order.node_rank}",
        f"--master_addr={order.master_addr}", f"--master_port={order.master_port}", "--no_local_rank", "--log_level=critical",
        "--module", *order.worker, "--run-dir", order.run_dir,
    ]  # fmt: skip
    return [*argv, "--resume"] if order.resume else argv


def check_host(order: NodeOrder) -> None:
    """Raise `EnvironmentFault` where this host does not see the run folder, or has fewer GPUs than it should take ranks."""
    name = order.hosts[order.node_rank][0]
    path = Path(order.run_dir) / TOKEN_NAME
    try:
        seen = path.read_text(encoding="utf-8")
    except OSError:
        seen = ""
    if seen != order.token:
        raise EnvironmentFault(
            f"host {name} does not see the run folder of the first host.",
            where=order.run_dir,
            hint="All hosts need the same folder under the same path, e.g. on NFS: give a --run-dir there.",
        )
    if order.kind == "cuda" and len(found := find_gpus()) < order.slots:
        raise EnvironmentFault(
            f"host {name} has {len(found)} visible GPUs, {order.slots} ranks are meant for it.",
            where="--hostfile",
            hint=f"Write {name} slots={len(found)}.",
        )


def run_node(order: NodeOrder, announce: Callable[[str], None]) -> LaunchOutcome:
    """Check this host and supervise its ranks. Raises `EnvironmentFault`. Must be called from the main thread."""
    check_host(order)
    logs = Path(order.run_dir) / LOGS_NAME
    devices = RankDevices("cuda" if order.kind == "cuda" else "cpu", order.slots, ())
    environment = {**os.environ, **environment_changes(devices, os.environ, logs=logs)}
    return supervise(
        launcher_argv(order), environment, logs, order.slots, first_rank=order.first_rank,
        grace=GracePeriods(order.stop_seconds, order.failure_seconds), hang=HangLimit(order.hang_seconds),
        announce=announce, stdout=2,
    )  # fmt: skip


def take_environment(text: str) -> None:
    """Set the variables of the first line; another line, as of a host that is gone already, sets none."""
    word, _, values = text.partition(" ")
    if word == "environment":
        os.environ.update(json.loads(values))


class _Line:
    """The line to the first host."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._is_cut = False

    def obey(self) -> None:
        """Do what the first host says; end the ranks when it says nothing any more."""
        for line in sys.stdin:
            word, _, number = line.strip().partition(" ")
            if word == "signal" and number.isdecimal():
                os.kill(os.getpid(), int(number))
        self.tell("the line to the first host is cut; the ranks here are killed.")
        self._is_cut = True
        for _ in range(2):  # a second signal kills
            os.kill(os.getpid(), signal.SIGTERM)

    def tell(self, text: str) -> None:
        """Say something to people, as long as somebody may hear it."""
        if not self._is_cut:
            print(f"{self._host}: {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Run, and end with the exit code of this host's part."""
    parser = argparse.ArgumentParser(prog="python -m cadtrain.launch.node")
    parser.add_argument("order")
    order = NodeOrder.load(parser.parse_args().order)
    take_environment(sys.stdin.readline())
    line = _Line(order.hosts[order.node_rank][0])
    threading.Thread(target=line.obey, daemon=True).start()
    try:
        outcome = run_node(order, line.tell)
        failure, code, number = outcome.failure, outcome.exit_code, outcome.signal_number
    except CadtrainError as error:
        failure, code, number = (
            RankFailure(-1, type(error).__name__, str(error), error.exit_code, is_expected=True),
            error.exit_code,
            None,
        )
    told = None
    if failure is not None:
        told = {"rank": failure.rank, "type": failure.type, "message": failure.message, "exit_code": failure.exit_code}
    sys.stdout.write(f"{RESULT}{json.dumps({'exit_code': code, 'signal': number, 'failure': told})}\n")
    sys.stdout.flush()
    os._exit(code)  # the thread that reads stdin would hold up the interpreter's end


if __name__ == "__main__":
    main()
