"""A rank that goes wrong as told by `fault.json` beside its run folder; run by DeepSpeed's launcher as `python -m tests.launch.fault_worker --run-dir RUN`."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from cadtrain.heartbeat import Heartbeat, heartbeat_path, module_label
from cadtrain.train.failure import write_failure
from cadtrain.train.interrupt import die_with_parent
from cadtrain.train.traces import keep_traces

RANK = int(os.environ["RANK"])
RUN = Path(sys.argv[sys.argv.index("--run-dir") + 1])
FAULT = json.loads((RUN.parent / "fault.json").read_text())
IS_FIRST_START = "--resume" not in sys.argv

if FAULT["kind"] == "import" and FAULT["rank"] == RANK:
    import no_such_library  # noqa: F401


def main() -> None:
    die_with_parent()
    keep_traces(RUN, RANK)
    heartbeat = Heartbeat(heartbeat_path(RUN / "logs", RANK), RANK)
    heartbeat.phase("importing libraries")
    (RUN / f"addresses_{RANK}").write_text(json.dumps({"master": os.environ["MASTER_ADDR"], "local_rank": os.environ["LOCAL_RANK"]}))
    (RUN / f"pid_{RANK}").write_text(str(os.getpid()))
    (RUN / f"starts_{RANK}").open("a").write("x")
    try:
        {"wait": wait, "import": wait, "hang": hang, "error": error, "native": native, "memory": memory}[FAULT["kind"]](heartbeat)
    except BaseException as problem:
        write_failure(RUN, RANK, problem)
        os._exit(4)


def wait(heartbeat: Heartbeat) -> None:
    """Be killed, on the first start; then be done."""
    if not IS_FIRST_START and FAULT.get("then") == "done":
        return
    step = 0
    while True:
        step += 1
        heartbeat.begin_micro_step(step, 1)
        time.sleep(0.02)
        heartbeat.end_step()


def error(heartbeat: Heartbeat) -> None:
    """Raise on one rank, after a checkpoint where one is asked for."""
    if FAULT.get("progress") and IS_FIRST_START and RANK == 0:
        (RUN / "checkpoints" / "step-00000007").mkdir(parents=True)
    time.sleep(0.3)
    if FAULT["rank"] == RANK:
        raise RuntimeError(FAULT["message"])
    time.sleep(60)


def memory(heartbeat: Heartbeat) -> None:
    """Take more memory than there is."""
    taken = []
    while FAULT["rank"] == RANK:
        taken.append(bytearray(os.urandom(2**20)) * 16)
    time.sleep(60)


def native(heartbeat: Heartbeat) -> None:
    """Write past Python and die of a signal."""
    if FAULT["rank"] == RANK:
        os.write(2, FAULT["message"].encode() + b"\n")
        os.kill(os.getpid(), getattr(signal, FAULT["signal"]))
    time.sleep(60)


def hang(heartbeat: Heartbeat) -> None:
    """Real gloo ranks that add up; then one of them does something else and the others wait for it."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    for step in range(1, 5):
        heartbeat.begin_micro_step(step, 1)
        heartbeat.enter(module_label("language.layers.3"))
        if step == 4 and FAULT["rank"] == RANK and not (FAULT.get("then") == "done" and not IS_FIRST_START):
            lose_the_way()
        total = torch.ones(4)
        dist.all_reduce(total)
        assert int(total[0]) == dist.get_world_size()
        heartbeat.end_step()
    dist.destroy_process_group()


def lose_the_way() -> None:
    """What a rank does that took another branch."""
    time.sleep(600)


if __name__ == "__main__":
    main()
