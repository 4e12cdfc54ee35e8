"""From what a failed run left to plain words and remedies with its own values."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from cadtrain.launch import evidence as evidence_module
from cadtrain.launch.devices import Gpu
from cadtrain.launch.evidence import Evidence, Witness
from cadtrain.launch.failure import RankFailure
from cadtrain.launch.planning import LaunchPlan, LaunchRequest, plan_launch
from cadtrain.launch.reasons import Kind, classify, explain
from cadtrain.launch.restart import (
    RestartPolicy,
    argv_to_resume,
    keep_logs,
    newest_step,
    reason_against,
    record_restart,
    wait_for_restart,
)
from cadtrain.plan.stage import StageChoice

GIB = 2**30
OOM = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 44.40 GiB of which 1.10 GiB is free."
WATCHDOG = "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=9, OpType=ALLREDUCE, NumelIn=8, Timeout(ms)=600000)"


def failure(message: str = "broken", kind: str = "RuntimeError", *, code: int = 4, **more: object) -> RankFailure:
    return RankFailure(1, kind, message, code, **more)  # type: ignore[arg-type]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LaunchPlan:
    from cadtrain.launch import devices

    gpus = tuple(Gpu(str(i), f"GPU-{i}", "Test GPU", 48 * GIB, 47 * GIB) for i in range(4))
    monkeypatch.setattr(devices, "_gpus_from_nvml", lambda: gpus)
    made = plan_launch(LaunchRequest(run_dir=tmp_path / "run", zero="1"), environ={})
    return dataclasses.replace(made, zero=StageChoice(1, "as configured", {1: 40 * GIB}))


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (failure(OOM, "OutOfMemoryError"), Kind.GPU_MEMORY),
        (failure("unable to write to file </torch_123_456_0>"), Kind.SHARED_MEMORY),
        (failure("unable to allocate shared memory(shm) for file </torch_14178_972664358_0>: No space left on device (28)"), Kind.SHARED_MEMORY),
        (failure("[Errno 28] No space left on device: '/dev/shm/nccl-x'", "OSError"), Kind.SHARED_MEMORY),
        (failure("[Errno 28] No space left on device: 'runs/x/checkpoints'", "OSError"), Kind.DISK_FULL),
        (failure("x: No space left on device", "CheckpointError", is_expected=True), Kind.DISK_FULL),
        (failure("The server socket has failed to listen: EADDRINUSE, address already in use", "DistNetworkError"), Kind.PORT_TAKEN),
        (failure("[gloo] Timed out waiting 1800000ms for recv operation to complete"), Kind.COLLECTIVE),
        (failure("aborted", "SIGABRT", code=134, native_tail=WATCHDOG), Kind.COLLECTIVE),
        (failure("[gloo] Connection closed by peer [127.0.0.1]:4711"), Kind.LOST_PEER),
        (failure("[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:712: Connection reset by peer. This is typically caused"), Kind.LOST_PEER),
        (failure("port: 35051, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use", "DistNetworkError"), Kind.PORT_TAKEN),
        (failure("b: its remote shell ended with code 255", "RemoteShell"), Kind.LOST_HOST),
        (failure("NCCL error in: ProcessGroupNCCL.cpp, ncclSystemError", "DistBackendError"), Kind.COLLECTIVE),
        (failure("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory"), Kind.HOST_MEMORY),
        (failure("was killed", "SIGBUS", code=135), Kind.SHARED_MEMORY),
        (failure("crashed", "SIGSEGV", code=139), Kind.CRASH),
        (failure("curriculum.0: wrong", "ConfigError", code=2, is_expected=True), Kind.SETTINGS),
        (failure("10 steps in a row had no finite gradient", "TrainingError", is_expected=True), Kind.TRAINING),
        (failure("no rank has moved", "Hang"), Kind.HANG),
        (failure("index out of range", "IndexError"), Kind.ERROR),
    ],
)
def test_kinds(found: RankFailure, kind: Kind, plan: LaunchPlan) -> None:
    assert classify(found, Evidence()) is kind
    assert explain(found, Evidence(), plan).kind is kind


def test_a_kill_is_for_memory_only_where_the_kernel_says_so(plan: LaunchPlan) -> None:
    killed = failure("was killed (SIGKILL).", "SIGKILL", code=137)
    by_counter = explain(killed, Evidence(memory_kills=1, memory_limit=16 * GIB), plan)
    assert by_counter.kind is Kind.HOST_MEMORY
    assert by_counter.reason == "the kernel killed 1 process because memory was used up (this job may use 16.0 GiB)."
    by_log = explain(killed, Evidence(killed_gib={77: 12.5}), plan)
    assert "killed process 77, which held 12.5 GiB" in by_log.reason
    by_hand = explain(killed, Evidence(memory_kills=0), plan)
    assert by_hand.kind is Kind.KILLED
    assert "no kill for memory" in by_hand.reason
    assert "cannot be read here" in explain(killed, Evidence(), plan).reason


def test_gpu_memory_names_three_remedies_with_the_runs_values(plan: LaunchPlan) -> None:
    told = explain(failure(OOM, "OutOfMemoryError"), Evidence(), plan)
    assert "2.50 GiB more were wanted of 44.40 GiB. The plan expected 40.0 GiB a rank under ZeRO-1." in told.reason
    assert len(told.remedies) == 3
    assert "--set batch.micro_batch_tokens=2048 (now 4096" in told.remedies[0]
    assert "model.recompute=full" in told.remedies[1]
    assert "--zero 2 (now 1)" in told.remedies[2]


def test_remedies_of_a_run_that_has_used_the_cheap_ones(plan: LaunchPlan) -> None:
    config = plan.config
    tight = config.model_copy(
        update={
            "batch": config.batch.model_copy(update={"micro_batch_tokens": config.data.max_sample_tokens}),
            "model": config.model.model_copy(update={"recompute": "full"}),
            "zero": config.zero.model_copy(update={"stage": 3}),
        }
    )
    remedies = explain(failure(OOM), Evidence(), dataclasses.replace(plan, config=tight)).remedies
    assert remedies[0].endswith("--offload")
    assert "data.max_sample_tokens=512" in remedies[1]


def test_a_collective_names_operation_time_and_place(plan: LaunchPlan) -> None:
    found = failure("aborted", "SIGABRT", code=134, native_tail=WATCHDOG, stood_at="training, step 8, micro-step 1")
    reason = explain(found, Evidence(), plan).reason
    assert reason == "rank 1 waited in vain for the other ranks in ALLREDUCE for 600 s; it stood at: training, step 8, micro-step 1."


def test_counters_of_control_groups_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence_module, "kernel_log", lambda words: iter(kernel))
    kernel = ["Killed process 5 (python) total-vm:1kB, anon-rss:1048576kB"]
    group, proc = tmp_path / "cgroup" / "job", tmp_path / "proc"
    group.mkdir(parents=True)
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("0::/job\n")
    (group / "memory.events").write_text("low 0\noom 1\noom_kill 3\n")
    (group / "memory.max").write_text(f"{8 * GIB}\n")
    witness = Witness(tmp_path, cgroups=tmp_path / "cgroup", proc=proc)
    assert witness.evidence().memory_kills == 0
    (group / "memory.events").write_text("low 0\noom 2\noom_kill 5\n")
    kernel.append("Killed process 77 (python) total-vm:1kB, anon-rss:2097152kB, file-rss:0kB")
    seen = witness.evidence([5, 77])
    assert (seen.memory_kills, seen.memory_limit, seen.killed_gib) == (2, 8 * GIB, {77: 2.0})
    assert seen.disk_free


def test_without_control_groups_the_hosts_counter_counts(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "vmstat").write_text("nr_free 1\noom_kill 4\n")
    witness = Witness(tmp_path, cgroups=tmp_path / "none", proc=tmp_path)
    (tmp_path / "vmstat").write_text("nr_free 1\noom_kill 6\n")
    assert witness.evidence().memory_kills == 2
    assert Witness(tmp_path, cgroups=tmp_path / "none", proc=tmp_path / "none").evidence().memory_kills is None


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [(Kind.HANG, True, True), (Kind.KILLED, True, True), (Kind.GPU_MEMORY, False, True), (Kind.ERROR, False, True),
     (Kind.SETTINGS, False, False), (Kind.TRAINING, False, False), (Kind.DISK_FULL, False, False)],
)  # fmt: skip
def test_which_failures_are_started_again(kind: Kind, before: bool, after: bool) -> None:
    from cadtrain.launch.reasons import Explanation

    assert (not reason_against(Explanation(kind), has_progressed=False)) is before
    assert (not reason_against(Explanation(kind), has_progressed=True)) is after


def test_waits_double_up_to_a_limit() -> None:
    policy = RestartPolicy(9, 10.0, 60.0)
    assert [policy.wait_seconds(n) for n in (0, 1, 2, 3, 4, 5)] == [10.0, 10.0, 20.0, 40.0, 60.0, 60.0]


def test_the_command_to_go_on(plan: LaunchPlan) -> None:
    argv = argv_to_resume(plan.argv, 4711)
    assert "--master_port=4711" in argv
    assert argv[-1] == "--resume"
    assert argv_to_resume(argv, 4712) == tuple(a.replace("4711", "4712") for a in argv)


def test_what_a_start_left_is_kept_apart(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for name in ("rank_00.error.json", "rank_00.stacks.txt", "rank_00.log", "nccl_trace_rank_0"):
        (tmp_path / "logs" / name).write_text(name)
    kept = keep_logs(tmp_path)
    assert sorted(path.name for path in kept.iterdir()) == ["nccl_trace_rank_0", "rank_00.error.json", "rank_00.stacks.txt"]
    assert (tmp_path / "logs" / "rank_00.log").exists(), "a log goes on"
    assert keep_logs(tmp_path).name == "start_02", "what an earlier launch kept stays"
    record_restart(tmp_path, restart=1)
    assert json.loads((tmp_path / "restarts.jsonl").read_text())["restart"] == 1


def test_a_stop_file_ends_the_wait(tmp_path: Path) -> None:
    assert wait_for_restart(tmp_path, 0.0) is None
    (tmp_path / "STOP").touch()
    assert wait_for_restart(tmp_path, 60.0) == 15
    assert not (tmp_path / "STOP").exists()


def test_progress_is_a_newer_checkpoint(tmp_path: Path) -> None:
    assert newest_step(tmp_path) == 0
    (tmp_path / "checkpoints" / "step-00000012").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000015.tmp").mkdir()
    assert newest_step(tmp_path) == 12
