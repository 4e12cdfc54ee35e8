"""Why a run failed, in plain words, and what to do about it with the values of its own configuration."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from cadtrain.launch.evidence import Evidence
from cadtrain.launch.failure import RankFailure
from cadtrain.units import format_bytes

if TYPE_CHECKING:
    from cadtrain.config.sections import RunConfig
    from cadtrain.launch.planning import LaunchPlan

HANG = "Hang"
"""`RankFailure.type` of a run that no longer moved."""
LOST_HOST = "RemoteShell"
"""`RankFailure.type` of a host whose remote shell ended."""


class Kind(StrEnum):
    """What went wrong."""

    GPU_MEMORY = "GPU memory"
    HOST_MEMORY = "host memory"
    SHARED_MEMORY = "shared memory"
    DISK_FULL = "disk full"
    PORT_TAKEN = "port taken"
    COLLECTIVE = "collective time-out"
    LOST_PEER = "lost rank"
    LOST_HOST = "lost host"
    HANG = "hang"
    KILLED = "killed"
    CRASH = "crash"
    SETTINGS = "settings"
    """Wrong usage, configuration, data or machine: the next start would fail the same way."""
    TRAINING = "training"
    """A run that cannot go on, by its own judgement: no finite gradient, a checkpoint that cannot be written."""
    ERROR = "error"
    """An exception that nobody foresaw."""


ALWAYS_WORTH_A_RESTART = frozenset(
    {Kind.HANG, Kind.COLLECTIVE, Kind.LOST_PEER, Kind.LOST_HOST, Kind.KILLED, Kind.CRASH, Kind.PORT_TAKEN}
)
WORTH_A_RESTART_AFTER_PROGRESS = frozenset({Kind.GPU_MEMORY, Kind.HOST_MEMORY, Kind.SHARED_MEMORY, Kind.ERROR})


@dataclass(frozen=True, slots=True)
class Explanation:
    """A failure in plain words. `reason` may be empty where the failure's own message says it all."""

    kind: Kind
    reason: str = ""
    remedies: tuple[str, ...] = ()


_PATTERNS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    (Kind.GPU_MEMORY, re.compile(r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED")),
    (Kind.SHARED_MEMORY, re.compile(r"No space left on device.*/dev/shm|/dev/shm.*No space left on device|unable to (?:write|mmap|open|allocate shared memory).*torch_\d+|Bus error", re.S)),
    (Kind.DISK_FULL, re.compile(r"No space left on device|Disk quota exceeded|Errno 28\b|Errno 122\b|there is not enough room|has no room")),
    (Kind.PORT_TAKEN, re.compile(r"EADDRINUSE|[Aa]ddress already in use")),
    (Kind.COLLECTIVE, re.compile(r"collective operation timeout|Timed out waiting \d+ms|Wait timeout|timed out after \d+ms|Socket Timeout|client socket has timed out")),
    (Kind.LOST_PEER, re.compile(r"Connection (?:closed|reset) by (?:remote )?peer|remote process exited|Broken pipe|Connection was likely closed")),
    (Kind.COLLECTIVE, re.compile(r"NCCL error|ncclSystemError|ncclInternalError|ncclUnhandledCudaError|DistBackendError")),
    (Kind.HOST_MEMORY, re.compile(r"Cannot allocate memory|can't allocate memory|MemoryError|std::bad_alloc|Errno 12\b")),
)  # fmt: skip


def classify(failure: RankFailure, evidence: Evidence) -> Kind:
    """What kind of failure it is, from its own words, the end of what native code wrote, and the machine's counters."""
    if failure.type == HANG:
        return Kind.HANG
    if failure.type == LOST_HOST:
        return Kind.LOST_HOST
    if failure.exit_code in (2, 3):
        return Kind.SETTINGS
    text = f"{failure.type}: {failure.message}"
    found = _match(text) or (None if failure.is_expected else _match(failure.native_tail))
    if failure.type == "SIGKILL":
        return Kind.HOST_MEMORY if evidence.memory_kills or evidence.killed_gib else Kind.KILLED
    if failure.type == "SIGBUS":
        return Kind.SHARED_MEMORY
    if found is not None:
        return found
    if failure.type.startswith("SIG"):
        return Kind.CRASH if failure.type in ("SIGSEGV", "SIGABRT", "SIGILL", "SIGFPE") else Kind.KILLED
    return Kind.TRAINING if failure.is_expected else Kind.ERROR


def explain(failure: RankFailure, evidence: Evidence, plan: LaunchPlan) -> Explanation:
    """The failure in plain words, with remedies that name this run's values."""
    kind = classify(failure, evidence)
    tell = _TELLERS.get(kind)
    return tell(failure, evidence, plan) if tell is not None else Explanation(kind)


def _match(text: str) -> Kind | None:
    return next((kind for kind, pattern in _PATTERNS if pattern.search(text)), None)


def _gpu_memory(failure: RankFailure, evidence: Evidence, plan: LaunchPlan) -> Explanation:
    asked = re.search(r"Tried to allocate ([\d.]+ [KMG]iB)", failure.message)
    total = re.search(r"total capacity of ([\d.]+ [KMG]iB)", failure.message)
    reason = f"rank {failure.rank}'s GPU is full"
    if asked:
        reason += f": {asked[1]} more were wanted"
        reason += f" of {total[1]}" if total else ""
    estimate = plan.zero.needed.get(plan.zero.stage)
    if estimate is not None:
        reason += f". The plan expected {format_bytes(estimate)} a rank under ZeRO-{plan.zero.stage}"
    return Explanation(Kind.GPU_MEMORY, f"{reason}.", tuple(_memory_remedies(plan.config, plan.devices.num_ranks)[:3]))


def _memory_remedies(config: RunConfig, num_ranks: int) -> list[str]:
    """What lowers a rank's memory on its GPU, the cheapest first."""
    found = []
    tokens, longest = config.batch.micro_batch_tokens, config.data.max_sample_tokens
    half = max(longest, tokens // 2)
    if half < tokens:
        found.append(f"smaller packs: --set batch.micro_batch_tokens={half} (now {tokens}; the step's samples stay)")
    recompute = config.model.recompute
    if recompute != "full":
        now = list(recompute) if isinstance(recompute, tuple) else recompute
        cost = "up to a third slower" if recompute != "none" else "a third slower"
        found.append(f"recompute all activations, {cost}: --set model.recompute=full (now {now})")
    stage = config.zero.stage if isinstance(config.zero.stage, int) else 0
    if num_ranks > 1 and stage < 3:
        found.append(f"share more between the {num_ranks} ranks: --zero {stage + 1} (now {stage})")
    if not config.zero.offload_optimizer:
        found.append("keep the optimizer in host memory: --offload")
    if half >= tokens and longest > 512:
        found.append(
            f"leave out the longest samples: --set data.max_sample_tokens={longest // 2} "
            f"--set batch.micro_batch_tokens={longest // 2} (now {longest})"
        )
    if config.model.language.lora is None:
        found.append("train adapters in place of all weights: model.language.lora")
    found.append(f"more GPUs than {num_ranks}, or GPUs with more memory")
    return found


def _host_memory(failure: RankFailure, evidence: Evidence, plan: LaunchPlan) -> Explanation:
    limit = f" (this job may use {format_bytes(evidence.memory_limit)})" if evidence.memory_limit else ""
    if evidence.killed_gib:
        pid, size = next(iter(evidence.killed_gib.items()))
        reason = f"the kernel killed process {pid}, which held {size:.1f} GiB, because memory was used up{limit}."
    elif failure.type == "SIGKILL":
        count = evidence.memory_kills or 0
        reason = f"the kernel killed {count} process{'es' if count > 1 else ''} because memory was used up{limit}."
    else:
        reason = f"the host gave no more memory{limit}."
    zero, workers = plan.config.zero, plan.config.data.num_workers
    remedies = ["ask the scheduler or the container for more memory (sbatch --mem=…, docker --memory=…)"]
    if zero.offload_optimizer or zero.offload_parameters:
        remedies.append("without --offload the optimizer stays on the GPUs")
    if workers > 0:
        remedies.append(f"fewer reading threads: --set data.num_workers={workers // 2} (now {workers} a rank)")
    if plan.devices.kind == "cpu" and plan.devices.num_ranks > 1:
        remedies.append(f"fewer CPU ranks: --gpus {max(1, plan.devices.num_ranks // 2)} (now {plan.devices.num_ranks})")
    return Explanation(Kind.HOST_MEMORY, reason, tuple(remedies[:3]))


def _shared_memory(failure: RankFailure, evidence: Evidence, plan: LaunchPlan) -> Explanation:
    free = evidence.shared_memory_free
    left = f" ({format_bytes(free)} free now)" if free is not None else ""
    return Explanation(
        Kind.SHARED_MEMORY,
        f"memory that was mapped from a file could not be had; most often /dev/shm is full{left}.",
        (
            "start the container with --shm-size=16g or --ipc=host; on a host: mount -o remount,size=16g /dev/shm",
            "remove what dead processes left there: ls -l /dev/shm",
            "where /dev/shm has room: a file of the dataset was cut short, or its disk is full",
        ),
    )


def _disk_full(failure: RankFailure, evidence: Evidence, plan: LaunchPlan) -> Explanation:
    left = f" ({format_bytes(evidence.disk_free)} free now)" if evidence.disk_free is not None else ""
    keep = plan.config.checkpoint.keep_last
    remedies = ["free space, then go on with --resume: older checkpoints are whole"]
    if keep > 1:
        remedies.append(f"keep fewer checkpoints: --set checkpoint.keep_last=1 (now {keep})")
    remedies.append("move the run folder to a disk with more room and resume there")
    return Explanation(Kind.DISK_FULL, f"the disk of {plan.run_dir} is full{left}.", tuple(remedies))


def _port_taken(failure: RankFailure, evidence: Evidence, plan: LaunchPlan) -> Explanation:
    match = re.search(r"--master_port=(\d+)", " ".join(plan.argv))
    port = f"port {match[1]}" if match else f"port {plan.cluster.master_port}" if plan.cluster else "the port"
    return Explanation(
        Kind.PORT_TAKEN,
        f"another process took {port} between its choice and rank 0's start.",
        ("start again: another free port is taken each time",),
    )


def _collective(failure: RankFailure, evidence: Evidence, plan: LaunchPlan) -> Explanation:
    text = f"{failure.message}\n{failure.native_tail}"
    operation = re.search(r"OpType=(\w+)", text)
    limit = re.search(r"Timeout\(ms\)=(\d+)|[Tt]imed out (?:waiting|after) (\d+)ms|ran for (\d+) milliseconds", text)
    what = operation[1] if operation else "a collective operation"
    reason = f"rank {failure.rank} waited in vain for the other ranks in {what}"
    if limit:
        reason += f" for {int(next(group for group in limit.groups() if group)) // 1000} s"
    reason += f"; it stood at: {failure.stood_at}." if failure.stood_at else "."
    logs = plan.run_dir / "logs"
    remedies = [f"see what the other ranks did: {logs}/rank_*.log, rank_*.native.txt"]
    if plan.devices.kind == "cuda":
        remedies += [
            f"which collectives each rank had called: {logs}/nccl_trace_rank_*",
            "test the links alone: cadtrain doctor --bench",
        ]
    return Explanation(Kind.COLLECTIVE, reason, tuple(remedies))


def _lost_peer(failure: RankFailure, evidence: Evidence, plan: LaunchPlan) -> Explanation:
    return Explanation(
        Kind.LOST_PEER,
        f"rank {failure.rank} lost the connection to another rank, which had ended without leaving word.",
        (f"see the end of every log: tail -n 5 {plan.run_dir}/logs/rank_*.log",),
    )


def _lost_host(failure: RankFailure, evidence: Evidence, plan: LaunchPlan) -> Explanation:
    return Explanation(
        Kind.LOST_HOST,
        "the connection broke, the host went down, or nothing could be started there; the other hosts were stopped.",
        (
            "see that each host runs a command without asking for a password: cadtrain doctor --hostfile FILE",
            f"go on from the last checkpoint: --run-dir {plan.run_dir} --resume",
        ),
    )


def _hang(failure: RankFailure, evidence: Evidence, plan: LaunchPlan) -> Explanation:
    logs = plan.run_dir / "logs"
    remedies = [f"the stacks of all threads: {logs}/rank_*.stacks.txt"]
    if plan.devices.kind == "cuda":
        remedies.append("test the links alone: cadtrain doctor --bench")
    remedies.append("go on from the last checkpoint: --resume, or by itself with --max-restarts")
    return Explanation(Kind.HANG, "the run no longer moved and was ended.", tuple(remedies))


def _killed(failure: RankFailure, evidence: Evidence, plan: LaunchPlan) -> Explanation:
    if evidence.memory_kills is None:
        reason = "whether the kernel killed it for memory cannot be read here; most often it did."
    else:
        reason = "the kernel's counters show no kill for memory: another process, a user or the scheduler sent it."
    return Explanation(
        Kind.KILLED,
        reason,
        (f"go on from the last checkpoint: cadtrain launch --run-dir {plan.run_dir} --resume",),
    )


def _crash(failure: RankFailure, evidence: Evidence, plan: LaunchPlan) -> Explanation:
    stem = Path(plan.run_dir) / "logs" / f"rank_{max(0, failure.rank):02d}"
    return Explanation(
        Kind.CRASH,
        "native code failed; Python could not say more.",
        (
            f"where it was: {stem}.stacks.txt, and what it wrote: {stem}.native.txt",
            "check the machine: cadtrain doctor",
        ),
    )


_TELLERS: dict[Kind, Callable[[RankFailure, Evidence, LaunchPlan], Explanation]] = {
    Kind.GPU_MEMORY: _gpu_memory,
    Kind.HOST_MEMORY: _host_memory,
    Kind.SHARED_MEMORY: _shared_memory,
    Kind.DISK_FULL: _disk_full,
    Kind.PORT_TAKEN: _port_taken,
    Kind.COLLECTIVE: _collective,
    Kind.LOST_PEER: _lost_peer,
    Kind.LOST_HOST: _lost_host,
    Kind.HANG: _hang,
    Kind.KILLED: _killed,
    Kind.CRASH: _crash,
}
